/* Attention of single queries over paged float32 keys and values. Included once per instruction set: TARGET is a function attribute,
   VFMA(a, b, c) = a * b + c rounded once per lane, SUFFIX makes names unique.

   A query's result is a fixed sequence of operations on that query, its keys in order of position, and the head sizes. Which other
   queries share the call, and how many of them go through a kernel together, changes which instruction computes a number, never the
   number: score = fma over d ascending; per tile of TILE keys (absolute positions) a running maximum; the sum of the tile's weights in a
   fixed tree; output = fma over keys ascending. */

#define NAME2(a, b) a##b
#define NAME1(a, b) NAME2(a, b)
#define NAME(a) NAME1(a, SUFFIX)
#define INLINE static inline __attribute__((always_inline)) TARGET

/* e^x for x <= 0, 0 below -87. Cody-Waite reduction, degree 7 polynomial; error under 2 ulp. */
INLINE V8 NAME(exp8)(V8 x) {
    const V8 magic = SPLAT(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    I8 keep = x > SPLAT(-87.0f);
    x = (V8)((I8)x & keep); /* lanes below the range compute e^0, zeroed at the end */
    V8 n = VFMA(x, SPLAT(1.44269504088896341f), magic) - magic;
    V8 r = VFMA(n, SPLAT(-0.693145751953125f), x);
    r = VFMA(n, SPLAT(-1.42860682030941723212e-6f), r);
    V8 p = VFMA(SPLAT(1.9875691500e-4f), r, SPLAT(1.3981999507e-3f));
    p = VFMA(p, r, SPLAT(8.3334519073e-3f));
    p = VFMA(p, r, SPLAT(4.1665795894e-2f));
    p = VFMA(p, r, SPLAT(1.6666665459e-1f));
    p = VFMA(p, r, SPLAT(5.0000001201e-1f));
    p = VFMA(p, r * r, r) + SPLAT(1.0f);
    I8 exponent = (__builtin_convertvector(n, I8) + 127) << 23;
    return (V8)((I8)(p * (V8)exponent) & keep);
}

/* scores[r][0..TILE) = q[r] . key, for R queries over one tile of keys stored as [D][TILE]. W vectors of keys at a time. */
#define DEFINE_SCORES(R, W)                                                                                                      \
    INLINE void NAME(scores##R)(const float *const *q, const float *keys, int dim, float scale, float (*scores)[TILE]) {         \
        for (int first = 0; first < TILE; first += 8 * (W)) {                                                                    \
            V8 acc[R][W];                                                                                                        \
            UNROLL for (int r = 0; r < (R); r++) UNROLL for (int w = 0; w < (W); w++) acc[r][w] = SPLAT(0.0f);                   \
            for (int d = 0; d < dim; d++) {                                                                                      \
                const V8 *k = (const V8 *)(keys + (size_t)d * TILE + first);                                                     \
                UNROLL for (int r = 0; r < (R); r++) {                                                                           \
                    V8 x = SPLAT(q[r][d]);                                                                                       \
                    UNROLL for (int w = 0; w < (W); w++) acc[r][w] = VFMA(x, k[w], acc[r][w]);                                   \
                }                                                                                                                \
            }                                                                                                                    \
            UNROLL for (int r = 0; r < (R); r++)                                                                                 \
                UNROLL for (int w = 0; w < (W); w++) *(V8 *)(scores[r] + first + 8 * w) = acc[r][w] * SPLAT(scale);              \
        }                                                                                                                        \
    }
DEFINE_SCORES(4, 2)
DEFINE_SCORES(1, 8)

/* out[r][0..dim) += sum over keys lo..hi ascending of weights[r][key] * values[key]. dim is a multiple of 8. */
#define DEFINE_VALUES(R)                                                                                                         \
    INLINE void NAME(values##R)(float (*weights)[TILE], const float *values, int dim, int lo, int hi, float *const *out) {       \
        int first = 0;                                                                                                           \
        for (; first + 16 <= dim; first += 16) {                                                                                 \
            V8 acc[R][2];                                                                                                        \
            UNROLL for (int r = 0; r < (R); r++) {                                                                               \
                acc[r][0] = *(V8 *)(out[r] + first);                                                                             \
                acc[r][1] = *(V8 *)(out[r] + first + 8);                                                                         \
            }                                                                                                                    \
            for (int j = lo; j < hi; j++) {                                                                                      \
                V8 a = *(const V8 *)(values + (size_t)j * dim + first), b = *(const V8 *)(values + (size_t)j * dim + first + 8); \
                UNROLL for (int r = 0; r < (R); r++) {                                                                           \
                    V8 x = SPLAT(weights[r][j]);                                                                                 \
                    acc[r][0] = VFMA(x, a, acc[r][0]);                                                                           \
                    acc[r][1] = VFMA(x, b, acc[r][1]);                                                                           \
                }                                                                                                                \
            }                                                                                                                    \
            UNROLL for (int r = 0; r < (R); r++) {                                                                               \
                *(V8 *)(out[r] + first) = acc[r][0];                                                                             \
                *(V8 *)(out[r] + first + 8) = acc[r][1];                                                                         \
            }                                                                                                                    \
        }                                                                                                                        \
        for (; first < dim; first += 8)                                                                                          \
            for (int r = 0; r < (R); r++) {                                                                                      \
                V8 acc = *(V8 *)(out[r] + first);                                                                                \
                for (int j = lo; j < hi; j++)                                                                                    \
                    acc = VFMA(SPLAT(weights[r][j]), *(const V8 *)(values + (size_t)j * dim + first), acc);                      \
                *(V8 *)(out[r] + first) = acc;                                                                                   \
            }                                                                                                                    \
    }
DEFINE_VALUES(4)
DEFINE_VALUES(1)

/* Turn one row of scores into weights, and fold the tile into the row's running maximum, sum and output. */
INLINE void NAME(softmax)(float *scores, int lo, int hi, float *maximum, float *sum, float *out, int dim) {
    for (int j = 0; j < lo; j++) scores[j] = -INFINITY;
    for (int j = hi; j < TILE; j++) scores[j] = -INFINITY;
    float top = *maximum;
    for (int j = lo; j < hi; j++) top = scores[j] > top ? scores[j] : top;
    V8 shift = SPLAT(top), total = SPLAT(0.0f);
    for (int j = 0; j < TILE; j += 8) {
        V8 w = NAME(exp8)(*(V8 *)(scores + j) - shift);
        *(V8 *)(scores + j) = w;
        total = total + w;
    }
    float part = ((total[0] + total[4]) + (total[2] + total[6])) + ((total[1] + total[5]) + (total[3] + total[7]));
    if (*maximum != top) {
        V8 decay = NAME(exp8)(SPLAT(*maximum - top));
        for (int d = 0; d < dim; d += 8) *(V8 *)(out + d) = *(V8 *)(out + d) * decay;
        *sum = *sum * decay[0];
        *maximum = top;
    }
    *sum = *sum + part;
}

/* One run of consecutive queries of one sequence, one KV head: rows are (query, head of the group). */
TARGET static void NAME(attend_run)(const struct call *c, const struct run *run, int kv_head, struct scratch *s) {
    int group = c->num_heads / c->num_kv_heads, block = ROWS / group > 0 ? ROWS / group : 1;
    for (int first = 0; first < run->count; first += block) {
        int queries = run->count - first < block ? run->count - first : block, rows = queries * group;
        int last_position = run->start + first + queries - 1, first_key = run->start + first - c->window + 1;
        if (c->window == 0 || first_key < 0) first_key = 0;
        for (int i = 0; i < rows; i++) {
            int head = kv_head * group + i % group;
            size_t row = (size_t)(run->first_row + first + i / group) * c->num_heads + head;
            int position = run->start + first + i / group;
            s->q[i] = c->q + row * c->key_dim;
            s->out[i] = s->acc + (size_t)i * c->padded_value_dim;
            s->end[i] = position + 1;
            s->begin[i] = c->window > 0 && position + 1 > c->window ? position + 1 - c->window : 0;
            s->maximum[i] = c->sinks ? c->sinks[head] : -INFINITY;
            s->sum[i] = c->sinks ? 1.0f : 0.0f;
            memset(s->out[i], 0, sizeof(float) * c->padded_value_dim);
        }
        for (int tile = first_key / TILE; tile * TILE <= last_position; tile++) {
            const float *keys = c->pool + (size_t)run->pages[tile] * c->page_stride + c->layer_offset + (size_t)kv_head * c->head_stride;
            const float *values = keys + (size_t)c->key_dim * TILE;
            for (int i = 0; i < rows;) {
                int lo = s->begin[i] - tile * TILE, hi = s->end[i] - tile * TILE;
                lo = lo < 0 ? 0 : lo;
                hi = hi > TILE ? TILE : hi;
                if (lo >= hi) {
                    i++;
                    continue;
                }
                int alike = i + 4 <= rows; /* four rows that see the same keys of this tile share the loads */
                for (int r = 1; alike && r < 4; r++) {
                    int l = s->begin[i + r] - tile * TILE, h = s->end[i + r] - tile * TILE;
                    alike = (l < 0 ? 0 : l) == lo && (h > TILE ? TILE : h) == hi;
                }
                int n = alike ? 4 : 1;
                if (alike) NAME(scores4)(s->q + i, keys, c->key_dim, c->scale, s->scores);
                else NAME(scores1)(s->q + i, keys, c->key_dim, c->scale, s->scores);
                for (int r = 0; r < n; r++)
                    NAME(softmax)(s->scores[r], lo, hi, s->maximum + i + r, s->sum + i + r, s->out[i + r], c->padded_value_dim);
                if (alike) NAME(values4)(s->scores, values, c->padded_value_dim, lo, hi, s->out + i);
                else NAME(values1)(s->scores, values, c->padded_value_dim, lo, hi, s->out + i);
                i += n;
            }
        }
        for (int i = 0; i < rows; i++) {
            size_t row = (size_t)(run->first_row + first + i / group) * c->num_heads + kv_head * group + i % group;
            for (int d = 0; d < c->value_dim; d++) c->out[row * c->value_dim + d] = s->out[i][d] / s->sum[i];
        }
    }
}

#undef DEFINE_SCORES
#undef DEFINE_VALUES
#undef INLINE
#undef NAME
#undef NAME1
#undef NAME2
