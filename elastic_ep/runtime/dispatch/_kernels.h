/* What is done to pairs and rows, without an interpreter. A pair is (row, expert), two int32; a source is whole rows one after the other.
 *
 * Nothing here reads outside what it was given: numbers that came from a peer are checked against limits first. Compile without fused
 * multiply-add. */
#ifndef ELASTIC_EP_KERNELS_H
#define ELASTIC_EP_KERNELS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int32_t pair_t[2];

typedef struct {
    const char *base;
    int64_t num_rows;
} source_t;

/* ---- routing */

/* destination[i] = the rank of the replica that pair i goes to: the first whose cumulative quota exceeds frac(i * stride + step + source).
 * ids [n], replica_rank and quota [experts, width]. Returns -1, or the first pair whose expert does not exist. */
static int64_t route(const int64_t *ids, int64_t n, const int32_t *replica_rank, const double *quota, int64_t experts, int64_t width, double stride,
                     double step, double source, int32_t *destination) {
    for (int64_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= experts) return i;
        int64_t choice = 0;
        if (width > 1) {
            double sum = (double)i * stride + step + source, u = sum - floor(sum);
            for (int64_t k = 0; k < width; k++) choice += quota[ids[i] * width + k] <= u;
        }
        if (choice >= width) return i;
        destination[i] = replica_rank[ids[i] * width + choice];
    }
    return -1;
}

/* Pairs (token, expert) by destination, within one in the order given. pairs, position [n], start [ranks + 1].
 * Returns -1, or the first pair whose destination is no rank. */
static int64_t depart(const int64_t *ids, const int32_t *destination, int64_t n, int64_t top_k, int64_t ranks, pair_t *pairs, int32_t *position,
                      int64_t *start) {
    memset(start, 0, (ranks + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < n; i++) {
        if (destination[i] < 0 || destination[i] >= ranks) return i;
        start[destination[i] + 1]++;
    }
    for (int64_t r = 0; r < ranks; r++) start[r + 1] += start[r];
    for (int64_t i = 0; i < n; i++) {
        int32_t at = (int32_t)start[destination[i]]++;
        pairs[at][0] = (int32_t)(i / top_k);
        pairs[at][1] = (int32_t)ids[i];
        position[i] = at;
    }
    /* each start has moved to its end: move them back */
    for (int64_t r = ranks; r > 0; r--) start[r] = start[r - 1];
    start[0] = 0;
    return -1;
}

/* ---- grouping by expert */

/* Count a source's pairs into counts[expert + 1]. Returns 0 if one names a row that is not there or an expert that is not served. */
static int count_pairs(const pair_t *pairs, int64_t n, int64_t num_rows, const char *served, int64_t experts, int64_t *counts) {
    for (int64_t i = 0; i < n; i++) {
        int32_t row = pairs[i][0], expert = pairs[i][1];
        if (row < 0 || row >= num_rows || expert < 0 || expert >= experts || !served[expert]) return 0;
        counts[expert + 1]++;
    }
    return 1;
}

/* Place a source's pairs. next[expert] is the first free grouped row of each expert and moves on; back gets the place of each pair. */
static void place_pairs(const pair_t *pairs, int64_t n, int32_t source, int64_t *next, int32_t *source_of, int32_t *row_of, int32_t *back) {
    for (int64_t i = 0; i < n; i++) {
        int32_t at = (int32_t)next[pairs[i][1]]++;
        source_of[at] = source;
        row_of[at] = pairs[i][0];
        back[i] = at;
    }
}

/* ---- rows */

/* The address of a row, or NULL if the sources have no such row. */
static inline const char *row_at(const source_t *sources, int64_t count, int32_t source, int32_t row, int64_t row_bytes) {
    if (source < 0 || source >= count || row < 0 || row >= sources[source].num_rows) return NULL;
    return sources[source].base + (int64_t)row * row_bytes;
}

/* out[i] = the row named by (source_of[i], row_of[i]). Returns -1, or the first i without a row. */
static int64_t gather_rows(char *out, const source_t *sources, int64_t count, const int32_t *source_of, const int32_t *row_of, int64_t n,
                           int64_t row_bytes) {
    for (int64_t i = 0; i < n; i++) {
        const char *from = row_at(sources, count, source_of[i], row_of[i], row_bytes);
        if (from == NULL) return i;
        memcpy(out + i * row_bytes, from, row_bytes);
    }
    return -1;
}

#define CHUNK 512 /* columns summed at a time: the partial sums stay in the first-level cache */

static inline float widen(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* Round to nearest, ties to even; every NaN becomes the same one. */
static inline uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (uint16_t)rounded;
}

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("avx2", "default"))) /* the widest registers that the processor has; the same bits */
#else
#define FOR_EACH_CPU
#endif

static void add_float(float *restrict sum, const float *restrict row, float weight, int64_t n, int first) {
    if (first)
        for (int64_t j = 0; j < n; j++) sum[j] = weight * row[j];
    else
        for (int64_t j = 0; j < n; j++) sum[j] += weight * row[j];
}

static void add_half(float *restrict sum, const uint16_t *restrict row, float weight, int64_t n, int first) {
    if (first)
        for (int64_t j = 0; j < n; j++) sum[j] = weight * widen(row[j]);
    else
        for (int64_t j = 0; j < n; j++) sum[j] += weight * widen(row[j]);
}

/* One token: its K rows, added in list order. */
FOR_EACH_CPU static void sum_token(char *out, const char *const *rows, const float *weights, int64_t top_k, int64_t hidden, int is_half) {
    float sum[CHUNK];
    for (int64_t start = 0; start < hidden; start += CHUNK) {
        int64_t n = hidden - start < CHUNK ? hidden - start : CHUNK;
        for (int64_t k = 0; k < top_k; k++) {
            if (is_half)
                add_half(sum, (const uint16_t *)rows[k] + start, weights[k], n, k == 0);
            else
                add_float(sum, (const float *)rows[k] + start, weights[k], n, k == 0);
        }
        if (is_half)
            for (int64_t j = 0; j < n; j++) ((uint16_t *)out)[start + j] = narrow(sum[j]);
        else
            memcpy((float *)out + start, sum, n * sizeof(float));
    }
}

/* out[t] = sum over k in order of weights[t, k] * the row of pair position[t, k]. rows is scratch [top_k]. Returns -1, or the first (t, k)
 * without a row. */
static int64_t sum_rows(char *out, const source_t *sources, int64_t count, const int32_t *source_of, const int32_t *row_of, const int32_t *position,
                        const float *weights, int64_t tokens, int64_t top_k, int64_t hidden, int is_half, const char **rows) {
    int64_t row_bytes = hidden * (is_half ? 2 : 4), pairs = tokens * top_k;
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t k = 0; k < top_k; k++) {
            int32_t at = position[t * top_k + k];
            if (at < 0 || at >= pairs) return t * top_k + k;
            rows[k] = row_at(sources, count, source_of[at], row_of[at], row_bytes);
            if (rows[k] == NULL) return t * top_k + k;
        }
        sum_token(out + t * row_bytes, rows, weights + t * top_k, top_k, hidden, is_half);
    }
    return -1;
}

#endif
