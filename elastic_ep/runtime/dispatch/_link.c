/* The common case of a layer in one call each way: every peer shares its outbox, every frame is small, nothing is left over from before.
 *
 * A call sends this rank's frames and reads each peer's until all are whole. Whatever else happens (a full socket, end-of-file, another frame,
 * the interrupt, a signal, the time, numbers that do not hold), it stops without using up a byte of what it read, and says what it did
 * not send; `socket.py` goes on from there. The layout of a link is that of `link.py`, the layout of frames that of `frames.py`. */
#include "_native.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>

#define HEADER_BYTES 64
#define PREFIX_BYTES 32

typedef struct {
    int64_t own_rank, own_index, num_ranks, interrupt_fd, outbox, region_bytes, num_peers, unused;
} link_head_t;

typedef struct {
    int64_t rank, fd, ahead, capacity, cursor, inbox, region_bytes, unused;
} link_peer_t;

typedef struct {
    uint32_t flags, rows, pairs, zero;
    uint64_t length, zeros;
} frame_tail_t;

/* One peer's part of an exchange. */
typedef struct {
    const link_peer_t *peer;
    int64_t *cursor; /* begin and end of what is read and not used in `ahead` */
    char *out;
    int64_t out_bytes, sent;
    frame_tail_t in;
    const char *payload;
} turn_t;

typedef struct {
    Py_buffer view;
    const link_head_t *head;
    turn_t *turns;
    struct pollfd *polled;
    char prefix[PREFIX_BYTES];
    int64_t timeout_ms, bytes_sent, bytes_received;
} Exchange;

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int open_exchange(Exchange *x, PyObject *link, const char *prefix, Py_ssize_t prefix_bytes, int64_t timeout_ms) {
    memset(x, 0, sizeof(*x));
    if (PyObject_GetBuffer(link, &x->view, PyBUF_SIMPLE) < 0) return -1;
    x->head = x->view.buf;
    x->timeout_ms = timeout_ms;
    if (x->view.len < (Py_ssize_t)sizeof(link_head_t) || prefix_bytes != PREFIX_BYTES ||
        x->view.len != (Py_ssize_t)(sizeof(link_head_t) + x->head->num_peers * sizeof(link_peer_t))) {
        PyErr_SetString(PyExc_ValueError, "link or prefix has the wrong size");
        PyBuffer_Release(&x->view);
        return -1;
    }
    memcpy(x->prefix, prefix, PREFIX_BYTES);
    int64_t n = x->head->num_peers;
    x->turns = PyMem_Calloc(n + 1, sizeof(turn_t));
    x->polled = PyMem_Calloc(n + 1, sizeof(struct pollfd));
    if (x->turns == NULL || x->polled == NULL) {
        PyErr_NoMemory();
        PyMem_Free(x->turns);
        PyMem_Free(x->polled);
        PyBuffer_Release(&x->view);
        return -1;
    }
    const link_peer_t *peers = (const link_peer_t *)(x->head + 1);
    for (int64_t i = 0; i < n; i++) {
        x->turns[i].peer = &peers[i];
        x->turns[i].cursor = (int64_t *)(intptr_t)peers[i].cursor;
    }
    return 0;
}

static void close_exchange(Exchange *x) {
    for (int64_t i = 0; i < x->head->num_peers; i++) PyMem_RawFree(x->turns[i].out);
    PyMem_Free(x->turns);
    PyMem_Free(x->polled);
    PyBuffer_Release(&x->view);
}

/* The frame to a peer: a header and a payload that is copied. Returns 0 without memory. */
static int write_frame(Exchange *x, turn_t *turn, int64_t rows, int64_t pairs, const void *payload, int64_t payload_bytes) {
    frame_tail_t tail = {.flags = 1, .rows = (uint32_t)rows, .pairs = (uint32_t)pairs, .length = (uint64_t)payload_bytes};
    turn->out_bytes = HEADER_BYTES + payload_bytes;
    turn->out = PyMem_RawMalloc(turn->out_bytes);
    if (turn->out == NULL) return 0;
    memcpy(turn->out, x->prefix, PREFIX_BYTES);
    memcpy(turn->out + PREFIX_BYTES, &tail, sizeof(tail));
    memcpy(turn->out + HEADER_BYTES, payload, payload_bytes);
    return 1;
}

/* 1: `ahead` begins with a whole frame of this exchange; 0: more must come; -1: it is not for us to handle. */
static int look(const Exchange *x, turn_t *turn) {
    char *ahead = (char *)(intptr_t)turn->peer->ahead;
    /* at the front it is aligned, whatever was read before it */
    if (turn->cursor[0] > 0) {
        memmove(ahead, ahead + turn->cursor[0], turn->cursor[1] - turn->cursor[0]);
        turn->cursor[1] -= turn->cursor[0];
        turn->cursor[0] = 0;
    }
    const char *at = ahead;
    int64_t held = turn->cursor[1];
    if (memcmp(at, x->prefix, held < PREFIX_BYTES ? held : PREFIX_BYTES) != 0) return -1;
    if (held < HEADER_BYTES) return 0;
    memcpy(&turn->in, at + PREFIX_BYTES, sizeof(turn->in));
    if (turn->in.flags != 1 || turn->in.length > (uint64_t)(turn->peer->capacity - HEADER_BYTES)) return -1;
    turn->payload = at + HEADER_BYTES;
    return held >= (int64_t)(HEADER_BYTES + turn->in.length);
}

/* Read what is there. Returns as `look`. */
static int read_more(Exchange *x, turn_t *turn) {
    char *ahead = (char *)(intptr_t)turn->peer->ahead;
    for (;;) {
        ssize_t got = recv((int)turn->peer->fd, ahead + turn->cursor[1], turn->peer->capacity - turn->cursor[1], MSG_DONTWAIT);
        if (got < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -1;
        if (got == 0) return -1;
        turn->cursor[1] += got;
        x->bytes_received += got;
        int whole = look(x, turn);
        if (whole != 0) return whole;
    }
}

/* Send every frame and read until each peer's is whole: then 1, else 0. */
static int swap(Exchange *x) {
    int64_t n = x->head->num_peers, waiting = 0, deadline = now_ms() + x->timeout_ms;
    int ok = 1;
    for (int64_t i = 0; i < n; i++) {
        turn_t *turn = &x->turns[i];
        ssize_t took = send((int)turn->peer->fd, turn->out, turn->out_bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
        turn->sent = took > 0 ? took : 0;
        x->bytes_sent += turn->sent;
        if (turn->sent < turn->out_bytes) ok = 0;
    }
    for (int64_t i = 0; ok && i < n; i++) {
        int whole = look(x, &x->turns[i]);
        if (whole < 0) return 0;
        x->polled[i] = (struct pollfd){.fd = whole ? -1 : (int)x->turns[i].peer->fd, .events = POLLIN};
        waiting += !whole;
    }
    x->polled[n] = (struct pollfd){.fd = (int)x->head->interrupt_fd, .events = POLLIN};
    while (ok && waiting) {
        int64_t left = deadline - now_ms();
        if (left <= 0 || poll(x->polled, (nfds_t)(n + 1), left > 1 << 30 ? 1 << 30 : (int)left) <= 0 || x->polled[n].revents) return 0;
        for (int64_t i = 0; i < n; i++) {
            if (x->polled[i].fd < 0 || !x->polled[i].revents) continue;
            int whole = read_more(x, &x->turns[i]);
            if (whole < 0) return 0;
            if (whole > 0) {
                x->polled[i].fd = -1;
                waiting--;
            }
        }
    }
    return ok;
}

/* The frames were used. */
static void consume(Exchange *x) {
    for (int64_t i = 0; i < x->head->num_peers; i++) x->turns[i].cursor[0] += HEADER_BYTES + (int64_t)x->turns[i].in.length;
}

/* What of each frame was not sent, in the link's order. */
static PyObject *unsent(const Exchange *x) {
    int64_t n = x->head->num_peers;
    PyObject *list = PyList_New(n);
    for (int64_t i = 0; list != NULL && i < n; i++) {
        PyObject *rest = PyBytes_FromStringAndSize(x->turns[i].out + x->turns[i].sent, x->turns[i].out_bytes - x->turns[i].sent);
        if (rest == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, rest);
    }
    return list;
}

static inline char *region(int64_t base, int64_t region_bytes, int phase) { return (char *)(intptr_t)base + phase * region_bytes; }

/* Which source (own rank and peers together, ascending) a turn is. */
static inline int64_t source_index(const Exchange *x, int64_t turn) { return turn + (turn >= x->head->own_index); }

/* ---- dispatch */

typedef struct {
    int64_t *start; /* [num_ranks + 1] */
    pair_t *pairs;  /* [P] */
    int32_t *position;
} plan_t;

static Py_ssize_t plan_bytes(int64_t num_ranks, int64_t pairs) { return (num_ranks + 1) * 8 + pairs * 12; }

static plan_t open_plan(char *raw, int64_t num_ranks, int64_t pairs) {
    plan_t plan = {.start = (int64_t *)raw};
    plan.pairs = (pair_t *)(plan.start + num_ranks + 1);
    plan.position = (int32_t *)(plan.pairs + pairs);
    return plan;
}

typedef struct {
    int64_t *source_start; /* [peers + 2]: where each source's pairs begin, in order of arrival */
    int32_t *source_of, *row_of, *back;
} arrival_t;

static Py_ssize_t arrival_bytes(int64_t peers, int64_t rows) { return (peers + 2) * 8 + rows * 12; }

static arrival_t open_arrival(char *raw, int64_t peers, int64_t rows) {
    arrival_t a = {.source_start = (int64_t *)raw};
    a.source_of = (int32_t *)(a.source_start + peers + 2);
    a.row_of = a.source_of + rows;
    a.back = a.row_of + rows;
    return a;
}

/* Do all pairs stay on ranks that are linked? */
static int all_linked(const Exchange *x, const plan_t *plan) {
    int64_t linked = plan->start[x->head->own_rank + 1] - plan->start[x->head->own_rank];
    for (int64_t i = 0; i < x->head->num_peers; i++) linked += plan->start[x->turns[i].peer->rank + 1] - plan->start[x->turns[i].peer->rank];
    return linked == plan->start[x->head->num_ranks];
}

/* Group what came: fills `next` [experts] with where each expert's rows end. Returns the arrival, or NULL if a frame does not hold (no
 * exception set) or memory is short (exception set). */
static PyObject *group(Exchange *x, const plan_t *plan, int64_t tokens, int64_t row_bytes, const char *served, int64_t experts, int64_t *next) {
    int64_t n = x->head->num_peers, own = x->head->own_rank, total = plan->start[own + 1] - plan->start[own];
    if (!count_pairs(plan->pairs + plan->start[own], total, tokens, served, experts, next)) return NULL;
    for (int64_t i = 0; i < n; i++) {
        const turn_t *turn = &x->turns[i];
        if (turn->in.length != (uint64_t)turn->in.pairs * sizeof(pair_t) || (int64_t)turn->in.rows * row_bytes > turn->peer->region_bytes) return NULL;
        if (!count_pairs((const pair_t *)turn->payload, turn->in.pairs, turn->in.rows, served, experts, next)) return NULL;
        total += turn->in.pairs;
    }
    PyObject *result = PyBytes_FromStringAndSize(NULL, arrival_bytes(n, total));
    if (result == NULL) return NULL;
    arrival_t a = open_arrival(PyBytes_AS_STRING(result), n, total);
    for (int64_t e = 0; e < experts; e++) next[e + 1] += next[e];
    int64_t arrived = 0;
    for (int64_t s = 0; s <= n; s++) {
        const turn_t *turn = s == x->head->own_index ? NULL : &x->turns[s - (s > x->head->own_index)];
        const pair_t *pairs = turn == NULL ? (const pair_t *)(plan->pairs + plan->start[own]) : (const pair_t *)turn->payload;
        int64_t count = turn == NULL ? plan->start[own + 1] - plan->start[own] : turn->in.pairs;
        a.source_start[s] = arrived;
        place_pairs(pairs, count, (int32_t)s, next, a.source_of, a.row_of, a.back + arrived);
        arrived += count;
    }
    a.source_start[n + 1] = arrived;
    return result;
}

static int send_dispatch(Exchange *x, const plan_t *plan, const char *rows, int64_t tokens, int64_t row_bytes) {
    if (tokens) memcpy(region(x->head->outbox, x->head->region_bytes, 0), rows, tokens * row_bytes);
    for (int64_t i = 0; i < x->head->num_peers; i++) {
        int64_t begin = plan->start[x->turns[i].peer->rank], count = plan->start[x->turns[i].peer->rank + 1] - begin;
        if (!write_frame(x, &x->turns[i], tokens, count, plan->pairs + begin, count * sizeof(pair_t))) return -1;
    }
    return swap(x);
}

/* begin_dispatch(link, prefix, timeout_ms, x, tokens, row_bytes, ids, top_k, replica_rank, quota, stride, step, source, served)
 *
 * None if the input is not for this path (nothing was done). Else (plan, arrival, groups, None, sent, received) or, when the exchange is not
 * complete, (plan, None, None, unsent, sent, received). */
PyObject *begin_dispatch(PyObject *self, PyObject *args) {
    PyObject *link, *plan_object = NULL, *arrival = NULL, *groups = NULL, *rest = NULL, *result = NULL;
    const char *prefix;
    Py_ssize_t prefix_bytes;
    long long timeout_ms, tokens, row_bytes, top_k;
    unsigned long long rows, ids;
    Py_buffer replica_rank = {0}, quota = {0}, served = {0};
    double stride, step, source;
    Exchange x;
    int32_t *destination = NULL;
    int64_t *next = NULL;
    if (!PyArg_ParseTuple(args, "Oy#LKLLKLy*y*dddy*", &link, &prefix, &prefix_bytes, &timeout_ms, &rows, &tokens, &row_bytes, &ids, &top_k,
                          &replica_rank, &quota, &stride, &step, &source, &served))
        return NULL;
    if (open_exchange(&x, link, prefix, prefix_bytes, timeout_ms) < 0) goto release;
    int64_t pairs = tokens * top_k, experts = served.len, width = experts ? replica_rank.len / 4 / experts : 0;
    if (tokens < 0 || top_k < 1 || row_bytes < 1 || replica_rank.len != experts * width * 4 || quota.len != experts * width * 8) {
        PyErr_SetString(PyExc_ValueError, "begin_dispatch: the arrays' lengths do not fit each other");
        goto done;
    }
    plan_object = PyBytes_FromStringAndSize(NULL, plan_bytes(x.head->num_ranks, pairs));
    destination = PyMem_Malloc((pairs + 1) * sizeof(int32_t));
    next = PyMem_Calloc(experts + 1, sizeof(int64_t));
    if (plan_object == NULL || destination == NULL || next == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    plan_t plan = open_plan(PyBytes_AS_STRING(plan_object), x.head->num_ranks, pairs);
    const int64_t *id = (const int64_t *)(uintptr_t)ids;
    int whole = 0;
    if (tokens * row_bytes > x.head->region_bytes ||
        route(id, pairs, replica_rank.buf, quota.buf, experts, width, stride, step, source, destination) >= 0 ||
        depart(id, destination, pairs, top_k, x.head->num_ranks, plan.pairs, plan.position, plan.start) >= 0 || !all_linked(&x, &plan)) {
        result = Py_NewRef(Py_None);
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS;
    whole = send_dispatch(&x, &plan, (const char *)(uintptr_t)rows, tokens, row_bytes);
    Py_END_ALLOW_THREADS;
    if (whole < 0) {
        PyErr_NoMemory();
        goto done;
    }
    if (whole) {
        arrival = group(&x, &plan, tokens, row_bytes, served.buf, experts, next);
        if (arrival != NULL) groups = build_groups(next, experts);
        if (PyErr_Occurred()) goto done;
    }
    if (arrival != NULL)
        consume(&x);
    else if ((rest = unsent(&x)) == NULL)
        goto done;
#define OR_NONE(object) ((object) != NULL ? (object) : Py_None)
    result = Py_BuildValue("(OOOOLL)", plan_object, OR_NONE(arrival), OR_NONE(groups), OR_NONE(rest), (long long)x.bytes_sent,
                           (long long)x.bytes_received);
done:
    Py_XDECREF(plan_object);
    Py_XDECREF(arrival);
    Py_XDECREF(groups);
    Py_XDECREF(rest);
    PyMem_Free(destination);
    PyMem_Free(next);
    close_exchange(&x);
release:
    PyBuffer_Release(&replica_rank);
    PyBuffer_Release(&quota);
    PyBuffer_Release(&served);
    return result;
}

/* The sources of a phase: own rows, and the peers' inboxes as far as they reach. */
static void list_sources(const Exchange *x, int phase, const char *own, int64_t own_rows, int64_t row_bytes, source_t *sources) {
    sources[x->head->own_index] = (source_t){own, own_rows};
    for (int64_t i = 0; i < x->head->num_peers; i++) {
        const link_peer_t *peer = x->turns[i].peer;
        sources[source_index(x, i)] = (source_t){region(peer->inbox, peer->region_bytes, phase), peer->region_bytes / row_bytes};
    }
}

/* finish_dispatch(link, prefix, arrival, x, tokens, row_bytes, out, out_rows): copy the received rows to their places in `out`. */
PyObject *finish_dispatch(PyObject *self, PyObject *args) {
    PyObject *link, *result = NULL;
    const char *prefix, *arrival;
    Py_ssize_t prefix_bytes, size;
    unsigned long long rows, out;
    long long tokens, row_bytes, out_rows;
    Exchange x;
    if (!PyArg_ParseTuple(args, "Oy#y#KLLKL", &link, &prefix, &prefix_bytes, &arrival, &size, &rows, &tokens, &row_bytes, &out, &out_rows)) return NULL;
    if (open_exchange(&x, link, prefix, prefix_bytes, 0) < 0) return NULL;
    source_t *sources = PyMem_Calloc(x.head->num_peers + 1, sizeof(source_t));
    if (sources == NULL) {
        PyErr_NoMemory();
    } else if (row_bytes < 1 || size != arrival_bytes(x.head->num_peers, out_rows)) {
        PyErr_SetString(PyExc_ValueError, "finish_dispatch: the arrival is of another size");
    } else {
        arrival_t a = open_arrival((char *)arrival, x.head->num_peers, out_rows);
        list_sources(&x, 0, (const char *)(uintptr_t)rows, tokens, row_bytes, sources);
        PyThreadState *unlocked = out_rows * row_bytes > UNLOCK_BYTES ? PyEval_SaveThread() : NULL;
        int64_t bad = gather_rows((char *)(uintptr_t)out, sources, x.head->num_peers + 1, a.source_of, a.row_of, out_rows, row_bytes);
        if (unlocked) PyEval_RestoreThread(unlocked);
        if (bad >= 0)
            PyErr_SetString(PyExc_IndexError, "finish_dispatch: a row that no source has");
        else
            result = Py_NewRef(Py_None);
    }
    PyMem_Free(sources);
    close_exchange(&x);
    return result;
}

/* ---- combine */

typedef struct {
    source_t *sources;
    const char **rows;
    int32_t *source_of, *row_of; /* [P], by destination */
} Scratch;

static int send_combine(Exchange *x, const arrival_t *a, const char *outputs, int64_t num_rows, int64_t row_bytes) {
    char *outbox = region(x->head->outbox, x->head->region_bytes, 1);
    if (num_rows && outbox != outputs) memcpy(outbox, outputs, num_rows * row_bytes);
    for (int64_t i = 0; i < x->head->num_peers; i++) {
        int64_t s = source_index(x, i), begin = a->source_start[s], count = a->source_start[s + 1] - begin;
        if (!write_frame(x, &x->turns[i], num_rows, count, a->back + begin, count * sizeof(int32_t))) return -1;
    }
    return swap(x);
}

/* Where the output of each pair is to be read, in the plan's order. 0 if a frame does not hold. */
static int locate(const Exchange *x, const plan_t *plan, const arrival_t *a, int64_t row_bytes, Scratch *s) {
    int64_t own = x->head->own_rank, begin = plan->start[own], own_pairs = plan->start[own + 1] - begin;
    const int32_t *back = a->back + a->source_start[x->head->own_index];
    for (int64_t i = 0; i < own_pairs; i++) {
        s->source_of[begin + i] = (int32_t)x->head->own_index;
        s->row_of[begin + i] = back[i];
    }
    for (int64_t t = 0; t < x->head->num_peers; t++) {
        const turn_t *turn = &x->turns[t];
        int64_t at = plan->start[turn->peer->rank], count = plan->start[turn->peer->rank + 1] - at;
        if (turn->in.pairs != count || turn->in.length != (uint64_t)count * sizeof(int32_t)) return 0;
        if ((int64_t)turn->in.rows * row_bytes > turn->peer->region_bytes) return 0;
        for (int64_t i = 0; i < count; i++) {
            int32_t row;
            memcpy(&row, turn->payload + i * sizeof(row), sizeof(row));
            if (row < 0 || row >= (int64_t)turn->in.rows) return 0;
            s->source_of[at + i] = (int32_t)source_index(x, t);
            s->row_of[at + i] = row;
        }
    }
    return 1;
}

/* do_combine(link, prefix, timeout_ms, y, rows, hidden, is_half, plan, arrival, weights, tokens, top_k, out)
 *
 * None if the input is not for this path (nothing was done). Else (None, sent, received) with `out` written or, when the exchange is not
 * complete, (unsent, sent, received). */
PyObject *do_combine(PyObject *self, PyObject *args) {
    PyObject *link, *rest = NULL, *result = NULL;
    const char *prefix, *plan_raw, *arrival_raw;
    Py_ssize_t prefix_bytes, plan_size, arrival_size;
    long long timeout_ms, num_rows, hidden, tokens, top_k;
    unsigned long long outputs, weights, out;
    int is_half;
    Exchange x;
    if (!PyArg_ParseTuple(args, "Oy#LKLLpy#y#KLLK", &link, &prefix, &prefix_bytes, &timeout_ms, &outputs, &num_rows, &hidden, &is_half, &plan_raw,
                          &plan_size, &arrival_raw, &arrival_size, &weights, &tokens, &top_k, &out))
        return NULL;
    if (open_exchange(&x, link, prefix, prefix_bytes, timeout_ms) < 0) return NULL;
    Scratch s = {0};
    int64_t n = x.head->num_peers, pairs = tokens * top_k, row_bytes = hidden * (is_half ? 2 : 4), bad = -1;
    int whole = 0;
    if (tokens < 0 || top_k < 1 || row_bytes < 1 || plan_size != plan_bytes(x.head->num_ranks, pairs) || arrival_size != arrival_bytes(n, num_rows)) {
        PyErr_SetString(PyExc_ValueError, "do_combine: plan or arrival is of another size");
        goto done;
    }
    if (num_rows * row_bytes > x.head->region_bytes) {
        result = Py_NewRef(Py_None);
        goto done;
    }
    s.sources = PyMem_Calloc(n + 1, sizeof(source_t));
    s.rows = PyMem_Malloc(top_k * sizeof(char *));
    s.source_of = PyMem_Malloc((2 * pairs + 1) * sizeof(int32_t));
    if (s.sources == NULL || s.rows == NULL || s.source_of == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    s.row_of = s.source_of + pairs;
    plan_t plan = open_plan((char *)plan_raw, x.head->num_ranks, pairs);
    arrival_t a = open_arrival((char *)arrival_raw, n, num_rows);
    Py_BEGIN_ALLOW_THREADS;
    whole = send_combine(&x, &a, (const char *)(uintptr_t)outputs, num_rows, row_bytes);
    if (whole > 0) whole = locate(&x, &plan, &a, row_bytes, &s);
    if (whole > 0) {
        list_sources(&x, 1, (const char *)(uintptr_t)outputs, num_rows, row_bytes, s.sources);
        bad = sum_rows((char *)(uintptr_t)out, s.sources, n + 1, s.source_of, s.row_of, plan.position, (const float *)(uintptr_t)weights, tokens,
                       top_k, hidden, is_half, s.rows);
    }
    Py_END_ALLOW_THREADS;
    if (whole < 0) {
        PyErr_NoMemory();
        goto done;
    }
    if (bad >= 0) {
        PyErr_SetString(PyExc_IndexError, "do_combine: a row that no source has");
        goto done;
    }
    if (whole)
        consume(&x);
    else if ((rest = unsent(&x)) == NULL)
        goto done;
    result = Py_BuildValue("(OLL)", OR_NONE(rest), (long long)x.bytes_sent, (long long)x.bytes_received);
done:
    Py_XDECREF(rest);
    PyMem_Free(s.sources);
    PyMem_Free(s.rows);
    PyMem_Free(s.source_of);
    close_exchange(&x);
    return result;
}
