// Combine: say that the experts' outputs are there, wait for the peers', sum each token's in the order of its top-k list.
#ifndef ELASTIC_EP_COMBINE_CUH
#define ELASTIC_EP_COMBINE_CUH

#include "common.cuh"

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
    const uint2 *pairs = (const uint2 *)(a.region + a.pairs_at);
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

template <class Vec, bool bf16> __global__ void __launch_bounds__(THREADS, 4) combine_kernel(const Args a) {
    const u64 stamp = stamp_of(a);
    if (*(volatile unsigned *)a.voided) return;
    if (a.parts & PUBLISH && blockIdx.x == 0 && threadIdx.x == 0) {
        // the experts wrote y in earlier kernels of this stream
        fence();
        store_relaxed((u64 *)(a.region + COMBINE_FLAG), stamp);
    }
    if (a.parts & WAIT && !wait_for_all(a, COMBINE_FLAG, stamp)) return;
    if (a.parts & MOVE) sum_pairs<Vec, bf16>(a);
}

#endif
