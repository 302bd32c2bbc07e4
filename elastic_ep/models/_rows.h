/* Row by row: root mean square norm, and the gate of a SwiGLU. Included once per instruction set, after _attention.h and _matmul.h. */

#define NAME2(a, b) a##b
#define NAME1(a, b) NAME2(a, b)
#define NAME(a) NAME1(a, SUFFIX)
#define INLINE static inline __attribute__((always_inline)) TARGET

INLINE V8 NAME(load_some)(const void *p, size_t i, int n, int is_bf16) {
    if (n == 8) return is_bf16 ? NAME(load_bf16)(p, i) : NAME(load_f32)(p, i);
    return is_bf16 ? NAME(tail_bf16)(p, i, n) : NAME(tail_f32)(p, i, n);
}

/* Nearest bfloat16 of each lane, ties to even, as float32; a NaN stays one. */
INLINE V8 NAME(round_bf16)(V8 x) {
    I8 bits = (I8)x, odd = (bits >> 16) & 1;
    I8 rounded = (bits + 0x7fff + odd) & (I8){-65536, -65536, -65536, -65536, -65536, -65536, -65536, -65536};
    I8 is_nan = x != x;
    return (V8)((rounded & ~is_nan) | (bits & is_nan));
}

INLINE void NAME(store_some)(void *p, size_t i, int n, V8 x, int is_bf16) {
    if (is_bf16) {
        H8U halves = __builtin_convertvector((U8)x >> 16, H8U);
        if (n == 8) *(H8U *)((uint16_t *)p + i) = halves;
        else
            for (int j = 0; j < n; j++) ((uint16_t *)p)[i + j] = halves[j];
    } else if (n == 8) *(V8U *)((float *)p + i) = x;
    else
        for (int j = 0; j < n; j++) ((float *)p)[i + j] = x[j];
}

/* out = x / sqrt(mean(x^2) + eps) * weight. Squares are summed in 8 lanes by fma, the lanes in a fixed tree. bfloat16 is rounded after
   the division and after the weight, or only at the end. */
INLINE void NAME(norm_rows)(const struct norm *c, int is_bf16) {
    for (int row = 0; row < c->rows; row++) {
        size_t at = (size_t)row * c->dim;
        V8 squares = SPLAT(0.0f);
        for (int d = 0; d < c->dim; d += 8) {
            V8 x = NAME(load_some)(c->x, at + d, c->dim - d < 8 ? c->dim - d : 8, is_bf16);
            squares = VFMA(x, x, squares);
        }
        V8 inverse = SPLAT(1.0f / sqrtf(NAME(sum_lanes)(squares) / (float)c->dim + c->eps));
        for (int d = 0; d < c->dim; d += 8) {
            int n = c->dim - d < 8 ? c->dim - d : 8;
            V8 y = NAME(load_some)(c->x, at + d, n, is_bf16) * inverse;
            if (is_bf16 && !c->rounds_last) y = NAME(round_bf16)(y);
            y = y * NAME(load_some)(c->weight, d, n, is_bf16);
            NAME(store_some)(c->out, at + d, n, is_bf16 ? NAME(round_bf16)(y) : y, is_bf16);
        }
    }
}
TARGET static void NAME(norm)(const struct norm *c) {
    if (c->is_bf16) NAME(norm_rows)(c, 1);
    else NAME(norm_rows)(c, 0);
}

/* out[row] = silu(x[row][0..dim)) * x[row][dim..2 dim). bfloat16 is rounded after each of the two. */
INLINE void NAME(swiglu_rows)(const void *x, void *out, int rows, int dim, int is_bf16) {
    for (int row = 0; row < rows; row++)
        for (int d = 0; d < dim; d += 8) {
            int n = dim - d < 8 ? dim - d : 8;
            V8 gate = NAME(load_some)(x, (size_t)row * 2 * dim + d, n, is_bf16);
            V8 up = NAME(load_some)(x, (size_t)row * 2 * dim + dim + d, n, is_bf16);
            I8 negative = gate < SPLAT(0.0f);
            V8 small = NAME(exp8)((V8)((I8)gate | (I8)SPLAT(-0.0f))); /* e^-|gate| */
            V8 top = (V8)(((I8)small & negative) | ((I8)SPLAT(1.0f) & ~negative));
            V8 y = gate * (top / (SPLAT(1.0f) + small));
            if (is_bf16) y = NAME(round_bf16)(y);
            y = y * up;
            NAME(store_some)(out, (size_t)row * dim + d, n, is_bf16 ? NAME(round_bf16)(y) : y, is_bf16);
        }
}
TARGET static void NAME(swiglu)(const void *x, void *out, int rows, int dim, int is_bf16) {
    if (is_bf16) NAME(swiglu_rows)(x, out, rows, dim, 1);
    else NAME(swiglu_rows)(x, out, rows, dim, 0);
}

#undef INLINE
#undef NAME
#undef NAME1
#undef NAME2
