// One kernel for dispatch, one for combine. A rank writes only its own region and private buffers; it reads its peers' regions, which are
// mapped by CUDA IPC. So a process that was declared dead and wakes up can change nothing that others read.
//
// Region of a rank (offsets in Args):
//   0     flag of dispatch: the stamp of the last dispatch whose rows, pairs and counts are here
//   128   flag of combine: the stamp of the last layer whose expert outputs are here
//   256   int32 tokens, top_k, row_bytes of that dispatch
//   pairs [T * K] {expert | destination << 16, index}: index counts the earlier pairs of this source with the same expert and destination
//   counts [ranks][experts]: pairs per destination and expert
//   x     [T] rows;   y [capacity] expert outputs, grouped as on the rank that computed them
//
// Lock-step makes it safe to overwrite a region: before a rank publishes layer l + 1 it has seen every peer's combine flag of layer l,
// which a peer raises after its gather of layer l; before it writes y of l + 1 it has seen every peer's dispatch flag of l + 1, which a peer
// raises after its combine of l.
//
// A block that waits holds registers which another rank on the same GPU may need to get on with what is being waited for. So a rank that
// shares its GPU runs the parts of a direction as kernels of their own, and a single block waits; a rank alone on its GPU runs one kernel.
#include <cuda_runtime.h>
#include <stdint.h>

typedef unsigned long long u64;

enum { THREADS = 256, WARPS = THREADS / 32, ROWS_IN_FLIGHT = 4, TERMS_IN_FLIGHT = 8, NOWHERE = 0xffff };
enum { DISPATCH_FLAG = 0, COMBINE_FLAG = 128, HEADER = 256 };
enum Parts { PUBLISH = 1, WAIT = 2, MOVE = 4 };
enum Failure { NONE = 0, DEADLINE = 1, CLOSED = 2, PROTOCOL = 3, QUIET = 4 };

struct Args {
    char *const *base;        // [ranks] regions as mapped here
    const int *active;        // [ranks] 1 = alive
    const int *cut;           // pinned [ranks]: the host says that this peer is gone
    int *failed;              // pinned [ranks + 1]: Failure of each peer; the last is 1 after a pair without a rank, 2 after too many rows
    unsigned *voided;         // 1 once the step is void: later kernels do nothing
    unsigned *ticket;         // blocks that have published; 0 between kernels
    const u64 *clock;         // epoch, step
    const int *replica_rank;  // [experts, replicas] of this layer
    const double *quota;      // [experts, replicas] cumulative
    const char *x;            // [tokens] rows
    const long long *ids;     // [tokens, top_k]
    const float *weights;     // [tokens, top_k]
    char *rows;               // [capacity] rows received, grouped by expert
    int *offsets;             // [experts + 1] where each expert's rows begin
    int *origin;              // [ranks, experts] where this rank's pairs begin in each rank's grouped rows
    char *out;                // [tokens] rows
    double stride, step_phase, source_phase;
    long long pairs_at, counts_at, x_at, y_at;
    long long row_bytes, capacity;
    u64 deadline_ns, grace_ns;
    int ranks, me, experts, replicas, layer, tokens, top_k, max_tokens, is_bf16, copy_x, parts;
};

__device__ __forceinline__ u64 load_acquire(const u64 *p) {
    u64 v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void store_release(u64 *p, u64 v) { asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory"); }
__device__ __forceinline__ u64 now_ns() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
__device__ __forceinline__ u64 stamp_of(const Args &a) { return ((a.clock[0] << 44) | (a.clock[1] << 12) | (u64)a.layer) + 1; }

// ---- waiting

__device__ void fail(const Args &a, int peer, int how) {
    *(volatile int *)(a.failed + peer) = how;
    atomicExch(a.voided, 1u);
    __threadfence_system();
}

// Wait for one peer's flag. A newer flag is no answer: that peer has gone on without us, and the host will say so.
__device__ int wait_for(const Args &a, const u64 *flag, u64 stamp, const int *cut) {
    u64 began = now_ns(), until = began + a.deadline_ns;
    bool others_failed = false;
    for (unsigned spins = 1;; spins++) {
        if (load_acquire(flag) == stamp) return NONE;
        if (spins % 64) continue;
        int how = NONE;
        u64 now = now_ns();
        if (!others_failed && *(volatile unsigned *)a.voided) {
            others_failed = true;
            until = min(until, now + a.grace_ns);
        }
        if (*(volatile const int *)cut) how = CLOSED;
        else if (now >= until) how = others_failed ? QUIET : DEADLINE;
        // this process may have been off the GPU past the deadline, with the flag there since long
        if (how != NONE) return load_acquire(flag) == stamp ? NONE : how;
    }
}

// Wait for all active peers (one thread each). False if one failed: the whole block must leave then.
__device__ bool wait_for_all(const Args &a, int flag_at, u64 stamp) {
    int how = NONE;
    for (int r = threadIdx.x; r < a.ranks; r += THREADS) {
        if (!a.active[r]) continue;
        how = wait_for(a, (const u64 *)(a.base[r] + flag_at), stamp, a.cut + r);
        if (how == NONE && flag_at == DISPATCH_FLAG) {
            const int *header = (const int *)(a.base[r] + HEADER);
            int tokens = __ldcg(header);
            bool fits = tokens >= 0 && tokens <= a.max_tokens && __ldcg(header + 1) == a.top_k && __ldcg(header + 2) == (int)a.row_bytes;
            if (!fits) how = PROTOCOL;
        }
        if (how != NONE && how != QUIET) fail(a, r, how);
    }
    return !__syncthreads_or(how != NONE);
}

// ---- dispatch

__device__ __forceinline__ int destination_of(const Args &a, int expert, int pair, double step_phase) {
    int choice = 0;
    if (a.replicas > 1) {
        double sum = __dadd_rn(__dadd_rn(__dmul_rn((double)pair, a.stride), step_phase), a.source_phase), u = sum - floor(sum);
        for (int k = 0; k < a.replicas; k++) choice += a.quota[(long long)expert * a.replicas + k] <= u;
    }
    if (choice >= a.replicas) return -1;
    int rank = a.replica_rank[(long long)expert * a.replicas + choice];
    return rank >= 0 && rank < a.ranks && a.active[rank] ? rank : -1;
}

// A warp numbers the pairs of one expert in the order of the batch, for each destination from 0, and counts them. `count` [ranks] is its own.
__device__ void index_expert(const Args &a, int expert, int *count, uint2 *pairs, int *counts, double step_phase) {
    const int lane = threadIdx.x % 32, n = a.tokens * a.top_k, AHEAD = 8;
    for (int r = lane; r < a.ranks; r += 32) count[r] = 0;
    __syncwarp();
    for (int base = 0; base < n; base += 32 * AHEAD) {
        long long id[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int i = base + 32 * j + lane;
            id[j] = i < n ? a.ids[i] : -1;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            bool match = id[j] == expert;
            unsigned matching = __ballot_sync(~0u, match);
            if (!matching) continue;
            if (match) {
                int i = base + 32 * j + lane, to = destination_of(a, expert, i, step_phase);
                unsigned same = __match_any_sync(matching, to);
                int index = to < 0 ? 0 : count[to] + __popc(same & ((1u << lane) - 1));
                __syncwarp(matching);
                if (to >= 0 && lane == __ffs(same) - 1) count[to] += __popc(same);
                if (to < 0) fail(a, a.ranks, 1);
                pairs[i] = make_uint2((unsigned)expert | (unsigned)(to < 0 ? NOWHERE : to) << 16, (unsigned)index);
            }
            __syncwarp();
        }
    }
    for (int r = lane; r < a.ranks; r += 32) counts[(long long)r * a.experts + expert] = count[r];
    __syncwarp();
}

// Everything that peers read of this rank, then the flag, raised by the block that finishes last.
template <class Vec> __device__ void publish(const Args &a, int *scratch, u64 stamp) {
    char *region = a.base[a.me];
    uint2 *pairs = (uint2 *)(region + a.pairs_at);
    int *counts = (int *)(region + a.counts_at);
    const int warp = threadIdx.x / 32, n = a.tokens * a.top_k, all = gridDim.x * THREADS, self = blockIdx.x * THREADS + threadIdx.x;
    for (int i = self; i < n; i += all)
        if (a.ids[i] < 0 || a.ids[i] >= a.experts) {
            pairs[i] = make_uint2((unsigned)NOWHERE << 16, 0);
            fail(a, a.ranks, 1);
        }
    double step_phase = __dmul_rn((double)a.clock[1], a.step_phase);
    for (int e = warp * gridDim.x + blockIdx.x; e < a.experts; e += gridDim.x * WARPS)
        index_expert(a, e, scratch + warp * a.ranks, pairs, counts, step_phase);
    if (a.copy_x) {
        const Vec *from = (const Vec *)a.x;
        Vec *to = (Vec *)(region + a.x_at);
        const long long vecs = a.tokens * (a.row_bytes / (long long)sizeof(Vec));
        for (long long base = 0; base < vecs; base += (long long)all * ROWS_IN_FLIGHT) {
            Vec v[ROWS_IN_FLIGHT];
#pragma unroll
            for (int j = 0; j < ROWS_IN_FLIGHT; j++)
                if (base + (long long)j * all + self < vecs) v[j] = from[base + (long long)j * all + self];
#pragma unroll
            for (int j = 0; j < ROWS_IN_FLIGHT; j++)
                if (base + (long long)j * all + self < vecs) to[base + (long long)j * all + self] = v[j];
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence_system();
        if (atomicAdd(a.ticket, 1u) == gridDim.x - 1) {
            *a.ticket = 0;
            int *header = (int *)(region + HEADER);
            header[0] = a.tokens;
            header[1] = a.top_k;
            header[2] = (int)a.row_bytes;
            __threadfence_system();
            store_release((u64 *)(region + DISPATCH_FLAG), stamp);
        }
    }
    __syncthreads();
}

// start[s, e]: where the pairs of source s for expert e begin among the grouped rows of rank `to`. Writes `offsets` if given.
__device__ void plan(const Args &a, int to, int *start, int *offsets) {
    __shared__ int warp_sum[WARPS];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    for (int j = tid; j < a.ranks * a.experts; j += THREADS) {
        int source = j / a.experts, expert = j - source * a.experts;
        start[j] = a.active[source] ? __ldcg((const int *)(a.base[source] + a.counts_at) + (long long)to * a.experts + expert) : 0;
    }
    __syncthreads();
    const int each = (a.experts + THREADS - 1) / THREADS, begin = min(a.experts, tid * each), end = min(a.experts, begin + each);
    int sum = 0;
    for (int e = begin; e < end; e++)
        for (int s = 0; s < a.ranks; s++) sum += start[s * a.experts + e];
    int scan = sum;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        int below = __shfl_up_sync(~0u, scan, d);
        if (lane >= d) scan += below;
    }
    if (lane == 31) warp_sum[warp] = scan;
    __syncthreads();
    int next = scan - sum;
    for (int w = 0; w < warp; w++) next += warp_sum[w];
    for (int e = begin; e < end; e++) {
        if (offsets) offsets[e] = next;
        for (int s = 0; s < a.ranks; s++) {
            int count = start[s * a.experts + e];
            start[s * a.experts + e] = next;
            next += count;
        }
        if (offsets && e == a.experts - 1) offsets[e + 1] = next;
    }
    __syncthreads();
}

// The token of all active sources' tokens that has this number, -1 beyond the last.
struct Where { int source, token; };
__device__ __forceinline__ Where find_token(const int *first, int ranks, int number) {
    int s = 0;
    while (s < ranks && number >= first[s + 1]) s++;
    return s < ranks ? Where{s, number - first[s]} : Where{-1, 0};
}

// Copy the rows of pairs that come here to their grouped places; each row is read once, however many experts of this rank want it.
template <class Vec> __device__ void gather(const Args &a, const int *start, const int *first) {
    const int lane = threadIdx.x % 32, vecs = (int)(a.row_bytes / (long long)sizeof(Vec)), total = first[a.ranks];
    uint2 pair = make_uint2((unsigned)NOWHERE << 16, 0), next = pair;
    auto load_pair = [&](int number) {
        Where at = find_token(first, a.ranks, number);
        if (at.source < 0 || lane >= a.top_k) return make_uint2((unsigned)NOWHERE << 16, 0);
        return __ldcg((const uint2 *)(a.base[at.source] + a.pairs_at) + (long long)at.token * a.top_k + lane);
    };
    pair = load_pair(blockIdx.x);
    for (int number = blockIdx.x; number < total; number += gridDim.x, pair = next) {
        next = load_pair(number + gridDim.x);
        Where at = find_token(first, a.ranks, number);
        int expert = pair.x & 0xffff, place = -1;
        if ((int)(pair.x >> 16) == a.me && expert < a.experts) place = start[at.source * a.experts + expert] + (int)pair.y;
        unsigned mine = __ballot_sync(~0u, place >= 0 && place < a.capacity);
        if (!mine) continue;
        const Vec *from = (const Vec *)(a.base[at.source] + a.x_at) + (long long)at.token * vecs;
        for (int base = threadIdx.x - lane; base < vecs; base += THREADS * ROWS_IN_FLIGHT) {
            Vec v[ROWS_IN_FLIGHT];
#pragma unroll
            for (int j = 0; j < ROWS_IN_FLIGHT; j++)
                if (base + j * THREADS + lane < vecs) v[j] = __ldcg(from + base + j * THREADS + lane);
            for (unsigned left = mine; left; left &= left - 1) {
                Vec *to = (Vec *)a.rows + (long long)__shfl_sync(~0u, place, __ffs(left) - 1) * vecs;
#pragma unroll
                for (int j = 0; j < ROWS_IN_FLIGHT; j++)
                    if (base + j * THREADS + lane < vecs) to[base + j * THREADS + lane] = v[j];
            }
        }
    }
}

// Shared memory: int start[ranks * experts], first[ranks + 1]; before the plan, counters of the warps.
template <class Vec> __global__ void __launch_bounds__(THREADS, 4) dispatch_kernel(const Args a) {
    extern __shared__ int shared[];
    if (*(volatile unsigned *)a.voided) return;
    const u64 stamp = stamp_of(a);
    if (a.parts & PUBLISH) publish<Vec>(a, shared, stamp);
    if (a.parts & WAIT && !wait_for_all(a, DISPATCH_FLAG, stamp)) return;
    if (!(a.parts & MOVE)) return;
    for (int to = blockIdx.x; to < a.ranks; to += gridDim.x) {
        if (!a.active[to]) continue;
        plan(a, to, shared, nullptr);
        for (int e = threadIdx.x; e < a.experts; e += THREADS) a.origin[(long long)to * a.experts + e] = shared[a.me * a.experts + e];
        __syncthreads();
    }
    plan(a, a.me, shared, blockIdx.x == 0 ? a.offsets : nullptr);
    int *first = shared + a.ranks * a.experts;
    if (threadIdx.x == 0) {
        first[0] = 0;
        for (int s = 0; s < a.ranks; s++) first[s + 1] = first[s] + (a.active[s] ? __ldcg((const int *)(a.base[s] + HEADER)) : 0);
        if (blockIdx.x == 0 && a.offsets[a.experts] > a.capacity) fail(a, a.ranks, 2);
    }
    __syncthreads();
    gather<Vec>(a, shared, first);
}

// ---- combine

__device__ __forceinline__ float widen(unsigned bits) { return __uint_as_float(bits << 16); }
// To nearest, ties to even; every NaN becomes the same one: the bits of the CPU backends.
__device__ __forceinline__ unsigned narrow(float value) {
    unsigned bits = __float_as_uint(value);
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// A vector of a row as float32 and back.
template <class Vec, bool bf16> struct Lanes;
template <> struct Lanes<uint4, true> {
    enum { N = 8 };
    static __device__ void spread(uint4 v, float *f) {
        unsigned w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) f[2 * i] = widen(w[i] & 0xffff), f[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
    static __device__ uint4 join(const float *f) {
        unsigned w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = narrow(f[2 * i]) | narrow(f[2 * i + 1]) << 16;
        return make_uint4(w[0], w[1], w[2], w[3]);
    }
};
template <> struct Lanes<uint4, false> {
    enum { N = 4 };
    static __device__ void spread(uint4 v, float *f) {
        f[0] = __uint_as_float(v.x), f[1] = __uint_as_float(v.y), f[2] = __uint_as_float(v.z), f[3] = __uint_as_float(v.w);
    }
    static __device__ uint4 join(const float *f) {
        return make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3]));
    }
};
template <> struct Lanes<unsigned short, true> {
    enum { N = 1 };
    static __device__ void spread(unsigned short v, float *f) { f[0] = widen(v); }
    static __device__ unsigned short join(const float *f) { return (unsigned short)narrow(f[0]); }
};
template <> struct Lanes<unsigned, false> {
    enum { N = 1 };
    static __device__ void spread(unsigned v, float *f) { f[0] = __uint_as_float(v); }
    static __device__ unsigned join(const float *f) { return __float_as_uint(f[0]); }
};

// out[t] = sum over k, in order, of weight * y: every product and every partial sum rounded to float32 on its own.
template <class Vec, bool bf16> __device__ void sum_pairs(const Args &a) {
    typedef Lanes<Vec, bf16> L;
    const int lane = threadIdx.x % 32, vecs = (int)(a.row_bytes / (long long)sizeof(Vec)), per_token = (vecs + 31) / 32;
    const long long units = (long long)a.tokens * per_token, warps = (long long)gridDim.x * WARPS;
    const uint2 *pairs = (const uint2 *)(a.base[a.me] + a.pairs_at);
    // lane k looks up pair k of the warp's token
    const Vec *row = nullptr;
    float weight = 0;
    int have = -1;
    for (long long unit = blockIdx.x * (long long)WARPS + threadIdx.x / 32; unit < units; unit += warps) {
        const int token = (int)(unit / per_token), at = (int)(unit - (long long)token * per_token) * 32 + lane;
        if (token != have && lane < a.top_k) {
            uint2 pair = pairs[(long long)token * a.top_k + lane];
            int to = pair.x >> 16, expert = pair.x & 0xffff;
            long long place = to == NOWHERE ? -1 : a.origin[(long long)to * a.experts + expert] + (int)pair.y;
            row = place >= 0 && place < a.capacity ? (const Vec *)(a.base[to] + a.y_at) + place * vecs : nullptr;
            weight = a.weights[(long long)token * a.top_k + lane];
        }
        have = token;
        float sum[L::N];
        for (int k0 = 0; k0 < a.top_k; k0 += TERMS_IN_FLIGHT) {
            Vec v[TERMS_IN_FLIGHT];
#pragma unroll
            for (int j = 0; j < TERMS_IN_FLIGHT; j++) {
                const Vec *from = (const Vec *)__shfl_sync(~0u, (u64)row, (k0 + j) % 32);
                if (k0 + j < a.top_k && at < vecs && from) v[j] = __ldcg(from + at);
                else v[j] = Vec();
            }
#pragma unroll
            for (int j = 0; j < TERMS_IN_FLIGHT; j++) {
                float w = __shfl_sync(~0u, weight, (k0 + j) % 32), term[L::N];
                if (k0 + j >= a.top_k) continue;
                L::spread(v[j], term);
#pragma unroll
                for (int i = 0; i < L::N; i++) {
                    term[i] = __fmul_rn(w, term[i]);
                    sum[i] = k0 + j == 0 ? term[i] : __fadd_rn(sum[i], term[i]);
                }
            }
        }
        if (at < vecs) ((Vec *)a.out)[(long long)token * vecs + at] = L::join(sum);
    }
}

template <class Vec, bool bf16> __global__ void __launch_bounds__(THREADS, 3) combine_kernel(const Args a) {
    if (*(volatile unsigned *)a.voided) return;
    const u64 stamp = stamp_of(a);
    if (a.parts & PUBLISH && blockIdx.x == 0 && threadIdx.x == 0) {
        // the experts wrote y in earlier kernels of this stream
        __threadfence_system();
        store_release((u64 *)(a.base[a.me] + COMBINE_FLAG), stamp);
    }
    if (a.parts & WAIT && !wait_for_all(a, COMBINE_FLAG, stamp)) return;
    if (a.parts & MOVE) sum_pairs<Vec, bf16>(a);
}

__global__ void set_clock_kernel(u64 *clock, u64 epoch, u64 step) { clock[0] = epoch, clock[1] = step; }

// ---- what Python calls; every function returns a cudaError_t

static int shared_bytes(const Args *a) { return (int)sizeof(int) * (a->ranks * (a->experts > WARPS ? a->experts : WARPS) + a->ranks + 1); }

template <class Kernel> static int launch(Kernel kernel, const Args *a, int blocks, int shared, cudaStream_t stream) {
    kernel<<<blocks, THREADS, shared, stream>>>(*a);
    return cudaGetLastError();
}

extern "C" {
int eep_alloc(size_t bytes, void **p) {
    int error = cudaMalloc(p, bytes);
    return error ? error : cudaMemset(*p, 0, bytes);
}
int eep_free(void *p) { return cudaFree(p); }
int eep_host_alloc(size_t bytes, void **p) { return cudaHostAlloc(p, bytes, cudaHostAllocMapped | cudaHostAllocPortable); }
int eep_host_free(void *p) { return cudaFreeHost(p); }
int eep_export(void *p, char *handle) { return cudaIpcGetMemHandle((cudaIpcMemHandle_t *)handle, p); }
int eep_open(const char *handle, void **p) {
    return cudaIpcOpenMemHandle(p, *(const cudaIpcMemHandle_t *)handle, cudaIpcMemLazyEnablePeerAccess);
}
int eep_close(void *p) { return cudaIpcCloseMemHandle(p); }
int eep_copy(void *to, const void *from, size_t bytes, cudaStream_t stream) { return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream); }
const char *eep_error(int error) { return cudaGetErrorString((cudaError_t)error); }
int eep_args_bytes(void) { return (int)sizeof(Args); }

// Load every kernel now, by a launch that does nothing: loading one later could wait for a kernel that waits, or spoil a graph's capture.
int eep_prepare(const Args *largest, cudaStream_t stream) {
    const void *all[] = {(const void *)dispatch_kernel<uint4>,          (const void *)dispatch_kernel<unsigned short>,
                         (const void *)combine_kernel<uint4, true>,     (const void *)combine_kernel<uint4, false>,
                         (const void *)combine_kernel<unsigned short, true>, (const void *)combine_kernel<unsigned, false>,
                         (const void *)set_clock_kernel};
    for (const void *kernel : all) {
        cudaFuncAttributes attributes;
        int error = cudaFuncGetAttributes(&attributes, kernel);
        if (error) return error;
    }
    for (int i = 0; i < 2; i++) {
        int error = cudaFuncSetAttribute(all[i], cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(largest));
        if (error) return error;
    }
    Args nothing = *largest;
    nothing.parts = 0;
    const Args *a = &nothing;
    int error = launch(dispatch_kernel<uint4>, a, 1, shared_bytes(a), stream);
    if (!error) error = launch(dispatch_kernel<unsigned short>, a, 1, shared_bytes(a), stream);
    if (!error) error = launch(combine_kernel<uint4, true>, a, 1, 0, stream);
    if (!error) error = launch(combine_kernel<uint4, false>, a, 1, 0, stream);
    if (!error) error = launch(combine_kernel<unsigned short, true>, a, 1, 0, stream);
    if (!error) error = launch(combine_kernel<unsigned, false>, a, 1, 0, stream);
    return error;
}
int eep_set_clock(u64 *clock, u64 epoch, u64 step, cudaStream_t stream) {
    set_clock_kernel<<<1, 1, 0, stream>>>(clock, epoch, step);
    return cudaGetLastError();
}
int eep_dispatch(const Args *a, int blocks, cudaStream_t stream) {
    return a->row_bytes % 16 ? launch(dispatch_kernel<unsigned short>, a, blocks, shared_bytes(a), stream)
                             : launch(dispatch_kernel<uint4>, a, blocks, shared_bytes(a), stream);
}
int eep_combine(const Args *a, int blocks, cudaStream_t stream) {
    if (a->row_bytes % 16)
        return a->is_bf16 ? launch(combine_kernel<unsigned short, true>, a, blocks, 0, stream)
                          : launch(combine_kernel<unsigned, false>, a, blocks, 0, stream);
    return a->is_bf16 ? launch(combine_kernel<uint4, true>, a, blocks, 0, stream) : launch(combine_kernel<uint4, false>, a, blocks, 0, stream);
}
}
