/* out = x @ weight for groups of rows, each with its own weight. Included once per instruction set, after _attention.h's macros.

   One output element is a fixed sequence of operations on its row and its column: weights stored [out, in] are summed in 8 lanes
   (lane j takes k = j mod 8, ascending, fma), the lanes in a fixed tree; weights stored [in, out] are summed by fma over k ascending.
   How many rows go through a kernel together changes no bit. */

#define NAME2(a, b) a##b
#define NAME1(a, b) NAME2(a, b)
#define NAME(a) NAME1(a, SUFFIX)
#define INLINE static inline __attribute__((always_inline)) TARGET

INLINE V8 NAME(load_f32)(const void *p, size_t i) { return *(const V8U *)((const float *)p + i); }
INLINE V8 NAME(load_bf16)(const void *p, size_t i) {
    return (V8)(__builtin_convertvector(*(const H8U *)((const uint16_t *)p + i), I8) << 16);
}
INLINE V8 NAME(tail_f32)(const void *p, size_t i, int n) {
    float lanes[8] = {0};
    for (int j = 0; j < n; j++) lanes[j] = ((const float *)p)[i + j];
    return *(V8U *)lanes;
}
INLINE V8 NAME(tail_bf16)(const void *p, size_t i, int n) {
    uint16_t lanes[8] = {0};
    for (int j = 0; j < n; j++) lanes[j] = ((const uint16_t *)p)[i + j];
    return (V8)(__builtin_convertvector(*(H8U *)lanes, I8) << 16);
}
INLINE float NAME(sum_lanes)(V8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

/* R rows of x against N rows of the weight ([out, in]) -> y[r * out + n]. `ahead`: ask for the weight rows after these. */
#define DEFINE_DOTS(R, N, T, SIZE)                                                                                                  \
    INLINE void NAME(dots##R##x##N##_##T)(const float *x, const char *w, int in, int out, float *y, int ahead) {                    \
        V8 acc[R][N];                                                                                                               \
        UNROLL for (int r = 0; r < (R); r++) UNROLL for (int n = 0; n < (N); n++) acc[r][n] = SPLAT(0.0f);                          \
        int k = 0;                                                                                                                  \
        for (; k + 8 <= in; k += 8) {                                                                                               \
            V8 b[N];                                                                                                                \
            if (ahead && k % (64 / SIZE) == 0)                                                                                      \
                UNROLL for (int n = 0; n < (N); n++) __builtin_prefetch(w + ((size_t)(n + (N)) * in + k) * SIZE);                   \
            UNROLL for (int n = 0; n < (N); n++) b[n] = NAME(load_##T)(w + (size_t)n * in * SIZE, k);                               \
            UNROLL for (int r = 0; r < (R); r++) {                                                                                  \
                V8 a = *(const V8U *)(x + (size_t)r * in + k);                                                                      \
                UNROLL for (int n = 0; n < (N); n++) acc[r][n] = VFMA(a, b[n], acc[r][n]);                                          \
            }                                                                                                                       \
        }                                                                                                                           \
        if (k < in)                                                                                                                 \
            for (int r = 0; r < (R); r++) {                                                                                         \
                V8 a = NAME(tail_f32)(x + (size_t)r * in, k, in - k);                                                               \
                for (int n = 0; n < (N); n++)                                                                                       \
                    acc[r][n] = VFMA(a, NAME(tail_##T)(w + (size_t)n * in * SIZE, k, in - k), acc[r][n]);                           \
            }                                                                                                                       \
        UNROLL for (int r = 0; r < (R); r++)                                                                                        \
            UNROLL for (int n = 0; n < (N); n++) y[(size_t)r * out + n] = NAME(sum_lanes)(acc[r][n]);                               \
    }

/* R rows (R < 4) against a block of 12 columns, or against one column. */
#define DEFINE_FEW(R, T, SIZE)                                                                                                      \
    DEFINE_DOTS(R, 4, T, SIZE)                                                                                                      \
    DEFINE_DOTS(R, 1, T, SIZE)                                                                                                      \
    INLINE void NAME(few##R##_##T)(const float *x, const char *w, int in, int out, int columns, float *y, int ahead) {              \
        int n = 0;                                                                                                                  \
        for (; n + 4 <= columns; n += 4) NAME(dots##R##x4_##T)(x, w + (size_t)n * in * SIZE, in, out, y + n, ahead);                \
        for (; n < columns; n++) NAME(dots##R##x1_##T)(x, w + (size_t)n * in * SIZE, in, out, y + n, 0);                            \
    }

/* Blocks of 12 columns, whose weights stay in the first caches while all rows pass: 4 rows x 3 columns fill the registers. */
#define DEFINE_OUT_IN(T, SIZE)                                                                                                      \
    DEFINE_DOTS(4, 3, T, SIZE)                                                                                                      \
    DEFINE_DOTS(4, 1, T, SIZE)                                                                                                      \
    DEFINE_FEW(3, T, SIZE)                                                                                                          \
    DEFINE_FEW(2, T, SIZE)                                                                                                          \
    DEFINE_FEW(1, T, SIZE)                                                                                                          \
    TARGET static void NAME(out_in_##T)(const float *x, int rows, const char *w, int in, int columns, int out, float *y) {          \
        int quads = rows / 4 * 4, rest = rows - quads;                                                                              \
        const float *last = x + (size_t)quads * in;                                                                                 \
        for (int n = 0; n < columns; n += 12) {                                                                                     \
            int width = columns - n < 12 ? columns - n : 12, i = 0;                                                                 \
            for (; i + 3 <= width; i += 3) {                                                                                        \
                const char *wn = w + (size_t)(n + i) * in * SIZE;                                                                   \
                if (quads) NAME(dots4x3_##T)(x, wn, in, out, y + n + i, 1);                                                         \
                for (int m = 4; m < quads; m += 4)                                                                                  \
                    NAME(dots4x3_##T)(x + (size_t)m * in, wn, in, out, y + (size_t)m * out + n + i, 0);                             \
            }                                                                                                                       \
            for (; i < width; i++)                                                                                                  \
                for (int m = 0; m < quads; m += 4)                                                                                  \
                    NAME(dots4x1_##T)(x + (size_t)m * in, w + (size_t)(n + i) * in * SIZE, in, out, y + (size_t)m * out + n + i, 0);\
            const char *wn = w + (size_t)n * in * SIZE;                                                                             \
            float *yn = y + (size_t)quads * out + n;                                                                                \
            if (rest == 3) NAME(few3_##T)(last, wn, in, out, width, yn, !quads);                                                    \
            if (rest == 2) NAME(few2_##T)(last, wn, in, out, width, yn, !quads);                                                    \
            if (rest == 1) NAME(few1_##T)(last, wn, in, out, width, yn, !quads);                                                    \
        }                                                                                                                           \
    }
DEFINE_OUT_IN(f32, 4)
DEFINE_OUT_IN(bf16, 2)

/* R rows against a weight stored [in, out]: y += x[k] * w[k], a few k at a time so that the weight is read in its own order. */
#define DEFINE_AXPY(R, T, SIZE)                                                                                                     \
    INLINE void NAME(axpy##R##_##T)(const float *x, const char *w, int in, int out, float *y) {                                     \
        for (int r = 0; r < (R); r++) memset(y + (size_t)r * out, 0, sizeof(float) * out);                                          \
        for (int k0 = 0; k0 < in; k0 += 8) {                                                                                        \
            int k1 = k0 + 8 < in ? k0 + 8 : in, n = 0;                                                                              \
            for (; n + 16 <= out; n += 16) {                                                                                        \
                V8 acc[R][2];                                                                                                       \
                UNROLL for (int r = 0; r < (R); r++) UNROLL for (int i = 0; i < 2; i++)                                             \
                    acc[r][i] = *(V8U *)(y + (size_t)r * out + n + 8 * i);                                                          \
                for (int k = k0; k < k1; k++) {                                                                                     \
                    V8 a = NAME(load_##T)(w + (size_t)k * out * SIZE, n), b = NAME(load_##T)(w + (size_t)k * out * SIZE, n + 8);    \
                    UNROLL for (int r = 0; r < (R); r++) {                                                                          \
                        V8 s = SPLAT(x[(size_t)r * in + k]);                                                                        \
                        acc[r][0] = VFMA(s, a, acc[r][0]);                                                                          \
                        acc[r][1] = VFMA(s, b, acc[r][1]);                                                                          \
                    }                                                                                                               \
                }                                                                                                                   \
                UNROLL for (int r = 0; r < (R); r++) UNROLL for (int i = 0; i < 2; i++)                                             \
                    *(V8U *)(y + (size_t)r * out + n + 8 * i) = acc[r][i];                                                          \
            }                                                                                                                       \
            for (; n < out; n++)                                                                                                    \
                for (int r = 0; r < (R); r++)                                                                                       \
                    for (int k = k0; k < k1; k++)                                                                                   \
                        y[(size_t)r * out + n] = __builtin_fmaf(x[(size_t)r * in + k],                                              \
                                                                NAME(tail_##T)(w + (size_t)k * out * SIZE, n, 1)[0],                \
                                                                y[(size_t)r * out + n]);                                            \
        }                                                                                                                           \
    }
#define DEFINE_IN_OUT(T, SIZE)                                                                                                      \
    DEFINE_AXPY(4, T, SIZE) DEFINE_AXPY(1, T, SIZE)                                                                                 \
    TARGET static void NAME(in_out_##T)(const float *x, int rows, const char *w, int in, int out, float *y) {                       \
        int m = 0;                                                                                                                  \
        for (; m + 4 <= rows; m += 4) NAME(axpy4_##T)(x + (size_t)m * in, w, in, out, y + (size_t)m * out);                         \
        for (; m < rows; m++) NAME(axpy1_##T)(x + (size_t)m * in, w, in, out, y + (size_t)m * out);                                 \
    }
DEFINE_IN_OUT(f32, 4)
DEFINE_IN_OUT(bf16, 2)

TARGET static void NAME(multiply)(const struct product *p, const float *x, int rows, const char *weight, float *y) {
    const int in = p->in, out = p->out;
    if (p->is_in_out) {
        if (p->is_bf16) NAME(in_out_bf16)(x, rows, weight, in, out, y);
        else NAME(in_out_f32)(x, rows, weight, in, out, y);
    } else if (!p->is_bf16) NAME(out_in_f32)(x, rows, weight, in, out, out, y);
    else if (rows < WIDEN_ROWS) NAME(out_in_bf16)(x, rows, weight, in, out, out, y);
    else /* many rows: widening a stretch of the weight once is cheaper than in every product; the numbers are the same */
        for (int n = 0; n < out; n += p->stretch) {
            int columns = out - n < p->stretch ? out - n : p->stretch;
            size_t count = (size_t)columns * in, from = (size_t)n * in, i = 0;
            for (; i + 8 <= count; i += 8) *(V8 *)(p->wide + i) = NAME(load_bf16)(weight, from + i);
            for (; i < count; i++) p->wide[i] = NAME(tail_bf16)(weight, from + i, 1)[0];
            NAME(out_in_f32)(x, rows, (const char *)p->wide, in, columns, out, y + n);
        }
}

#undef DEFINE_DOTS
#undef DEFINE_FEW
#undef DEFINE_OUT_IN
#undef DEFINE_AXPY
#undef DEFINE_IN_OUT
#undef INLINE
#undef NAME
#undef NAME1
#undef NAME2
