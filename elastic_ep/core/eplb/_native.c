/* The solver's inner loops, compiled. reference/ is the same in Python, file by file; both give the very same results.
 *
 * All choices are by (criterion, lowest index). Floating-point operations are written in the order in which the reference
 * does them, and the build forbids contraction. Nothing here depends on the platform, a clock or a random source.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#include "native/solve.h"

static void *carve(char **at, i64 count, size_t size) {
    char *p = *at;
    *at += ((size_t)(count > 0 ? count : 1) * size + 63) & ~(size_t)63;
    return p;
}

/* Room for a layer's arrays from `base`; returns the bytes used (call with NULL to learn them). */
static size_t lay_out(Layer *s, char *base) {
    char *at = base;
    i64 E = s->num_experts, P = s->num_slots, R = s->num_ranks;
    for (s->leaves = 1; s->leaves < s->num_live;) s->leaves *= 2;
    i32 **of_ranks[] = {&s->live, &s->live_index, &s->first, &s->last, &s->near, &s->hidden};
    i32 **of_slots[] = {&s->place, &s->next, &s->prev, &s->origin, &s->reference, &s->row, &s->slots};
    i32 **of_experts[] = {&s->head, &s->count, &s->spare, &s->counts, &s->order, &s->list};
    double **loads[] = {&s->share, &s->more, &s->less, &s->key};
    for (size_t i = 0; i < sizeof of_ranks / sizeof *of_ranks; i++) *of_ranks[i] = carve(&at, R + NEAREST, sizeof(i32));
    for (size_t i = 0; i < sizeof of_slots / sizeof *of_slots; i++) *of_slots[i] = carve(&at, P, sizeof(i32));
    for (size_t i = 0; i < sizeof of_experts / sizeof *of_experts; i++) *of_experts[i] = carve(&at, E, sizeof(i32));
    for (size_t i = 0; i < sizeof loads / sizeof *loads; i++) *loads[i] = carve(&at, E, sizeof(double));
    s->sorted = carve(&at, 2 * E, sizeof(Keyed));
    s->load = carve(&at, R, sizeof(double));
    s->on = carve(&at, E * R, 1);
    s->paired = carve(&at, s->need > 1 ? R * R : 0, 1);
    s->covers = carve(&at, P, 1);
    s->mine = carve(&at, P, sizeof(Mine));
    s->room = carve(&at, R, sizeof(i64));
    s->stamp = carve(&at, R, sizeof(i64));
    s->covered = carve(&at, R, sizeof(i64));
    s->bond = carve(&at, s->partner_start[R], sizeof(double));
    s->tree = carve(&at, 2 * s->leaves, sizeof(double));
    s->winner = carve(&at, 2 * s->leaves, sizeof(i32));
    return (size_t)(at - base);
}

static size_t lay_out_pour(Pour *p, char *base) {
    char *at = base;
    p->start = carve(&at, p->num_experts + 1, sizeof(i32));
    p->slots = carve(&at, p->num_slots, sizeof(i32));
    p->load = carve(&at, p->num_ranks, sizeof(double));
    p->part = carve(&at, p->num_slots, sizeof(double));
    p->columns = carve(&at, p->num_slots, sizeof(double));
    return (size_t)(at - base);
}

static size_t lay_out_saved(Saved *v, const Layer *s, char *base) {
    char *at = base;
    v->place = carve(&at, s->num_slots, sizeof(i32));
    v->reference = carve(&at, s->num_slots, sizeof(i32));
    v->spare = carve(&at, s->num_experts, sizeof(i32));
    v->covered = carve(&at, s->num_ranks, sizeof(i64));
    v->covers = carve(&at, s->num_slots, 1);
    return (size_t)(at - base);
}

/* Ranks with live slots, the slots of each, partners as a table, and whether `need` domains can be had for all. */
static void set_world(Layer *s) {
    i64 R = s->num_ranks, n = 0, total = 0;
    memset(s->stamp, 0, sizeof(i64) * (size_t)R);
    memset(s->covered, 0, sizeof(i64) * (size_t)R);
    if (s->need > 1) {
        memset(s->paired, 0, (size_t)(R * R));
        for (i64 r = 0; r < R; r++)
            for (i64 i = s->partner_start[r]; i < s->partner_start[r + 1]; i++) s->paired[r * R + s->partner[i]] = 1;
    }
    for (i64 r = 0; r < R; r++) {
        s->first[r] = s->last[r] = 0;
        s->live_index[r] = -1;
        s->room[r] = 0;
    }
    for (i64 t = 0; t < s->num_slots; t++) {
        i64 r = s->rank_of_slot[t];
        if (t == 0 || s->rank_of_slot[t - 1] != r) {
            s->first[r] = (i32)t;
            if (s->alive[r]) {
                s->live_index[r] = (i32)n;
                s->live[n++] = (i32)r;
            }
        }
        s->last[r] = (i32)(t + 1);
        if (s->alive[r]) {
            s->live_slots++;
            s->room[s->domain[r]]++;
        }
    }
    for (i64 d = 0; d < R; d++) total += s->room[d] < s->num_experts ? s->room[d] : s->num_experts;
    s->is_feasible = total >= s->need * s->num_experts;
}

/* Buffers of one call: inputs, then outputs. */
typedef struct {
    Py_buffer load, held, rank_of_slot, alive, domain, partner_start, partner, limits;
    Py_buffer rows, reference, covers, peak, bound, stats, trace_moves, trace_peak;
} Buffers;

enum { NUM_BUFFERS = sizeof(Buffers) / sizeof(Py_buffer), NUM_STATS = 5 };

static void release(Py_buffer *first, int n) {
    for (int i = 0; i < n; i++)
        if (first[i].obj) PyBuffer_Release(&first[i]);
}

/* Whether the buffers have the sizes that the loops will touch. */
static int are_sizes_right(const Buffers *b, i64 L, i64 E, i64 P, i64 R, int has_held, int has_limits) {
    i64 n = (i64)sizeof(i64);
    return b->load.len == L * E * n && (!has_held || b->held.len == L * P * n) && b->rank_of_slot.len == P * n &&
           b->alive.len == R && b->domain.len == R * n && b->partner_start.len == (R + 1) * n &&
           b->partner.len >= ((const i64 *)b->partner_start.buf)[R] * n && (!has_limits || b->limits.len == L * 3 * n) &&
           b->rows.len == L * P * n && b->reference.len == L * P * n && b->covers.len == L * P && b->peak.len == L * n &&
           b->bound.len == L * n && b->stats.len == L * NUM_STATS * n && b->trace_moves.len == b->trace_peak.len;
}

/* Every layer into the output buffers. Returns -1, or the layer that failed. */
static i64 solve_all(Layer *s, Pour *p, Saved *saved, Limits *limits, const Buffers *b, i64 num_layers, int has_held,
                     int has_limits) {
    i64 E = s->num_experts, P = s->num_slots, room = b->trace_moves.len / (i64)sizeof(i64) / (num_layers > 0 ? num_layers : 1);
    for (i64 l = 0; l < num_layers; l++) {
        const i64 *most = (const i64 *)b->limits.buf + 3 * l;
        Trace trace = {(i64 *)b->trace_moves.buf + l * room, 0, room, (double *)b->trace_peak.buf + l * room};
        Outcome out;
        limits->spread = has_limits ? most[0] : -1;
        limits->fill = has_limits ? most[1] : -1;
        limits->refine = has_limits ? most[2] : -1;
        s->weight = (const double *)b->load.buf + l * E;
        if (solve_layer(s, p, has_held ? (const i64 *)b->held.buf + l * P : NULL, limits, saved, &trace, &out) < 0) return l;
        for (i64 t = 0; t < P; t++) {
            ((i64 *)b->rows.buf)[l * P + t] = s->place[t];
            ((i64 *)b->reference.buf)[l * P + t] = s->reference[t];
            ((u8 *)b->covers.buf)[l * P + t] = s->covers[t];
        }
        ((double *)b->peak.buf)[l] = out.peak;
        ((double *)b->bound.buf)[l] = out.bound;
        i64 stats[NUM_STATS] = {out.spread, out.fill, out.refine, out.fresh, trace.steps};
        memcpy((i64 *)b->stats.buf + NUM_STATS * l, stats, sizeof stats);
    }
    return -1;
}

static PyObject *py_solve(PyObject *self, PyObject *args) {
    Buffers b;
    Layer s;
    Limits limits;
    Saved saved;
    Py_ssize_t L, E, P, R, need;
    int has_held, has_limits;
    (void)self;
    memset(&b, 0, sizeof b);
    memset(&s, 0, sizeof s);
    if (!PyArg_ParseTuple(args, "nnnnnddddppy*y*y*y*y*y*y*y*w*w*w*w*w*w*w*w*", &L, &E, &P, &R, &need, &limits.tolerance,
                          &limits.fresh_tolerance, &limits.fresh_gain, &limits.quota_tolerance, &has_held, &has_limits, &b.load,
                          &b.held, &b.rank_of_slot, &b.alive, &b.domain, &b.partner_start, &b.partner, &b.limits, &b.rows,
                          &b.reference, &b.covers, &b.peak, &b.bound, &b.stats, &b.trace_moves, &b.trace_peak))
        return NULL;
    if (!are_sizes_right(&b, L, E, P, R, has_held, has_limits)) {
        release(&b.load, NUM_BUFFERS);
        PyErr_SetString(PyExc_ValueError, "buffers do not match the shape");
        return NULL;
    }
    s.num_experts = E;
    s.num_slots = P;
    s.num_ranks = R;
    s.need = need;
    s.rank_of_slot = b.rank_of_slot.buf;
    s.alive = b.alive.buf;
    s.domain = b.domain.buf;
    s.partner_start = b.partner_start.buf;
    s.partner = b.partner.buf;
    for (i64 t = 0; t < P; t++)
        s.num_live += s.alive[s.rank_of_slot[t]] && (t == 0 || s.rank_of_slot[t] != s.rank_of_slot[t - 1]);
    Pour p = {E, P, R, s.rank_of_slot, NULL, NULL, NULL, NULL, NULL};
    char *memory = malloc(lay_out(&s, NULL) + lay_out_pour(&p, NULL) + lay_out_saved(&saved, &s, NULL) + 64);
    i64 failed;
    if (!memory) {
        release(&b.load, NUM_BUFFERS);
        return PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS
    char *at = (char *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    at += lay_out(&s, at);
    at += lay_out_pour(&p, at);
    lay_out_saved(&saved, &s, at);
    set_world(&s);
    failed = solve_all(&s, &p, &saved, &limits, &b, L, has_held, has_limits);
    Py_END_ALLOW_THREADS
    free(memory);
    release(&b.load, NUM_BUFFERS);
    if (failed >= 0) return PyErr_Format(PyExc_AssertionError, "layer %lld has no slot for a lost expert", (long long)failed);
    Py_RETURN_NONE;
}

static PyObject *py_quota_units(PyObject *self, PyObject *args) {
    Py_buffer b[4]; /* load, rows, rank_of_slot, units out */
    Py_ssize_t L, E, P, R, rounds, units;
    double still;
    (void)self;
    memset(b, 0, sizeof b);
    if (!PyArg_ParseTuple(args, "nnnnnndy*y*y*w*", &L, &E, &P, &R, &rounds, &units, &still, &b[0], &b[1], &b[2], &b[3]))
        return NULL;
    i64 n = (i64)sizeof(i64);
    Pour p = {E, P, R, b[2].buf, NULL, NULL, NULL, NULL, NULL};
    char *memory = NULL;
    if (b[0].len != L * E * n || b[1].len != L * P * n || b[2].len != P * n || b[3].len != L * P * n)
        PyErr_SetString(PyExc_ValueError, "buffers do not match the shape");
    else if (!(memory = malloc(lay_out_pour(&p, NULL) + (size_t)P * sizeof(i32) + 64)))
        PyErr_NoMemory();
    if (!memory) {
        release(b, 4);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    char *at = (char *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    i32 *row = (i32 *)(at + lay_out_pour(&p, at));
    for (i64 l = 0; l < L; l++)
        quota_layer(&p, (const double *)b[0].buf + l * E, (const i64 *)b[1].buf + l * P, row, rounds, still, units,
                    (i64 *)b[3].buf + l * P);
    Py_END_ALLOW_THREADS
    free(memory);
    release(b, 4);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"solve", py_solve, METH_VARARGS, "Place every layer; see kernels.py."},
    {"quota_units", py_quota_units, METH_VARARGS, "Level rank loads by shares of tokens; see kernels.py."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
