// Dispatch: number the pairs, publish, wait, plan where each row goes, fetch the rows.
#ifndef ELASTIC_EP_DISPATCH_CUH
#define ELASTIC_EP_DISPATCH_CUH

#include "common.cuh"

// What one block needs to number pairs, in shared memory. Each of its warps has one expert.
struct Numbering {
    enum { FOUND = 128 };
    double *quota;   // [warps, replicas]
    int *rank_of;    // [warps, replicas]
    int *count;      // [warps, ranks] pairs numbered so far
    int *found;      // [warps, FOUND] pairs to number next, in their order
    unsigned *chose; // [warps, words] a bit for each pair of the batch: it chose the warp's expert
    int words;
    static __host__ __device__ int words_of(const Args &a) { return (a.tokens * a.top_k + 31) / 32; }
    static __host__ __device__ size_t bytes(const Args &a) {
        return WARPS * ((size_t)a.replicas * 12 + (size_t)a.ranks * 4 + FOUND * 4 + (size_t)words_of(a) * 4);
    }
    __device__ Numbering(const Args &a, void *shared)
        : quota((double *)shared), rank_of((int *)(quota + WARPS * a.replicas)), count(rank_of + WARPS * a.replicas),
          found(count + WARPS * a.ranks), chose((unsigned *)(found + WARPS * FOUND)), words(words_of(a)) {}
};

// The rule of core/routing.py, to the bit. `quota`, `rank_of` [replicas] are the expert's.
__device__ __forceinline__ int destination_of(const Args &a, const double *quota, const int *rank_of, int pair, double step_phase) {
    int choice = 0;
    if (a.replicas > 1) {
        double sum = __dadd_rn(__dadd_rn(__dmul_rn((double)pair, a.stride), step_phase), a.source_phase), u = sum - floor(sum);
        for (int k = 0; k < a.replicas; k++) choice += quota[k] <= u;
    }
    if (choice >= a.replicas) return -1;
    int rank = rank_of[choice];
    return rank >= 0 && rank < a.ranks && a.active[rank] ? rank : -1;
}

// A warp numbers up to 32 pairs of one expert, in their order, for each destination from what was counted before.
__device__ void number_found(
    const Args &a, int expert, const double *quota, const int *rank_of, const int *found, int many, int *count, uint2 *pairs, double step_phase
) {
    const int lane = threadIdx.x % 32;
    const unsigned all = __ballot_sync(~0u, lane < many);
    if (lane < many) {
        int i = found[lane], to = destination_of(a, quota, rank_of, i, step_phase);
        unsigned same = __match_any_sync(all, to);
        int index = to < 0 ? 0 : count[to] + __popc(same & ((1u << lane) - 1));
        __syncwarp(all);
        if (to >= 0 && lane == __ffs(same) - 1) count[to] += __popc(same);
        if (to < 0) fail(a, a.ranks, 1);
        pairs[i] = make_uint2((unsigned)expert | (unsigned)(to < 0 ? NOWHERE : to) << 16, (unsigned)index);
    }
    __syncwarp();
}

// A warp numbers the pairs of one expert in the order of the batch, for each destination from 0, and counts them.
__device__ void number_expert(const Args &a, int expert, const Numbering &all, uint2 *pairs, int *counts, double step_phase) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, each = (all.words + 31) / 32;
    double *quota = all.quota + warp * a.replicas;
    int *rank_of = all.rank_of + warp * a.replicas, *count = all.count + warp * a.ranks, *found = all.found + warp * Numbering::FOUND;
    for (int r = lane; r < a.ranks; r += 32) count[r] = 0;
    for (int k = lane; k < a.replicas; k += 32) {
        quota[k] = a.quota[(long long)expert * a.replicas + k];
        rank_of[k] = a.replica_rank[(long long)expert * a.replicas + k];
    }
    // each lane has the pairs of `each` words, and knows how many come before
    const unsigned *chose = all.chose + warp * all.words;
    const int last = min(all.words, (lane + 1) * each);
    int mine = 0;
    for (int w = lane * each; w < last; w++) mine += __popc(chose[w]);
    int upto = mine;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        int below = __shfl_up_sync(~0u, upto, d);
        if (lane >= d) upto += below;
    }
    const int total = __shfl_sync(~0u, upto, 31);
    int next = upto - mine, word = lane * each;
    unsigned left = word < last ? chose[word] : 0;
    for (int begin = 0; begin < total; begin += Numbering::FOUND) {
        const int end = min(total, begin + (int)Numbering::FOUND);
        while (next < end && word < last) {
            for (; left && next < end; left &= left - 1) found[next++ - begin] = word * 32 + __ffs(left) - 1;
            if (!left && ++word < last) left = chose[word];
        }
        __syncwarp();
        for (int k = begin; k < end; k += 32)
            number_found(a, expert, quota, rank_of, found + (k - begin), min(32, end - k), count, pairs, step_phase);
    }
    __syncwarp();
    for (int r = lane; r < a.ranks; r += 32) counts[(long long)r * a.experts + expert] = count[r];
}

// All pairs of this rank, by the first blocks, one expert per warp.
__device__ void number_pairs(const Args &a, void *shared, int blocks, uint2 *pairs, int *counts, u64 stamp) {
    const Numbering all(a, shared);
    const int n = a.tokens * a.top_k, AHEAD = 8;
    const double step_phase = __dmul_rn((double)step_of(stamp), a.step_phase);
    for (int first = blockIdx.x * WARPS; first < a.experts; first += blocks * WARPS) {
        for (int w = threadIdx.x; w < WARPS * all.words; w += THREADS) all.chose[w] = 0;
        __syncthreads();
        for (int base = threadIdx.x; base < n; base += THREADS * AHEAD) {
            long long id[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; j++) id[j] = base + j * THREADS < n ? a.ids[base + j * THREADS] : first - 1;
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const int i = base + j * THREADS;
                if (id[j] >= first && id[j] < first + WARPS) atomicOr(all.chose + (id[j] - first) * all.words + i / 32, 1u << i % 32);
                if (first == 0 && i < n && (id[j] < 0 || id[j] >= a.experts)) {
                    pairs[i] = make_uint2((unsigned)NOWHERE << 16, 0);
                    fail(a, a.ranks, 1);
                }
            }
        }
        __syncthreads();
        const int expert = first + threadIdx.x / 32;
        if (expert < a.experts) number_expert(a, expert, all, pairs, counts, step_phase);
        __syncthreads();
    }
}

// This rank's rows into its region, by blocks `first` and up.
template <class Vec> __device__ void copy_rows(const Args &a, Vec *to, int first) {
    const Vec *from = (const Vec *)a.x;
    const long long vecs = a.tokens * (a.row_bytes / (long long)sizeof(Vec));
    const long long all = (long long)(gridDim.x - first) * THREADS, self = (long long)((int)blockIdx.x - first) * THREADS + threadIdx.x;
    for (long long base = self; base < vecs; base += all * ROWS_IN_FLIGHT) {
        Vec v[ROWS_IN_FLIGHT];
#pragma unroll
        for (int j = 0; j < ROWS_IN_FLIGHT; j++)
            if (base + j * all < vecs) v[j] = from[base + j * all];
#pragma unroll
        for (int j = 0; j < ROWS_IN_FLIGHT; j++)
            if (base + j * all < vecs) to[base + j * all] = v[j];
    }
}

// Everything that peers read of this rank, then the flag, raised by the block that finishes last. True in that block.
template <class Vec> __device__ bool publish(const Args &a, void *shared, u64 stamp) {
    __shared__ bool last;
    char *region = a.region;
    const int wanted = (a.experts + WARPS - 1) / WARPS, numbering = min((int)gridDim.x, wanted);
    const int first_copying = (int)gridDim.x >= 2 * numbering ? numbering : 0;
    if ((int)blockIdx.x < numbering) number_pairs(a, shared, numbering, (uint2 *)(region + a.pairs_at), (int *)(region + a.counts_at), stamp);
    if (a.copy_x && (int)blockIdx.x >= first_copying) copy_rows<Vec>(a, (Vec *)(region + a.x_at), first_copying);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        int *header = (int *)(region + HEADER);
        header[0] = a.tokens;
        header[1] = a.top_k;
        header[2] = (int)a.row_bytes;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        fence();
        last = atomicAdd(a.ticket, 1u) == gridDim.x - 1;
        if (last) {
            *a.ticket = 0;
            fence();
            store_relaxed((u64 *)(region + DISPATCH_FLAG), stamp);
        }
    }
    __syncthreads();
    return last;
}

// start[s, e]: where the pairs of source s for expert e begin among the grouped rows of rank `to`. Writes `offsets` if given.
__device__ void plan(const Args &a, int to, int *start, int *offsets) {
    __shared__ int warp_sum[WARPS];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, AHEAD = 8;
    for (int from = tid; from < a.ranks * a.experts; from += THREADS * AHEAD) {
        int count[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int j = from + i * THREADS, source = j / a.experts, expert = j - source * a.experts;
            count[i] = 0;
            if (source < a.ranks && a.active[source])
                count[i] = __ldcg((const int *)(a.base[source] + a.counts_at) + (long long)to * a.experts + expert);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (from + i * THREADS < a.ranks * a.experts) start[from + i * THREADS] = count[i];
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

// Shared memory: a Numbering, then int start[ranks * experts], first[ranks + 1] in its place.
template <class Vec> __global__ void __launch_bounds__(THREADS, 4) dispatch_kernel(const Args a) {
    extern __shared__ __align__(16) int shared[];
    const u64 stamp = stamp_of(a);
    if (*(volatile unsigned *)a.voided) return;
    if (a.parts & PUBLISH && !publish<Vec>(a, shared, stamp) && !(a.parts & MOVE)) return;
    if (a.parts & WAIT && !wait_for_all(a, DISPATCH_FLAG, stamp)) return;
    if (!(a.parts & MOVE)) return;
    for (int to = blockIdx.x; to < a.ranks; to += gridDim.x) {
        if (!a.active[to]) continue;
        plan(a, to, shared, nullptr);
        for (int e = threadIdx.x; e < a.experts; e += THREADS) a.origin[(long long)to * a.experts + e] = shared[a.me * a.experts + e];
        __syncthreads();
    }
    int *first = shared + a.ranks * a.experts;
    for (int s = threadIdx.x; s < a.ranks; s += THREADS) first[s + 1] = a.active[s] ? __ldcg((const int *)(a.base[s] + HEADER)) : 0;
    plan(a, a.me, shared, blockIdx.x == 0 ? a.offsets : nullptr);
    if (threadIdx.x == 0) {
        first[0] = 0;
        for (int s = 0; s < a.ranks; s++) first[s + 1] += first[s];
        if (blockIdx.x == 0 && a.offsets[a.experts] > a.capacity) fail(a, a.ranks, 2);
    }
    __syncthreads();
    gather<Vec>(a, shared, first);
}

#endif
