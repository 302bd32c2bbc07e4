// Dispatch: number the pairs, publish, wait, plan where each row goes, fetch the rows.
#ifndef ELASTIC_EP_DISPATCH_CUH
#define ELASTIC_EP_DISPATCH_CUH

#include "common.cuh"

// What one block needs to number pairs, in shared memory: the ids of all pairs, and for each warp its expert's replicas and counters.
struct Numbering {
    double *quota;        // [warps, replicas]
    int *rank_of;         // [warps, replicas]
    int *count;           // [warps, ranks]
    unsigned short *ids;  // [tokens * top_k], NOWHERE for an id that does not exist
    static __host__ __device__ size_t bytes(const Args &a) {
        return WARPS * ((size_t)a.replicas * 12 + (size_t)a.ranks * 4) + (size_t)a.tokens * a.top_k * 2;
    }
    __device__ Numbering(const Args &a, void *shared)
        : quota((double *)shared), rank_of((int *)(quota + WARPS * a.replicas)), count(rank_of + WARPS * a.replicas),
          ids((unsigned short *)(count + WARPS * a.ranks)) {}
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

// A warp numbers the pairs of one expert in the order of the batch, for each destination from 0, and counts them.
__device__ void number_expert(const Args &a, int expert, const Numbering &all, uint2 *pairs, int *counts, double step_phase) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = a.tokens * a.top_k, AHEAD = 8;
    double *quota = all.quota + warp * a.replicas;
    int *rank_of = all.rank_of + warp * a.replicas, *count = all.count + warp * a.ranks;
    for (int r = lane; r < a.ranks; r += 32) count[r] = 0;
    for (int k = lane; k < a.replicas; k += 32) {
        quota[k] = a.quota[(long long)expert * a.replicas + k];
        rank_of[k] = a.replica_rank[(long long)expert * a.replicas + k];
    }
    __syncwarp();
    for (int base = 0; base < n; base += 32 * AHEAD) {
        int id[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) id[j] = base + 32 * j + lane < n ? all.ids[base + 32 * j + lane] : (int)NOWHERE;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            bool match = id[j] == expert;
            unsigned matching = __ballot_sync(~0u, match);
            if (!matching) continue;
            if (match) {
                int i = base + 32 * j + lane, to = destination_of(a, quota, rank_of, i, step_phase);
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

// All pairs of this rank, by the first blocks, one expert per warp.
__device__ void number_pairs(const Args &a, void *shared, int blocks, uint2 *pairs, int *counts) {
    const Numbering all(a, shared);
    const int n = a.tokens * a.top_k;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        long long id = a.ids[i];
        bool exists = id >= 0 && id < a.experts;
        all.ids[i] = (unsigned short)(exists ? id : NOWHERE);
        if (!exists && blockIdx.x == 0) {
            pairs[i] = make_uint2((unsigned)NOWHERE << 16, 0);
            fail(a, a.ranks, 1);
        }
    }
    __syncthreads();
    double step_phase = __dmul_rn((double)a.clock[1], a.step_phase);
    for (int e = blockIdx.x * WARPS + threadIdx.x / 32; e < a.experts; e += blocks * WARPS)
        number_expert(a, e, all, pairs, counts, step_phase);
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

// Everything that peers read of this rank, then the flag, raised by the block that finishes last.
template <class Vec> __device__ void publish(const Args &a, void *shared, u64 stamp) {
    char *region = a.base[a.me];
    const int wanted = (a.experts + WARPS - 1) / WARPS, numbering = min((int)gridDim.x, wanted);
    const int first_copying = (int)gridDim.x >= 2 * numbering ? numbering : 0;
    if ((int)blockIdx.x < numbering) number_pairs(a, shared, numbering, (uint2 *)(region + a.pairs_at), (int *)(region + a.counts_at));
    if (a.copy_x && (int)blockIdx.x >= first_copying) copy_rows<Vec>(a, (Vec *)(region + a.x_at), first_copying);
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

// Shared memory: a Numbering, then int start[ranks * experts], first[ranks + 1] in its place.
template <class Vec> __global__ void __launch_bounds__(THREADS, 4) dispatch_kernel(const Args a) {
    extern __shared__ __align__(16) int shared[];
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

#endif
