// What dispatch and combine share: memory, flags, waiting.
//
// A rank writes only its own region and private buffers; it reads its peers' regions, which are mapped by CUDA IPC. So a process that was
// declared dead and wakes up can change nothing that others read.
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
// raises after its combine of l. x may be written before its dispatch is launched, by a kernel after the combine of the layer before, also
// in a void step, where a peer may still read: what it makes of these rows is of our tokens only, and neither step can hold.
//
// A block that waits holds registers which another rank on the same GPU may need to get on with what is being waited for. So a rank that
// shares its GPU moves rows in a kernel of its own, and a single block waits in the one before; so do large batches, where the many
// blocks of a single kernel hinder each other while they wait.
#ifndef ELASTIC_EP_COMMON_CUH
#define ELASTIC_EP_COMMON_CUH

#include <cuda_runtime.h>
#include <stdint.h>

typedef unsigned long long u64;

enum { THREADS = 256, WARPS = THREADS / 32, ROWS_IN_FLIGHT = 4, TERMS_IN_FLIGHT = 4, NOWHERE = 0xffff };
enum { DISPATCH_FLAG = 0, COMBINE_FLAG = 128, HEADER = 256 };
enum Parts { PUBLISH = 1, WAIT = 2, MOVE = 4 };
enum Failure { NONE = 0, DEADLINE = 1, CLOSED = 2, PROTOCOL = 3, QUIET = 4 };

struct Args {
    char *region;             // this rank's
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
__device__ __forceinline__ u64 load_relaxed(const u64 *p) {
    u64 v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
// What this thread wrote, and what it saw others to have written, before what it writes from here on.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
__device__ __forceinline__ void store_relaxed(u64 *p, u64 v) { asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory"); }
__device__ __forceinline__ u64 now_ns() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
__device__ __forceinline__ u64 stamp_of(const Args &a) { return ((a.clock[0] << 44) | (a.clock[1] << 12) | (u64)a.layer) + 1; }
__device__ __forceinline__ u64 step_of(u64 stamp) { return (stamp - 1) >> 12 & 0xffffffff; }

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
        // an acquiring load empties the first-level cache for all blocks beside this one: only once it is worth it
        if (load_relaxed(flag) == stamp && load_acquire(flag) == stamp) return NONE;
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
        const char *region = a.base[r];
        if (!a.active[r]) continue;
        how = wait_for(a, (const u64 *)(region + flag_at), stamp, a.cut + r);
        if (how == NONE && flag_at == DISPATCH_FLAG) {
            const int *header = (const int *)(region + HEADER);
            int tokens = __ldcg(header);
            bool fits = tokens >= 0 && tokens <= a.max_tokens && __ldcg(header + 1) == a.top_k && __ldcg(header + 2) == (int)a.row_bytes;
            if (!fits) how = PROTOCOL;
        }
        if (how != NONE && how != QUIET) fail(a, r, how);
    }
    return !__syncthreads_or(how != NONE);
}

#endif
