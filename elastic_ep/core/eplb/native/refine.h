/* Lowering the peak step by step. Mirrors reference/refine.py. */

#ifndef ELASTIC_EP_REFINE_H
#define ELASTIC_EP_REFINE_H

#include "layer.h"

#define NEAREST 8   /* least loaded ranks whose steps are compared */
#define FARTHEST 64 /* least loaded ranks that are gone through, one by one, when those give nothing */

typedef struct {
    double score; /* how much the peak rank is relieved, as far as the target, per slot that changes */
    double after; /* highest load among the ranks concerned */
    i64 kind, a, b, x, cost;
} Step;

/* After each step: moves so far, and the peak. */
typedef struct {
    i64 *moves, steps, room;
    double *peak;
} Trace;

enum {
    NOTHING,
    SWAP,       /* exchange slots a and b */
    REPLICATE,  /* give slot b to another replica of slot a's expert */
    REDEDICATE, /* give slot a to a replica of expert x */
    RECOVER     /* cover a's lost expert in b instead, and give a back to x, what it held */
};

/* Keep a step if it is better: by score, then by the load it leaves. One that changes no slot more counts as half a slot. */
static inline void offer(Step *best, double top, double target, double floor, i64 left, i64 kind, i64 a, i64 b, i64 x, i64 cost,
                         double after) {
    if (top - after <= floor || cost > left) return;
    double reach = after > target ? after : target;
    double score = (top - reach) * (cost <= 0 ? 2.0 : cost == 1 ? 1.0 : 0.5); /* no step changes more than two */
    if (score > best->score || (score == best->score && after < best->after)) {
        best->score = score; best->after = after; best->kind = kind;
        best->a = a; best->b = b; best->x = x; best->cost = cost;
    }
}

/* How many slots more differ from the reference once a slot holds e. */
static inline i64 change(const Layer *s, i64 slot, i64 e) {
    return (e != s->reference[slot]) - (s->place[slot] != s->reference[slot]);
}

/* Slots of the peak rank whose experts rank j does not hold, into `mine`. Returns how many. */
static i64 list_mine(Layer *s, i64 m, i64 j, int counted) {
    i64 n = 0;
    for (i64 a = s->first[m]; a < s->last[m]; a++) {
        i64 e = s->place[a];
        if (e == FREE || s->on[e * s->num_ranks + j]) continue;
        Mine *x = &s->mine[n++];
        x->slot = (i32)a;
        x->expert = (i32)e;
        x->share = s->share[e];
        x->more = s->more[e];
        x->may_go = (u8)(s->need <= 1 || may_shift(s, e, m, j));
        x->is_touched = (u8)(counted && e != s->reference[a]);
    }
    return n;
}

/* Steps that take load from a slot of the peak rank to rank j. */
static void offer_pairs(Layer *s, Step *best, i64 m, i64 j, double target, double floor, i64 left, int counted) {
    i64 num_mine = list_mine(s, m, j, counted);
    double lm = s->load[m], lj = s->load[j];
    for (i64 b = s->first[j]; b < s->last[j]; b++) {
        i64 eb = s->place[b];
        if (eb == FREE) continue;
        double ub = s->share[eb];
        int blocked = s->on[eb * s->num_ranks + m], drop = may_drop(s, eb, j), is_touched = counted && eb != s->reference[b];
        if (!blocked && s->need > 1) blocked = !may_shift(s, eb, j, m);
        if (blocked && !drop) continue;
        double without = drop ? peak_without(s, b) : 0.0;
        if (drop && lm - without <= floor) drop = 0;
        for (i64 i = 0; i < num_mine; i++) {
            const Mine *a = &s->mine[i];
            if (drop) {
                double x = lm - a->share + a->more, y = lj - ub + a->more;
                if (y > x) x = y;
                if (without > x) x = without;
                offer(best, lm, target, floor, left, REPLICATE, a->slot, b, a->expert, counted ? change(s, b, a->expert) : 1, x);
            }
            if (!blocked && ub < a->share && a->may_go) {
                double x = lm - a->share + ub, y = lj - ub + a->share;
                if (y > x) x = y;
                if (lm - x <= floor) continue;
                i64 cost = 1;
                if (counted) cost = is_touched || a->is_touched ? change(s, a->slot, eb) + change(s, b, a->expert) : 2;
                offer(best, lm, target, floor, left, SWAP, a->slot, b, eb, cost, x);
            }
        }
    }
}

/* Steps that give a slot of the peak rank to a replica of another expert. */
static void offer_rededication(Layer *s, Step *best, i64 m, double target, double floor, i64 left, int counted) {
    i64 R = s->num_ranks;
    double lm = s->load[m];
    for (i64 a = s->first[m]; a < s->last[m]; a++) {
        i64 ea = s->place[a];
        if (ea == FREE || !may_drop(s, ea, m)) continue;
        double without = peak_without(s, a), base = lm - s->share[ea];
        if (lm - without <= floor) continue;
        for (i64 x = 0; x < s->num_experts; x++) {
            if (s->on[x * R + m]) continue;
            double after = base + s->more[x];
            if (without > after) after = without;
            offer(best, lm, target, floor, left, REDEDICATE, a, -1, x, counted ? change(s, a, x) : 1, after);
        }
    }
}

/* Steps that cover a lost expert elsewhere than on the peak rank, and give its slot back to what it held. */
static void offer_recovering(Layer *s, Step *best, i64 m, double target, double floor, i64 left) {
    i64 R = s->num_ranks;
    double lm = s->load[m];
    for (i64 a = s->first[m]; a < s->last[m]; a++) {
        i64 e = s->place[a], v = s->origin[a];
        if (!s->covers[a] || e != s->reference[a] || v == FREE || s->on[v * R + m]) continue;
        double ue = s->share[e], mine = lm - ue + s->more[v];
        if (lm - mine <= floor) continue;
        for (i64 i = 0; i < s->num_live; i++) {
            i64 j = s->live[i];
            if (s->on[e * R + j] || s->covered[j] >= s->cover_share) continue;
            for (i64 b = s->first[j]; b < s->last[j]; b++) {
                i64 vb = s->place[b];
                if (vb == FREE || vb == v || s->covers[b] || vb != s->origin[b] || s->spare[vb] <= 1) continue;
                if (!may_drop(s, vb, j)) continue;
                if (s->need > 1 && !may_shift(s, e, m, j)) continue;
                double after = s->load[j] - s->share[vb] + ue, without = peak_without(s, b);
                if (mine > after) after = mine;
                if (without > after) after = without;
                offer(best, lm, target, floor, left, RECOVER, a, b, v, 0, after);
            }
        }
    }
}

static void apply(Layer *s, const Step *step) {
    i64 a = step->a, b = step->b, ea = s->place[a];
    switch (step->kind) {
    case SWAP:
        exchange(s, a, b);
        break;
    case REPLICATE:
        clear(s, b);
        fill(s, b, ea);
        break;
    case REDEDICATE:
        clear(s, a);
        fill(s, a, step->x);
        break;
    case RECOVER: {
        i64 vb = s->place[b];
        clear(s, b); clear(s, a);
        fill(s, a, step->x); fill(s, b, ea);
        s->covers[a] = 0; s->covers[b] = 1;
        s->reference[a] = s->origin[a]; s->reference[b] = (i32)ea;
        s->spare[step->x]++; s->spare[vb]--;
        s->covered[s->rank_of_slot[a]]--; s->covered[s->rank_of_slot[b]]++;
        break;
    }
    }
}

/* ---- ranks by ascending load, the lowest first among equals ---- */

/* The NEAREST least loaded ranks but m, in order, into s->near. Returns how many. */
static i64 select_lightest(Layer *s, i64 m) {
    i32 *near = s->near;
    i64 n = 0;
    for (i64 i = 0; i < s->num_live; i++) {
        i64 r = s->live[i], at = n;
        if (r == m) continue;
        if (n < NEAREST) n++;
        else if (s->load[r] >= s->load[near[NEAREST - 1]]) continue;
        else at = NEAREST - 1;
        while (at > 0 && s->load[near[at - 1]] > s->load[r]) {
            near[at] = near[at - 1];
            at--;
        }
        near[at] = (i32)r;
    }
    return n;
}

static inline int is_lighter(const Layer *s, i32 a, i32 b) {
    return s->load[a] < s->load[b] || (s->load[a] == s->load[b] && a < b);
}

static void sift_down(const Layer *s, i32 *heap, i64 n, i64 i) {
    i32 item = heap[i];
    for (;;) {
        i64 c = 2 * i + 1;
        if (c >= n) break;
        if (c + 1 < n && is_lighter(s, heap[c + 1], heap[c])) c++;
        if (!is_lighter(s, heap[c], item)) break;
        heap[i] = heap[c];
        i = c;
    }
    heap[i] = item;
}

/* All live ranks but m as a heap in s->near. Returns how many. */
static i64 heap_lightest(Layer *s, i64 m) {
    i64 n = 0;
    for (i64 i = 0; i < s->num_live; i++)
        if (s->live[i] != m) s->near[n++] = s->live[i];
    for (i64 i = n / 2 - 1; i >= 0; i--) sift_down(s, s->near, n, i);
    return n;
}

static i64 pop_lightest(Layer *s, i64 *n) {
    i64 r = s->near[0];
    s->near[0] = s->near[--*n];
    if (*n > 0) sift_down(s, s->near, *n, 0);
    return r;
}

/* ---- */

/* Lower the peak until it is at most `target`, by steps that gain more than `floor`. `counted` steps are priced by the
 * slots that they change and may re-cover lost experts; others all cost one. Returns the moves made. */
static i64 refine(Layer *s, double target, i64 budget, double floor, int counted, Trace *trace) {
    i64 moves = 0, max_steps = 16 * s->num_live + 64;
    for (i64 n = 0; n < max_steps; n++) {
        i64 m = peak_rank(s);
        if (s->load[m] <= target) break;
        Step best = {0.0, INFINITY, NOTHING, -1, -1, -1, 0};
        if (counted) offer_recovering(s, &best, m, target, floor, budget - moves);
        offer_rededication(s, &best, m, target, floor, budget - moves, counted);
        double enough = s->load[m] - target; /* all that one step can gain, at the price of one move */
        i64 tried = select_lightest(s, m);
        for (i64 i = 0; i < tried && best.score < enough; i++)
            offer_pairs(s, &best, m, s->near[i], target, floor, budget - moves, counted);
        if (best.kind == NOTHING && tried == NEAREST) {
            i64 left = heap_lightest(s, m);
            for (i64 i = 0; i < FARTHEST && left > 0 && best.kind == NOTHING; i++) {
                i64 r = pop_lightest(s, &left);
                if (i >= NEAREST) offer_pairs(s, &best, m, r, target, floor, budget - moves, counted);
            }
        }
        if (best.kind == NOTHING) break;
        apply(s, &best);
        moves += best.cost;
        if (trace && trace->steps < trace->room) {
            trace->moves[trace->steps] = moves;
            trace->peak[trace->steps++] = s->load[peak_rank(s)];
        }
    }
    return moves;
}

#endif
