/* One layer's slots while they are being filled. Mirrors reference/layer.py. */

#ifndef ELASTIC_EP_LAYER_H
#define ELASTIC_EP_LAYER_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define FREE (-1)

typedef int64_t i64;
typedef int32_t i32;
typedef uint8_t u8;

static const i64 UNLIMITED = (i64)1 << 40;
static const double NO_LOAD_IS_MORE = 1e300; /* share of an expert that has no replica left */

/* An expert while it is being sorted. rank: the upper half of the key's bits, inverted. */
typedef struct {
    double key;
    uint32_t rank;
    i32 index;
} Keyed;

/* A slot of the peak rank while steps are sought: whether its expert may go to the rank in question, whether it differs
 * from before. */
typedef struct {
    i32 slot, expert;
    double share, more;
    u8 may_go, is_touched;
} Mine;

/* What all layers share, the state of the layer in work, and room to work in. E experts, P slots, R ranks, D = R domains
 * at most. */
typedef struct {
    i64 num_experts, num_slots, num_ranks, need;
    const i64 *rank_of_slot;                  /* [P], ascending */
    const i64 *domain;                        /* [R], failure domain of a rank */
    const i64 *partner_start, *partner;       /* partners of rank r: from partner_start[r] to before partner_start[r + 1] */
    const u8 *alive;                          /* [R] */
    const double *weight;                     /* [E], load of an expert */

    i64 num_live, live_slots;
    int is_feasible;                          /* whether all experts can have `need` distinct domains */
    i32 *live, *live_index;                   /* [R] ranks that are alive and have slots, ascending; where a rank is in it */
    i32 *first, *last;                        /* [R] the slots of a rank are first .. last - 1 */
    u8 *paired;                               /* [R, R] whether two ranks are partners */

    i32 *place, *next, *prev;                 /* [P] expert of a slot; neighbours in the list of its expert's slots */
    i32 *head, *count;                        /* [E] first slot of that list; replicas */
    u8 *on;                                   /* [E, R] whether a rank holds an expert */
    double *load;                             /* [R] */
    double *share, *more, *less;              /* [E] load of one replica now, with one replica more, with one fewer */
    i32 *origin, *reference;                  /* [P] what slots held; what they hold once lost experts are covered */
    u8 *covers;                               /* [P] slots that cover a lost expert */
    i64 *covered, cover_share;                /* [R] lost experts that each rank was given so far, in all layers, and may be */
    i32 *spare;                               /* [E] slots of origin that cover nothing */

    double *key;                              /* [E] */
    Keyed *sorted;                            /* [2 E] */
    i32 *counts, *order, *list;               /* [E] */
    i32 *near, *hidden, *row, *slots;         /* [R], [R], [P], [P] */
    i64 *room, *stamp, tick;                  /* [R], [R] */
    Mine *mine;                               /* [P] */
    double *bond;                             /* like partner: load of the experts that live on just these two ranks */
    double *tree;                             /* [2 leaves] winner tree over live ranks */
    i32 *winner;
    i64 leaves;
} Layer;

static inline void set_shares(Layer *s, i64 e) {
    double w = s->weight[e];
    i64 c = s->count[e];
    s->share[e] = c > 0 ? w / (double)c : 0.0;
    s->more[e] = w / (double)(c + 1);
    s->less[e] = c > 1 ? w / (double)(c - 1) : NO_LOAD_IS_MORE;
}

/* A slot gets an expert; shares and loads are left to the caller. */
static inline void attach(Layer *s, i64 slot, i64 e) {
    s->place[slot] = (i32)e;
    s->next[slot] = s->head[e];
    s->prev[slot] = -1;
    if (s->head[e] >= 0) s->prev[s->head[e]] = (i32)slot;
    s->head[e] = (i32)slot;
    s->count[e]++;
    s->on[e * s->num_ranks + s->rank_of_slot[slot]] = 1;
}

static inline void detach(Layer *s, i64 slot) {
    i64 e = s->place[slot];
    if (s->prev[slot] >= 0) s->next[s->prev[slot]] = s->next[slot];
    else s->head[e] = s->next[slot];
    if (s->next[slot] >= 0) s->prev[s->next[slot]] = s->prev[slot];
    s->count[e]--;
    s->on[e * s->num_ranks + s->rank_of_slot[slot]] = 0;
    s->place[slot] = FREE;
}

/* Put a replica into an empty slot; the other hosts give up their part. */
static void fill(Layer *s, i64 slot, i64 e) {
    double before = s->share[e], after = s->more[e];
    for (i32 t = s->head[e]; t >= 0; t = s->next[t]) s->load[s->rank_of_slot[t]] += after - before;
    attach(s, slot, e);
    set_shares(s, e);
    s->load[s->rank_of_slot[slot]] += after;
}

/* Take a replica out of its slot; the other hosts take over its part. */
static void clear(Layer *s, i64 slot) {
    i64 e = s->place[slot];
    double before = s->share[e], after = s->less[e];
    detach(s, slot);
    set_shares(s, e);
    s->load[s->rank_of_slot[slot]] -= before;
    for (i32 t = s->head[e]; t >= 0; t = s->next[t]) s->load[s->rank_of_slot[t]] += after - before;
}

/* Loads of ranks, summed slot by slot. */
static void set_loads(Layer *s) {
    for (i64 i = 0; i < s->num_live; i++) {
        i64 r = s->live[i];
        double sum = 0.0;
        for (i64 t = s->first[r]; t < s->last[r]; t++)
            if (s->place[t] != FREE) sum += s->share[s->place[t]];
        s->load[r] = sum;
    }
}

/* Nothing placed. */
static void reset(Layer *s) {
    i64 E = s->num_experts;
    memset(s->on, 0, (size_t)(E * s->num_ranks));
    memset(s->count, 0, sizeof(i32) * (size_t)E);
    for (i64 e = 0; e < E; e++) s->head[e] = -1;
    for (i64 t = 0; t < s->num_slots; t++) s->place[t] = FREE;
    for (i64 r = 0; r < s->num_ranks; r++) s->load[r] = 0.0;
}

/* Shares and loads of what was attached. */
static void settle(Layer *s) {
    for (i64 e = 0; e < s->num_experts; e++) set_shares(s, e);
    set_loads(s);
}

/* What slots hold. A second replica on one rank counts as nothing. */
static void take_held(Layer *s, const i64 *held) {
    reset(s);
    for (i64 i = 0; i < s->num_live; i++) {
        i64 r = s->live[i];
        for (i64 t = s->first[r]; t < s->last[r]; t++)
            if (held[t] != FREE && !s->on[held[t] * s->num_ranks + r]) attach(s, t, held[t]);
    }
    settle(s);
    memset(s->covers, 0, (size_t)s->num_slots);
    for (i64 t = 0; t < s->num_slots; t++) s->origin[t] = s->reference[t] = s->place[t];
    memcpy(s->spare, s->count, sizeof(i32) * (size_t)s->num_experts);
}

/* A row that was saved. */
static void take_row(Layer *s, const i32 *row) {
    reset(s);
    for (i64 t = 0; t < s->num_slots; t++)
        if (row[t] != FREE) attach(s, t, row[t]);
    settle(s);
}

/* The rank with the highest load, the lowest among equals. */
static i64 peak_rank(const Layer *s) {
    i64 best = s->live[0];
    double top = s->load[best];
    for (i64 i = 1; i < s->num_live; i++)
        if (s->load[s->live[i]] > top) { best = s->live[i]; top = s->load[best]; }
    return best;
}

/* Distinct failure domains of an expert's replicas, without one rank (-1: all), with another (-1: none). */
static i64 num_domains(Layer *s, i64 e, i64 without, i64 plus) {
    i64 n = 0, tick = ++s->tick;
    for (i32 t = s->head[e]; t >= 0; t = s->next[t]) {
        i64 r = s->rank_of_slot[t];
        if (r != without && s->stamp[s->domain[r]] != tick) { s->stamp[s->domain[r]] = tick; n++; }
    }
    if (plus >= 0 && s->stamp[s->domain[plus]] != tick) n++;
    return n;
}

static inline int is_partner(const Layer *s, i64 r, i64 other) { return s->paired[r * s->num_ranks + other]; }

/* Experts with fewer distinct domains than they need. */
static i64 count_short(Layer *s) {
    i64 n = 0;
    if (s->need > 1)
        for (i64 e = 0; e < s->num_experts; e++) n += num_domains(s, e, -1, -1) < s->need;
    return n;
}

/* Whether a replica may be dropped without breaking what its expert has of its due. */
static int may_drop(Layer *s, i64 e, i64 rank) {
    if (s->count[e] <= (s->need > 1 ? s->need : 1)) return 0;
    if (s->need <= 1) return 1;
    i64 has = num_domains(s, e, -1, -1);
    return num_domains(s, e, rank, -1) >= (has < s->need ? has : s->need);
}

/* Whether a replica may go from one rank to another: it keeps its distinct domains, and, where it has no replica to spare,
 * partners. */
static int may_shift(Layer *s, i64 e, i64 from, i64 to) {
    if (s->need <= 1) return 1;
    i64 has = num_domains(s, e, -1, -1);
    if (num_domains(s, e, from, to) < has) return 0;
    if (s->count[e] > s->need) return 1;
    for (i32 t = s->head[e]; t >= 0; t = s->next[t]) {
        i64 r = s->rank_of_slot[t];
        if (r != from && is_partner(s, from, r) && !is_partner(s, to, r)) return 0;
    }
    return 1;
}

/* The highest load among the other hosts of a slot's expert once that replica is gone; 0 if there is none. */
static double peak_without(const Layer *s, i64 slot) {
    i64 e = s->place[slot];
    double grown = s->less[e] - s->share[e], top = 0.0;
    for (i32 t = s->head[e]; t >= 0; t = s->next[t])
        if (t != slot) {
            double x = s->load[s->rank_of_slot[t]] + grown;
            if (x > top) top = x;
        }
    return top;
}

/* Exchange the experts of two slots. */
static void exchange(Layer *s, i64 a, i64 b) {
    i64 ea = s->place[a], eb = s->place[b];
    clear(s, b);
    clear(s, a);
    fill(s, a, eb);
    fill(s, b, ea);
}

#endif
