/* Compiled counterparts of `rows.py`: the same orders and the same bits, in one pass over memory.
 *
 * Arrays come as contiguous buffers. A source is a buffer of whole rows; (source, row) pairs name the rows to read and are checked against
 * the sources' lengths, so a peer's numbers can't lead outside them. The module must be compiled without fused multiply-add. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define CHUNK 512 /* columns summed at a time: the partial sums stay in the first-level cache */
#define UNLOCK_BYTES (1 << 16) /* work beyond this runs without the interpreter's lock */

typedef struct {
    Py_buffer *views;
    Py_ssize_t count;
} Buffers;

static void release_all(Buffers *b) {
    for (Py_ssize_t i = 0; i < b->count; i++) PyBuffer_Release(&b->views[i]);
    PyMem_Free(b->views);
    b->views = NULL;
    b->count = 0;
}

/* Take hold of every item of a list or tuple. */
static int acquire_all(PyObject *sequence, Buffers *b) {
    PyObject *fast = PySequence_Fast(sequence, "sources must be a sequence of arrays");
    b->views = NULL;
    b->count = 0;
    if (fast == NULL) return -1;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(fast);
    b->views = PyMem_Calloc(n ? (size_t)n : 1, sizeof(Py_buffer));
    int bad = b->views == NULL;
    if (bad) PyErr_NoMemory();
    for (Py_ssize_t i = 0; !bad && i < n; i++) {
        bad = PyObject_GetBuffer(PySequence_Fast_GET_ITEM(fast, i), &b->views[i], PyBUF_SIMPLE) < 0;
        if (!bad) b->count++;
    }
    Py_DECREF(fast);
    if (bad) release_all(b);
    return bad ? -1 : 0;
}

static int size_error(const char *what) {
    PyErr_Format(PyExc_ValueError, "%s: the arrays' lengths do not fit each other", what);
    return 0;
}

/* The address of row `row` of source `source`, or NULL if there is none. */
static inline const char *row_at(const Buffers *sources, int32_t source, int32_t row, Py_ssize_t row_bytes) {
    if (source < 0 || source >= sources->count || row < 0) return NULL;
    const Py_buffer *view = &sources->views[source];
    if (((Py_ssize_t)row + 1) * row_bytes > view->len) return NULL;
    return (const char *)view->buf + (Py_ssize_t)row * row_bytes;
}

/* ---- gather(out, sources, source_of int32 [N], row_of int32 [N], row_bytes) */

static PyObject *gather(PyObject *self, PyObject *args) {
    PyObject *list, *result = NULL;
    Py_buffer out = {0}, source_of = {0}, row_of = {0};
    Py_ssize_t row_bytes;
    Buffers sources = {0};
    if (!PyArg_ParseTuple(args, "w*Oy*y*n", &out, &list, &source_of, &row_of, &row_bytes)) return NULL;
    if (acquire_all(list, &sources) < 0) goto done;
    Py_ssize_t n = row_of.len / 4, bad = -1;
    if (row_bytes <= 0 || source_of.len != row_of.len || out.len != n * row_bytes) {
        size_error("gather");
        goto done;
    }
    const int32_t *source = source_of.buf, *row = row_of.buf;
    PyThreadState *unlocked = out.len > UNLOCK_BYTES ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t i = 0; i < n; i++) {
        const char *from = row_at(&sources, source[i], row[i], row_bytes);
        if (from == NULL) {
            bad = i;
            break;
        }
        memcpy((char *)out.buf + i * row_bytes, from, row_bytes);
    }
    if (unlocked) PyEval_RestoreThread(unlocked);
    if (bad >= 0)
        PyErr_Format(PyExc_IndexError, "gather: source %d has no row %d", (int)source[bad], (int)row[bad]);
    else
        result = Py_NewRef(Py_None);
done:
    release_all(&sources);
    PyBuffer_Release(&out);
    PyBuffer_Release(&source_of);
    PyBuffer_Release(&row_of);
    return result;
}

/* ---- weighted_sum(out, sources, source_of int32 [P], row_of int32 [P], position int32 [T, K], weights float32 [T, K], top_k, hidden, is_half) */

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

static void add_float(float *restrict sum, const float *restrict row, float weight, Py_ssize_t n, int first) {
    if (first)
        for (Py_ssize_t j = 0; j < n; j++) sum[j] = weight * row[j];
    else
        for (Py_ssize_t j = 0; j < n; j++) sum[j] += weight * row[j];
}

static void add_half(float *restrict sum, const uint16_t *restrict row, float weight, Py_ssize_t n, int first) {
    if (first)
        for (Py_ssize_t j = 0; j < n; j++) sum[j] = weight * widen(row[j]);
    else
        for (Py_ssize_t j = 0; j < n; j++) sum[j] += weight * widen(row[j]);
}

/* One token: its K rows, added in list order. */
static void sum_token(char *out, const char *const *rows, const float *weights, Py_ssize_t top_k, Py_ssize_t hidden, int is_half) {
    float sum[CHUNK];
    for (Py_ssize_t start = 0; start < hidden; start += CHUNK) {
        Py_ssize_t n = hidden - start < CHUNK ? hidden - start : CHUNK;
        for (Py_ssize_t k = 0; k < top_k; k++) {
            if (is_half)
                add_half(sum, (const uint16_t *)rows[k] + start, weights[k], n, k == 0);
            else
                add_float(sum, (const float *)rows[k] + start, weights[k], n, k == 0);
        }
        if (is_half)
            for (Py_ssize_t j = 0; j < n; j++) ((uint16_t *)out)[start + j] = narrow(sum[j]);
        else
            memcpy((float *)out + start, sum, n * sizeof(float));
    }
}

static PyObject *weighted_sum(PyObject *self, PyObject *args) {
    PyObject *list, *result = NULL;
    Py_buffer out = {0}, source_of = {0}, row_of = {0}, position = {0}, weights = {0};
    Py_ssize_t top_k, hidden;
    int is_half;
    Buffers sources = {0};
    const char **rows = NULL;
    if (!PyArg_ParseTuple(args, "w*Oy*y*y*y*nnp", &out, &list, &source_of, &row_of, &position, &weights, &top_k, &hidden, &is_half)) return NULL;
    if (acquire_all(list, &sources) < 0) goto done;
    Py_ssize_t row_bytes = hidden * (is_half ? 2 : 4);
    Py_ssize_t pairs = position.len / 4, tokens = top_k > 0 ? pairs / top_k : -1, bad = -1;
    if (tokens < 0 || row_bytes <= 0 || tokens * top_k != pairs || out.len != tokens * row_bytes || weights.len != position.len ||
        source_of.len != row_of.len || source_of.len != position.len) {
        size_error("weighted_sum");
        goto done;
    }
    rows = PyMem_Malloc(top_k * sizeof(char *));
    if (rows == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    const int32_t *place = position.buf, *source = source_of.buf, *row = row_of.buf;
    PyThreadState *unlocked = out.len > UNLOCK_BYTES ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t t = 0; t < tokens && bad < 0; t++) {
        for (Py_ssize_t k = 0; k < top_k && bad < 0; k++) {
            int32_t at = place[t * top_k + k];
            rows[k] = at < 0 || at >= pairs ? NULL : row_at(&sources, source[at], row[at], row_bytes);
            if (rows[k] == NULL) bad = t * top_k + k;
        }
        if (bad < 0) sum_token((char *)out.buf + t * row_bytes, rows, (const float *)weights.buf + t * top_k, top_k, hidden, is_half);
    }
    if (unlocked) PyEval_RestoreThread(unlocked);
    if (bad >= 0)
        PyErr_Format(PyExc_IndexError, "weighted_sum: pair %zd names a row that no source has", bad);
    else
        result = Py_NewRef(Py_None);
done:
    PyMem_Free(rows);
    release_all(&sources);
    PyBuffer_Release(&out);
    PyBuffer_Release(&source_of);
    PyBuffer_Release(&row_of);
    PyBuffer_Release(&position);
    PyBuffer_Release(&weights);
    return result;
}

/* ---- plan_departure(ids int64 [T*K], destination int32 [T*K], top_k, pairs int32 [T*K, 2], position int32 [T*K], start int64 [R+1]) -> bad pair or -1 */

static PyObject *plan_departure(PyObject *self, PyObject *args) {
    Py_buffer ids = {0}, destination = {0}, pairs = {0}, position = {0}, start = {0};
    Py_ssize_t top_k, bad = -1;
    if (!PyArg_ParseTuple(args, "y*y*nw*w*w*", &ids, &destination, &top_k, &pairs, &position, &start)) return NULL;
    Py_ssize_t n = ids.len / 8, ranks = start.len / 8 - 1;
    int fits = ranks >= 0 && destination.len == n * 4 && pairs.len == n * 8 && position.len == n * 4 && (n == 0 || top_k > 0);
    if (fits) {
        const int64_t *id = ids.buf;
        const int32_t *to = destination.buf;
        int32_t(*pair)[2] = pairs.buf, *place = position.buf;
        int64_t *next = start.buf;
        memset(next, 0, start.len);
        for (Py_ssize_t i = 0; i < n && bad < 0; i++) {
            if (to[i] < 0 || to[i] >= ranks)
                bad = i;
            else
                next[to[i] + 1]++;
        }
        for (Py_ssize_t r = 0; r < ranks; r++) next[r + 1] += next[r];
        if (bad < 0) {
            for (Py_ssize_t i = 0; i < n; i++) {
                int32_t at = (int32_t)next[to[i]]++;
                pair[at][0] = (int32_t)(i / top_k);
                pair[at][1] = (int32_t)id[i];
                place[i] = at;
            }
            /* each start has moved to its end: move them back */
            for (Py_ssize_t r = ranks; r > 0; r--) next[r] = next[r - 1];
            next[0] = 0;
        }
    }
    PyBuffer_Release(&ids);
    PyBuffer_Release(&destination);
    PyBuffer_Release(&pairs);
    PyBuffer_Release(&position);
    PyBuffer_Release(&start);
    return fits ? PyLong_FromSsize_t(bad) : (size_error("plan_departure"), NULL);
}

/* ---- plan_arrival(pairs of each source, their numbers of rows int64 [S], served bool [E], source_of, row_of, back int32 [N]) -> groups, or the source at fault */

static PyObject *build_groups(const int64_t *end, Py_ssize_t experts) {
    PyObject *list = PyList_New(0);
    int64_t begin = 0;
    for (Py_ssize_t e = 0; list != NULL && e < experts; begin = end[e], e++) {
        if (end[e] == begin) continue;
        PyObject *group = Py_BuildValue("(nLL)", e, (long long)begin, (long long)end[e]);
        if (group == NULL || PyList_Append(list, group) < 0) Py_CLEAR(list);
        Py_XDECREF(group);
    }
    PyObject *result = list == NULL ? NULL : PyList_AsTuple(list);
    Py_XDECREF(list);
    return result;
}

static PyObject *plan_arrival(PyObject *self, PyObject *args) {
    PyObject *list, *result = NULL;
    Py_buffer limits = {0}, served = {0}, source_of = {0}, row_of = {0}, back = {0};
    Buffers sources = {0};
    int64_t *next = NULL;
    if (!PyArg_ParseTuple(args, "Oy*y*w*w*w*", &list, &limits, &served, &source_of, &row_of, &back)) return NULL;
    if (acquire_all(list, &sources) < 0) goto done;
    Py_ssize_t total = 0, experts = served.len, bad = -1;
    for (Py_ssize_t s = 0; s < sources.count; s++) total += sources.views[s].len / 8;
    if (limits.len != sources.count * 8 || source_of.len != total * 4 || row_of.len != total * 4 || back.len != total * 4) {
        size_error("plan_arrival");
        goto done;
    }
    next = PyMem_Calloc(experts + 1, sizeof(int64_t));
    if (next == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    const char *holds = served.buf;
    for (Py_ssize_t s = 0; s < sources.count && bad < 0; s++) {
        const int32_t(*pair)[2] = sources.views[s].buf;
        for (Py_ssize_t i = 0; i < sources.views[s].len / 8 && bad < 0; i++) {
            int32_t row = pair[i][0], expert = pair[i][1];
            if (row < 0 || row >= ((const int64_t *)limits.buf)[s] || expert < 0 || expert >= experts || !holds[expert])
                bad = s;
            else
                next[expert + 1]++;
        }
    }
    if (bad >= 0) {
        result = PyLong_FromSsize_t(bad);
        goto done;
    }
    for (Py_ssize_t e = 0; e < experts; e++) next[e + 1] += next[e];
    Py_ssize_t arrived = 0;
    for (Py_ssize_t s = 0; s < sources.count; s++) {
        const int32_t(*pair)[2] = sources.views[s].buf;
        for (Py_ssize_t i = 0; i < sources.views[s].len / 8; i++, arrived++) {
            int32_t at = (int32_t)next[pair[i][1]]++;
            ((int32_t *)source_of.buf)[at] = (int32_t)s;
            ((int32_t *)row_of.buf)[at] = pair[i][0];
            ((int32_t *)back.buf)[arrived] = at;
        }
    }
    result = build_groups(next, experts);
done:
    PyMem_Free(next);
    release_all(&sources);
    PyBuffer_Release(&limits);
    PyBuffer_Release(&served);
    PyBuffer_Release(&source_of);
    PyBuffer_Release(&row_of);
    PyBuffer_Release(&back);
    return result;
}

static PyMethodDef methods[] = {
    {"gather", gather, METH_VARARGS, "gather(out, sources, source_of, row_of, row_bytes)"},
    {"weighted_sum", weighted_sum, METH_VARARGS, "weighted_sum(out, sources, source_of, row_of, position, weights, top_k, hidden, is_half)"},
    {"plan_departure", plan_departure, METH_VARARGS, "plan_departure(ids, destination, top_k, pairs, position, start) -> bad pair or -1"},
    {"plan_arrival", plan_arrival, METH_VARARGS, "plan_arrival(pairs, limits, served, source_of, row_of, back) -> groups or source at fault"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rows", "Planning, gathering and summing of rows.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__rows(void) { return PyModule_Create(&module); }
