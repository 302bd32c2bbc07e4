/* One layer from its load to its row. Mirrors reference/solve.py. */

#ifndef ELASTIC_EP_SOLVE_H
#define ELASTIC_EP_SOLVE_H

#include "layer.h"
#include "pack.h"
#include "quotas.h"
#include "refine.h"
#include "repair.h"

#define REACH 0.8        /* a layer beyond the tolerance is brought within this part of it, so that the next drift finds room */
#define FRESH_FLOOR 1e-4 /* least gain of a step, as a part of the goal, from nothing */
#define HELD_FLOOR 1e-3  /* and where slots hold something */
#define SHAKE_SLOTS 128  /* rows of more slots are not shaken */
#define SHAKE_WORK 1024  /* slots times shakes */
#define SPREADS 4
#define PUSHES 8
#define PUSH_TRIES 8
#define CHECK_ROUNDS 16  /* rounds of pouring that tell whether quotas level a row, */
#define CHECK_STILL 3e-4 /* or until no part of an expert changes by more than this part of the goal */

typedef struct {
    double tolerance;       /* rows within this part of the goal are left alone */
    double fresh_tolerance; /* rows from nothing are refined to this part of the goal */
    double fresh_gain;      /* a row from nothing replaces a repaired one if its peak is lower by this part of the goal */
    double quota_tolerance; /* rows that quotas level to within this part of the goal are left alone; negative: do not ask */
    i64 spread, fill, refine; /* moves at most; all negative: no limit */
} Limits;

typedef struct {
    double peak, bound, goal; /* bound: no row has a lower peak; goal: none that gives every expert the replicas it needs */
    i64 spread, fill, refine, fresh; /* moves by phase; whether a row from nothing was taken */
} Outcome;

typedef struct {
    i32 *place, *reference, *spare;
    i64 *covered;
    u8 *covers;
} Saved;

static void save(const Layer *s, Saved *v) {
    size_t P = (size_t)s->num_slots;
    memcpy(v->place, s->place, sizeof(i32) * P);
    memcpy(v->reference, s->reference, sizeof(i32) * P);
    memcpy(v->spare, s->spare, sizeof(i32) * (size_t)s->num_experts);
    memcpy(v->covered, s->covered, sizeof(i64) * (size_t)s->num_ranks);
    memcpy(v->covers, s->covers, P);
}

static void restore(Layer *s, const Saved *v) {
    size_t P = (size_t)s->num_slots;
    take_row(s, v->place);
    memcpy(s->reference, v->reference, sizeof(i32) * P);
    memcpy(s->spare, v->spare, sizeof(i32) * (size_t)s->num_experts);
    memcpy(s->covered, v->covered, sizeof(i64) * (size_t)s->num_ranks);
    memcpy(s->covers, v->covers, P);
}

/* ---- from nothing ---- */

/* The next number of a fixed sequence, below n. */
static i64 draw(uint64_t *state, i64 n) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (i64)((*state >> 33) % (uint64_t)n);
}

static int may_exchange(Layer *s, i64 a, i64 b) {
    i64 ra = s->rank_of_slot[a], rb = s->rank_of_slot[b], ea = s->place[a], eb = s->place[b];
    if (ra == rb || ea == FREE || eb == FREE || s->on[ea * s->num_ranks + rb] || s->on[eb * s->num_ranks + ra]) return 0;
    return may_shift(s, ea, ra, rb) && may_shift(s, eb, rb, ra);
}

/* Small rows that are stuck above the target: disturb, refine, and keep what is better. */
static void shake(Layer *s, double target, double floor) {
    i64 n = s->live_slots, count = 0;
    if (n > SHAKE_SLOTS || s->num_live < 2) return;
    uint64_t state = 1;
    double best = s->load[peak_rank(s)];
    for (i64 t = 0; t < s->num_slots; t++)
        if (s->live_index[s->rank_of_slot[t]] >= 0) s->slots[count++] = (i32)t;
    memcpy(s->row, s->place, sizeof(i32) * (size_t)s->num_slots);
    for (i64 kick = 0; kick < SHAKE_WORK / n && best > target; kick++) {
        for (int i = 0; i < 2; i++) {
            i64 a = s->slots[draw(&state, n)], b = s->slots[draw(&state, n)], e = draw(&state, s->num_experts);
            i64 r = s->rank_of_slot[a];
            if (may_exchange(s, a, b)) exchange(s, a, b);
            else if (s->place[a] != FREE && !s->on[e * s->num_ranks + r] && may_drop(s, s->place[a], r)) {
                clear(s, a);
                fill(s, a, e);
            }
        }
        refine(s, target, UNLIMITED, floor, 0, NULL);
        double peak = s->load[peak_rank(s)];
        if (peak < best - floor) {
            best = peak;
            memcpy(s->row, s->place, sizeof(i32) * (size_t)s->num_slots);
        } else
            take_row(s, s->row);
    }
    take_row(s, s->row);
}

/* With counts as `solve_layer` left them. */
static void solve_fresh(Layer *s, double goal, const Limits *limits) {
    double target = goal * (1.0 + limits->fresh_tolerance), floor = goal * FRESH_FLOOR;
    reset(s);
    pack(s);
    if (s->need > 1) {
        spread(s, UNLIMITED);
        if (s->is_feasible && count_short(s)) {
            reset(s);
            pack_by_domains(s);
        }
        pair_up(s);
    }
    fill_free(s, UNLIMITED);
    refine(s, target, UNLIMITED, floor, 0, NULL);
    if (s->load[peak_rank(s)] > target) shake(s, target, floor);
    /* Refining may have opened a way to a domain that was closed. */
    for (int n = 0; n < SPREADS && s->need > 1 && spread(s, UNLIMITED); n++) refine(s, target, UNLIMITED, floor, 0, NULL);
}

/* ---- from what slots hold ---- */

static i64 count_changed(const Layer *s) {
    i64 n = 0;
    for (i64 t = 0; t < s->num_slots; t++) n += s->place[t] != s->reference[t];
    return n;
}

/* The slot that can take another replica of e and leaves the lowest peak, but after (`after`, `last`) in that order; -1:
 * none. */
static i64 next_best_slot(Layer *s, i64 e, double *after, i64 last) {
    i64 best = -1;
    double top = INFINITY;
    for (i64 i = 0; i < s->num_live; i++) {
        i64 r = s->live[i];
        if (s->on[e * s->num_ranks + r]) continue;
        for (i64 t = s->first[r]; t < s->last[r]; t++) {
            i64 v = s->place[t];
            if (v == FREE || s->covers[t] || !may_drop(s, v, r)) continue;
            double x = s->load[r] - s->share[v] + s->more[e], other = peak_without(s, t);
            if (other > x) x = other;
            if (x < *after || (x == *after && t <= last)) continue;
            if (x < top) { top = x; best = t; }
        }
    }
    *after = top;
    return best;
}

/* Where no single step helps because one expert needs another replica: give it one where it hurts least, and refine from
 * there. */
static void push(Layer *s, double target, double floor, Saved *saved) {
    for (int n = 0; n < PUSHES; n++) {
        i64 m = peak_rank(s), e = FREE, slot = -1;
        double before = s->load[m], after = -1.0;
        int is_better = 0;
        if (before <= target) return;
        for (i64 t = s->first[m]; t < s->last[m]; t++)
            if (s->place[t] != FREE && (e == FREE || s->share[s->place[t]] > s->share[e])) e = s->place[t];
        if (e == FREE) return;
        save(s, saved);
        for (int attempt = 0; attempt < PUSH_TRIES && !is_better; attempt++) {
            slot = next_best_slot(s, e, &after, slot);
            if (slot < 0) return;
            clear(s, slot);
            fill(s, slot, e);
            refine(s, target, UNLIMITED, floor, 1, NULL);
            is_better = s->load[peak_rank(s)] < before - floor;
            if (!is_better) restore(s, saved);
        }
        if (!is_better) return;
    }
}

/* Which rank's place each rank of the row takes, into s->hidden: ranks of the same size change places so that most experts
 * stay where `had` [E, R] has them. With more than one replica to keep apart all stay. */
static void match_ranks(Layer *s, const u8 *had) {
    i64 R = s->num_ranks, most = 0;
    i32 *place_of = s->hidden, *taken = s->near;
    for (i64 i = 0; i < s->num_live; i++) {
        i64 r = s->live[i], size = s->last[r] - s->first[r];
        place_of[r] = s->need > 1 ? (i32)r : -1;
        taken[r] = 0;
        if (size > most) most = size;
    }
    if (s->need > 1) return;
    for (i64 same = most; same >= 0; same--)
        for (i64 i = 0; i < s->num_live; i++)
            for (i64 j = 0; j < s->num_live && place_of[s->live[i]] < 0; j++) {
                i64 r = s->live[i], q = s->live[j], n = 0;
                if (taken[q] || s->last[q] - s->first[q] != s->last[r] - s->first[r]) continue;
                for (i64 t = s->first[r]; t < s->last[r]; t++) n += s->place[t] != FREE && had[s->place[t] * R + q];
                if (n != same) continue;
                place_of[r] = (i32)q;
                taken[q] = 1;
            }
}

/* The row with ranks and slots arranged so that most of them hold what the reference has there, into s->row. `on` is used
 * up. */
static void align(Layer *s) {
    i64 R = s->num_ranks;
    u8 *had = s->on;
    i32 *row = s->row;
    memset(had, 0, (size_t)(s->num_experts * R));
    for (i64 t = 0; t < s->num_slots; t++) {
        row[t] = FREE;
        if (s->reference[t] != FREE) had[s->reference[t] * R + s->rank_of_slot[t]] = 1;
    }
    match_ranks(s, had);
    for (i64 i = 0; i < s->num_live; i++) {
        i64 r = s->live[i], q = s->hidden[r], at = s->first[q];
        for (i64 t = s->first[r]; t < s->last[r]; t++) {
            if (s->place[t] == FREE || !had[s->place[t] * R + q]) continue;
            i64 u = s->first[q];
            while (s->reference[u] != s->place[t]) u++;
            row[u] = s->place[t];
        }
        for (i64 t = s->first[r]; t < s->last[r]; t++) {
            if (s->place[t] == FREE || had[s->place[t] * R + q]) continue;
            while (row[at] != FREE) at++;
            row[at++] = s->place[t];
        }
    }
}

/* Whether quotas bring every rank to `enough` or less. */
static int can_quotas_level(const Layer *s, Pour *p, double goal, double enough) {
    pour_evenly(p, s->weight, s->place);
    pour_all(p, s->weight, CHECK_ROUNDS, goal * CHECK_STILL, enough);
    for (i64 r = 0; r < s->num_ranks; r++)
        if (p->load[r] > enough) return 0;
    return 1;
}

/* A row from nothing in place of the repaired one, if it leaves fewer experts short of domains, or a peak that is lower by
 * far. */
static void try_fresh(Layer *s, const Limits *limits, int is_level, Saved *saved, Outcome *out) {
    i64 missing = count_short(s);
    if (is_level && !missing) return;
    save(s, saved);
    memset(s->covers, 0, (size_t)s->num_slots);
    solve_fresh(s, out->goal, limits);
    double peak = s->load[peak_rank(s)];
    i64 left = count_short(s);
    int is_better = left < missing || (left == missing && !is_level && peak < out->peak - out->goal * limits->fresh_gain);
    if (is_better) align(s);
    restore(s, saved);
    if (!is_better) return;
    take_row(s, s->row);
    out->peak = peak;
    out->fresh = 1;
}

static void solve_held(Layer *s, Pour *p, const Limits *limits, Saved *saved, Trace *trace, Outcome *out) {
    double goal = out->goal, target = goal * (1.0 + limits->tolerance), inner = goal * (1.0 + limits->tolerance * REACH);
    int limited = limits->refine >= 0;
    out->spread = spread(s, limited ? limits->spread : UNLIMITED);
    out->fill = fill_free(s, limited ? limits->fill : UNLIMITED);
    out->peak = s->load[peak_rank(s)];
    int is_level = out->peak <= target;
    if (!is_level && limits->quota_tolerance >= 0.0)
        is_level = can_quotas_level(s, p, goal, goal * (1.0 + limits->quota_tolerance));
    if (!is_level) {
        i64 before = count_changed(s);
        refine(s, inner, limited ? limits->refine : UNLIMITED, goal * HELD_FLOOR, 1, trace);
        if (!limited && s->load[peak_rank(s)] > target) push(s, inner, goal * HELD_FLOOR, saved);
        out->refine = count_changed(s) - before;
        out->peak = s->load[peak_rank(s)];
        is_level = out->peak <= target;
    }
    if (!limited) try_fresh(s, limits, is_level, saved, out);
}

/* Solve one layer. Returns 0, or -1 if a lost expert has nowhere to go, which cannot be with a slot for every expert. */
static int solve_layer(Layer *s, Pour *p, const i64 *held, const Limits *limits, Saved *saved, Trace *trace, Outcome *out) {
    memset(out, 0, sizeof *out);
    replica_counts(s, 1);
    out->bound = out->goal = even_bound(s);
    if (s->need > 1) {
        replica_counts(s, s->need);
        out->goal = even_bound(s);
    }
    memset(s->covers, 0, (size_t)s->num_slots);
    if (held) {
        take_held(s, held);
        if (cover(s) < 0) return -1;
        solve_held(s, p, limits, saved, trace, out);
    } else {
        for (i64 t = 0; t < s->num_slots; t++) s->reference[t] = FREE;
        solve_fresh(s, out->goal, limits);
        out->peak = s->load[peak_rank(s)];
    }
    return 0;
}

#endif
