/* Compiled counterparts of `rows.py` and `grouping.py`: the same orders and the same bits, in one pass over memory.
 * Arrays come as contiguous buffers. */
#include "_native.h"

static int size_error(const char *what) {
    PyErr_Format(PyExc_ValueError, "%s: the arrays' lengths do not fit each other", what);
    return 0;
}

typedef struct {
    Py_buffer *views;
    source_t *sources;
    Py_ssize_t count;
} Buffers;

static void release_all(Buffers *b) {
    for (Py_ssize_t i = 0; i < b->count; i++) PyBuffer_Release(&b->views[i]);
    PyMem_Free(b->views);
    PyMem_Free(b->sources);
    memset(b, 0, sizeof(*b));
}

/* Take hold of every item of a list or tuple; item_bytes is the size of its rows. */
static int acquire_all(PyObject *sequence, Py_ssize_t item_bytes, Buffers *b) {
    PyObject *fast = PySequence_Fast(sequence, "sources must be a sequence of arrays");
    memset(b, 0, sizeof(*b));
    if (fast == NULL) return -1;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(fast);
    b->views = PyMem_Calloc(n ? (size_t)n : 1, sizeof(Py_buffer));
    b->sources = PyMem_Calloc(n ? (size_t)n : 1, sizeof(source_t));
    int bad = b->views == NULL || b->sources == NULL;
    if (bad) PyErr_NoMemory();
    for (Py_ssize_t i = 0; !bad && i < n; i++) {
        bad = PyObject_GetBuffer(PySequence_Fast_GET_ITEM(fast, i), &b->views[i], PyBUF_SIMPLE) < 0;
        if (bad) break;
        b->count++;
        b->sources[i] = (source_t){b->views[i].buf, item_bytes > 0 ? b->views[i].len / item_bytes : 0};
    }
    Py_DECREF(fast);
    if (bad) release_all(b);
    return bad ? -1 : 0;
}

/* gather(out, sources, source_of int32 [N], row_of int32 [N], row_bytes) */
static PyObject *gather(PyObject *self, PyObject *args) {
    PyObject *list, *result = NULL;
    Py_buffer out = {0}, source_of = {0}, row_of = {0};
    Py_ssize_t row_bytes;
    Buffers b = {0};
    if (!PyArg_ParseTuple(args, "w*Oy*y*n", &out, &list, &source_of, &row_of, &row_bytes)) return NULL;
    if (acquire_all(list, row_bytes, &b) < 0) goto done;
    Py_ssize_t n = row_of.len / 4;
    if (row_bytes <= 0 || source_of.len != row_of.len || out.len != n * row_bytes) {
        size_error("gather");
        goto done;
    }
    PyThreadState *unlocked = out.len > UNLOCK_BYTES ? PyEval_SaveThread() : NULL;
    int64_t bad = gather_rows(out.buf, b.sources, b.count, source_of.buf, row_of.buf, n, row_bytes);
    if (unlocked) PyEval_RestoreThread(unlocked);
    if (bad >= 0)
        PyErr_Format(PyExc_IndexError, "gather: source %d has no row %d", ((int32_t *)source_of.buf)[bad], ((int32_t *)row_of.buf)[bad]);
    else
        result = Py_NewRef(Py_None);
done:
    release_all(&b);
    PyBuffer_Release(&out);
    PyBuffer_Release(&source_of);
    PyBuffer_Release(&row_of);
    return result;
}

/* weighted_sum(out, sources, source_of int32 [P], row_of int32 [P], position int32 [T, K], weights float32 [T, K], top_k, hidden, is_half) */
static PyObject *weighted_sum(PyObject *self, PyObject *args) {
    PyObject *list, *result = NULL;
    Py_buffer out = {0}, source_of = {0}, row_of = {0}, position = {0}, weights = {0};
    Py_ssize_t top_k, hidden;
    int is_half;
    Buffers b = {0};
    const char **rows = NULL;
    if (!PyArg_ParseTuple(args, "w*Oy*y*y*y*nnp", &out, &list, &source_of, &row_of, &position, &weights, &top_k, &hidden, &is_half)) return NULL;
    Py_ssize_t row_bytes = hidden * (is_half ? 2 : 4);
    if (acquire_all(list, row_bytes, &b) < 0) goto done;
    Py_ssize_t pairs = position.len / 4, tokens = top_k > 0 ? pairs / top_k : -1;
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
    PyThreadState *unlocked = out.len > UNLOCK_BYTES ? PyEval_SaveThread() : NULL;
    int64_t bad = sum_rows(out.buf, b.sources, b.count, source_of.buf, row_of.buf, position.buf, weights.buf, tokens, top_k, hidden, is_half, rows);
    if (unlocked) PyEval_RestoreThread(unlocked);
    if (bad >= 0)
        PyErr_Format(PyExc_IndexError, "weighted_sum: pair %lld names a row that no source has", (long long)bad);
    else
        result = Py_NewRef(Py_None);
done:
    PyMem_Free(rows);
    release_all(&b);
    PyBuffer_Release(&out);
    PyBuffer_Release(&source_of);
    PyBuffer_Release(&row_of);
    PyBuffer_Release(&position);
    PyBuffer_Release(&weights);
    return result;
}

/* plan_departure(ids int64 [T*K], destination int32 [T*K], top_k, pairs int32 [T*K, 2], position int32 [T*K], start int64 [R+1])
 * Returns the first pair without a rank, or -1. */
static PyObject *plan_departure(PyObject *self, PyObject *args) {
    Py_buffer ids = {0}, destination = {0}, pairs = {0}, position = {0}, start = {0};
    Py_ssize_t top_k;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*y*nw*w*w*", &ids, &destination, &top_k, &pairs, &position, &start)) return NULL;
    Py_ssize_t n = ids.len / 8, ranks = start.len / 8 - 1;
    if (ranks >= 0 && destination.len == n * 4 && pairs.len == n * 8 && position.len == n * 4 && (n == 0 || top_k > 0))
        result = PyLong_FromLongLong(depart(ids.buf, destination.buf, n, top_k, ranks, pairs.buf, position.buf, start.buf));
    else
        size_error("plan_departure");
    PyBuffer_Release(&ids);
    PyBuffer_Release(&destination);
    PyBuffer_Release(&pairs);
    PyBuffer_Release(&position);
    PyBuffer_Release(&start);
    return result;
}

PyObject *build_groups(const int64_t *end, int64_t experts) {
    PyObject *list = PyList_New(0);
    int64_t begin = 0;
    for (int64_t e = 0; list != NULL && e < experts; begin = end[e], e++) {
        if (end[e] == begin) continue;
        PyObject *group = Py_BuildValue("(LLL)", (long long)e, (long long)begin, (long long)end[e]);
        if (group == NULL || PyList_Append(list, group) < 0) Py_CLEAR(list);
        Py_XDECREF(group);
    }
    PyObject *result = list == NULL ? NULL : PyList_AsTuple(list);
    Py_XDECREF(list);
    return result;
}

/* plan_arrival(pairs of each source, their numbers of rows int64 [S], served bool [E], source_of, row_of, back int32 [N])
 * Returns the groups, or the index of the first source at fault. */
static PyObject *plan_arrival(PyObject *self, PyObject *args) {
    PyObject *list, *result = NULL;
    Py_buffer limits = {0}, served = {0}, source_of = {0}, row_of = {0}, back = {0};
    Buffers b = {0};
    int64_t *next = NULL;
    if (!PyArg_ParseTuple(args, "Oy*y*w*w*w*", &list, &limits, &served, &source_of, &row_of, &back)) return NULL;
    if (acquire_all(list, sizeof(pair_t), &b) < 0) goto done;
    int64_t total = 0, experts = served.len, arrived = 0;
    for (Py_ssize_t s = 0; s < b.count; s++) total += b.sources[s].num_rows;
    if (limits.len != b.count * 8 || source_of.len != total * 4 || row_of.len != total * 4 || back.len != total * 4) {
        size_error("plan_arrival");
        goto done;
    }
    next = PyMem_Calloc(experts + 1, sizeof(int64_t));
    if (next == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t s = 0; s < b.count; s++) {
        const pair_t *pairs = (const pair_t *)b.sources[s].base;
        if (!count_pairs(pairs, b.sources[s].num_rows, ((const int64_t *)limits.buf)[s], served.buf, experts, next)) {
            result = PyLong_FromSsize_t(s);
            goto done;
        }
    }
    for (int64_t e = 0; e < experts; e++) next[e + 1] += next[e];
    for (Py_ssize_t s = 0; s < b.count; s++) {
        const pair_t *pairs = (const pair_t *)b.sources[s].base;
        place_pairs(pairs, b.sources[s].num_rows, (int32_t)s, next, source_of.buf, row_of.buf, (int32_t *)back.buf + arrived);
        arrived += b.sources[s].num_rows;
    }
    result = build_groups(next, experts);
done:
    PyMem_Free(next);
    release_all(&b);
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
    {"begin_dispatch", begin_dispatch, METH_VARARGS, "see _link.c"},
    {"finish_dispatch", finish_dispatch, METH_VARARGS, "see _link.c"},
    {"do_combine", do_combine, METH_VARARGS, "see _link.c"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rows", "Planning, gathering and summing of rows.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__rows(void) { return PyModule_Create(&module); }
