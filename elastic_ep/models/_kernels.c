/* Kernels whose result for one row never depends on the other rows of the call. Called from kv.py with addresses as integers; the caller
   vouches for shapes and lifetimes. The GIL is released while they run. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define TILE 64 /* keys per tile and tokens per page; kv.py reads it from here */
#define ROWS 64 /* (query, head) rows that walk the tiles together */
#define BLOCK_FLOATS (1 << 15) /* inputs of one block of rows in matmul, and of one stretch of widened weights */
#define WIDEN_ROWS 12
#define UNROLL _Pragma("GCC unroll 8")

typedef float V8 __attribute__((vector_size(32), may_alias));
typedef uint32_t U8 __attribute__((vector_size(32), may_alias));
typedef int32_t I8 __attribute__((vector_size(32), may_alias));
typedef float V8U __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t H8U __attribute__((vector_size(16), aligned(2), may_alias));
#define SPLAT(x) ((V8){(x), (x), (x), (x), (x), (x), (x), (x)})

struct run { /* consecutive tokens of one sequence */
    int first_row, count, start;
    const int64_t *pages; /* page numbers of the sequence, in order */
};

struct call {
    const float *q, *k, *v, *sinks; /* [tokens, heads, dim], contiguous; sinks [heads] or NULL */
    float *out, *pool;
    int num_heads, num_kv_heads, key_dim, value_dim, padded_value_dim, window; /* window 0: all keys */
    size_t page_stride, layer_offset, head_stride;                             /* in floats */
    float scale;
};

struct scratch {
    float scores[4][TILE] __attribute__((aligned(64)));
    const float *q[ROWS];
    float *out[ROWS], *acc;
    int begin[ROWS], end[ROWS];
    float maximum[ROWS], sum[ROWS];
};

struct norm {
    const void *x, *weight;
    void *out;
    int rows, dim, is_bf16, rounds_last;
    float eps;
};

struct product { /* what the rows of one matmul have in common */
    int in, out, is_bf16, is_in_out;
    int stretch; /* columns whose widened weights fit `wide` */
    float *wide;
};
typedef void (*multiply_fn)(const struct product *p, const float *x, int rows, const char *weight, float *y);

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma")))
#define VFMA(a, b, c) ((V8)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define SUFFIX _avx2
#include "_attention.h"
#include "_matmul.h"
#include "_rows.h"
#undef TARGET
#undef VFMA
#undef SUFFIX
#endif

/* Any other processor: the same operations lane by lane, so the same bits. */
static inline V8 fma_lanes(V8 a, V8 b, V8 c) {
    V8 out;
    for (int i = 0; i < 8; i++) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return out;
}
#define TARGET
#define VFMA(a, b, c) fma_lanes((a), (b), (c))
#define SUFFIX _portable
#include "_attention.h"
#include "_matmul.h"
#include "_rows.h"

/* Put the keys of a run in their pages as [dim][TILE] and the values as [TILE][padded dim], by position. */
static void store_run(const struct call *c, const struct run *run) {
    for (int i = 0; i < run->count; i++) {
        int position = run->start + i, slot = position % TILE;
        float *page = c->pool + (size_t)run->pages[position / TILE] * c->page_stride + c->layer_offset;
        for (int head = 0; head < c->num_kv_heads; head++, page += c->head_stride) {
            size_t row = (size_t)(run->first_row + i) * c->num_kv_heads + head;
            const float *k = c->k + row * c->key_dim;
            for (int d = 0; d < c->key_dim; d++) page[(size_t)d * TILE + slot] = k[d];
            memcpy(page + (size_t)c->key_dim * TILE + (size_t)slot * c->padded_value_dim, c->v + row * c->value_dim,
                   sizeof(float) * c->value_dim);
        }
    }
}

static int use_avx2(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

/* runs int64 [num_runs, 4]: first row, count, start position, address of the page numbers. */
static PyObject *attend(PyObject *self, PyObject *args) {
    unsigned long long q, k, v, out, sinks, pool, runs;
    unsigned long long page_stride, layer_offset, head_stride;
    int num_runs, portable;
    struct call c;
    if (!PyArg_ParseTuple(args, "KKKKKKKiiiiiiKKKifp", &q, &k, &v, &out, &sinks, &pool, &runs, &num_runs, &c.num_heads, &c.num_kv_heads,
                          &c.key_dim, &c.value_dim, &c.padded_value_dim, &page_stride, &layer_offset, &head_stride, &c.window, &c.scale,
                          &portable))
        return NULL;
    c.q = (const float *)(uintptr_t)q, c.k = (const float *)(uintptr_t)k, c.v = (const float *)(uintptr_t)v;
    c.out = (float *)(uintptr_t)out, c.sinks = (const float *)(uintptr_t)sinks, c.pool = (float *)(uintptr_t)pool;
    c.page_stride = page_stride, c.layer_offset = layer_offset, c.head_stride = head_stride;
    if (c.num_kv_heads < 1 || c.num_heads % c.num_kv_heads || c.num_heads / c.num_kv_heads > ROWS)
        return PyErr_Format(PyExc_ValueError, "%d query heads over %d key heads: the group must be whole and at most %d", c.num_heads,
                            c.num_kv_heads, ROWS);
    struct scratch *s = NULL;
    size_t acc = sizeof(float) * ROWS * (size_t)c.padded_value_dim;
    if (posix_memalign((void **)&s, 64, sizeof *s)) return PyErr_NoMemory();
    if (posix_memalign((void **)&s->acc, 64, acc)) {
        free(s);
        return PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS;
    const int64_t *entry = (const int64_t *)(uintptr_t)runs;
    void (*attend_run)(const struct call *, const struct run *, int, struct scratch *) = attend_run_portable;
#if defined(__x86_64__)
    if (!portable && use_avx2()) attend_run = attend_run_avx2;
#endif
    for (int i = 0; i < num_runs; i++, entry += 4) {
        struct run run = {(int)entry[0], (int)entry[1], (int)entry[2], (const int64_t *)(uintptr_t)entry[3]};
        store_run(&c, &run);
        for (int head = 0; head < c.num_kv_heads; head++) attend_run(&c, &run, head, s);
    }
    Py_END_ALLOW_THREADS;
    free(s->acc);
    free(s);
    Py_RETURN_NONE;
}

static float widen(uint16_t half) {
    union {
        uint32_t bits;
        float value;
    } u = {(uint32_t)half << 16};
    return u.value;
}

/* Nearest bfloat16, ties to even; a NaN stays one. */
static uint16_t narrow(float value) {
    union {
        float value;
        uint32_t bits;
    } u = {value};
    if (value != value) return 0x7fc0;
    return (uint16_t)((u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16);
}

/* groups: a flat tuple of (first row, end row, address of the weight, address of the bias or 0) for each group. */
static PyObject *matmul(PyObject *self, PyObject *args) {
    unsigned long long x_address, out_address;
    int portable;
    struct product p;
    PyObject *groups;
    if (!PyArg_ParseTuple(args, "KKO!iippp", &x_address, &out_address, &PyTuple_Type, &groups, &p.in, &p.out, &p.is_bf16, &p.is_in_out,
                          &portable))
        return NULL;
    multiply_fn multiply = multiply_portable;
#if defined(__x86_64__)
    if (!portable && use_avx2()) multiply = multiply_avx2;
#endif
    const size_t in = p.in, out = p.out;
    const int num_groups = (int)(PyTuple_GET_SIZE(groups) / 4);
    const int block = BLOCK_FLOATS / in / 4 * 4 > 4 ? BLOCK_FLOATS / in / 4 * 4 : 4; /* rows whose inputs stay in the second cache */
    p.stretch = BLOCK_FLOATS / in / 12 * 12 > 12 ? BLOCK_FLOATS / in / 12 * 12 : 12;
    int64_t *table = malloc(sizeof(int64_t) * 4 * (num_groups + 1));
    float *wide_x = NULL, *wide_y = NULL;
    p.wide = NULL;
    if (p.is_bf16) {
        wide_x = malloc(sizeof(float) * block * in);
        wide_y = malloc(sizeof(float) * block * out);
        if (posix_memalign((void **)&p.wide, 64, sizeof(float) * p.stretch * in)) p.wide = NULL;
    }
    if (!table || (p.is_bf16 && !(wide_x && wide_y && p.wide))) {
        PyErr_NoMemory();
        goto done;
    }
    for (int i = 0; i < 4 * num_groups; i++) table[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(groups, i));
    if (PyErr_Occurred()) goto done;
    Py_BEGIN_ALLOW_THREADS;
    const int64_t *group = table;
    for (int g = 0; g < num_groups; g++, group += 4) {
        const char *weight = (const char *)(uintptr_t)group[2];
        const void *bias = (const void *)(uintptr_t)group[3];
        for (int64_t row = group[0]; row < group[1]; row += block) {
            int rows = group[1] - row < block ? (int)(group[1] - row) : block;
            size_t from = row * in, to = row * out, count = rows * out;
            if (!p.is_bf16) {
                float *y = (float *)(uintptr_t)out_address + to;
                multiply(&p, (const float *)(uintptr_t)x_address + from, rows, weight, y);
                if (bias)
                    for (size_t i = 0; i < count; i++) y[i] += ((const float *)bias)[i % out];
                continue;
            }
            const uint16_t *x = (const uint16_t *)(uintptr_t)x_address + from;
            uint16_t *y = (uint16_t *)(uintptr_t)out_address + to;
            for (size_t i = 0; i < rows * in; i++) wide_x[i] = widen(x[i]);
            multiply(&p, wide_x, rows, weight, wide_y);
            if (bias)
                for (size_t i = 0; i < count; i++) wide_y[i] += widen(((const uint16_t *)bias)[i % out]);
            for (size_t i = 0; i < count; i++) y[i] = narrow(wide_y[i]);
        }
    }
    Py_END_ALLOW_THREADS;
done:
    free(table);
    free(wide_x);
    free(wide_y);
    free(p.wide);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

static PyObject *rms_norm(PyObject *self, PyObject *args) {
    unsigned long long x, weight, out;
    struct norm c;
    int portable;
    if (!PyArg_ParseTuple(args, "KKKiifppp", &x, &weight, &out, &c.rows, &c.dim, &c.eps, &c.is_bf16, &c.rounds_last, &portable)) return NULL;
    c.x = (const void *)(uintptr_t)x, c.weight = (const void *)(uintptr_t)weight, c.out = (void *)(uintptr_t)out;
    void (*run)(const struct norm *) = norm_portable;
#if defined(__x86_64__)
    if (!portable && use_avx2()) run = norm_avx2;
#endif
    Py_BEGIN_ALLOW_THREADS;
    run(&c);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *swiglu(PyObject *self, PyObject *args) {
    unsigned long long x, out;
    int rows, dim, is_bf16, portable;
    if (!PyArg_ParseTuple(args, "KKiipp", &x, &out, &rows, &dim, &is_bf16, &portable)) return NULL;
    void (*run)(const void *, void *, int, int, int) = swiglu_portable;
#if defined(__x86_64__)
    if (!portable && use_avx2()) run = swiglu_avx2;
#endif
    Py_BEGIN_ALLOW_THREADS;
    run((const void *)(uintptr_t)x, (void *)(uintptr_t)out, rows, dim, is_bf16);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"attend", attend, METH_VARARGS,
     "attend(q, k, v, out, sinks, pool, runs, num_runs, num_heads, num_kv_heads, key_dim, value_dim, padded_value_dim, page_stride, "
     "layer_offset, head_stride, window, scale, portable): store new keys and values, then attend. Addresses are integers."},
    {"matmul", matmul, METH_VARARGS,
     "matmul(x, out, groups, in, out, is_bf16, is_in_out, portable): rows of x times each group's weight, plus its bias."},
    {"rms_norm", rms_norm, METH_VARARGS, "rms_norm(x, weight, out, rows, dim, eps, is_bf16, rounds_last, portable)."},
    {"swiglu", swiglu, METH_VARARGS, "swiglu(x, out, rows, dim, is_bf16, portable): x holds gate and up side by side."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", "Row-invariant kernels.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) {
    PyObject *m = PyModule_Create(&module);
    if (m && PyModule_AddIntConstant(m, "TILE", TILE)) {
        Py_DECREF(m);
        return NULL;
    }
    return m;
}
