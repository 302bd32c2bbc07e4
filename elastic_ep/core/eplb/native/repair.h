/* What a row lacks: lost experts, distinct failure domains, partners, and use for empty slots. Mirrors
 * reference/repair.py. */

#ifndef ELASTIC_EP_REPAIR_H
#define ELASTIC_EP_REPAIR_H

#include "layer.h"
#include "pack.h"

/* Experts that no slot holds, heaviest first, into `list`. Returns how many. */
static i64 list_lost(Layer *s) {
    i64 n = 0;
    for (i64 e = 0; e < s->num_experts; e++) {
        if (s->count[e]) continue;
        i64 at = n++;
        while (at > 0 && s->weight[s->list[at - 1]] < s->weight[e]) {
            s->list[at] = s->list[at - 1];
            at--;
        }
        s->list[at] = (i32)e;
    }
    return n;
}

/* Where a lost expert raises the peak least, among equals on the rank that was given fewest so far: in an empty slot before others,
 * in that of an expert with a replica to spare before the rest, and on a rank that was not given its share yet before the others. -1:
 * nowhere, which cannot be with a slot for every expert. */
static i64 find_cover(Layer *s, i64 e) {
    i64 best = -1, grade_best = 6, taken_best = 0;
    double top = INFINITY;
    for (i64 i = 0; i < s->num_live; i++) {
        i64 r = s->live[i], taken = s->covered[r], is_full = taken >= s->cover_share;
        for (i64 t = s->first[r]; t < s->last[r]; t++) {
            i64 v = s->place[t], grade = is_full;
            double peak = s->load[r] + s->weight[e];
            if (v != FREE) {
                if (s->count[v] == 1 || s->spare[v] <= 1 || s->covers[t]) continue;
                grade += may_drop(s, v, r) ? 2 : 4;
                if (grade > grade_best) continue;
                double other = peak_without(s, t);
                peak -= s->share[v];
                if (other > peak) peak = other;
            }
            if (grade < grade_best || (grade == grade_best && (peak < top || (peak == top && taken < taken_best)))) {
                grade_best = grade;
                taken_best = taken;
                top = peak;
                best = t;
            }
        }
    }
    return best;
}

/* Cover one of a rank's lost experts where the other replica of what gave way to it is, which comes back instead: on the rank that was
 * given fewest, two fewer at least, then where it raises the peak least. Returns whether that could be done. */
static int pass_on(Layer *s, i64 rank) {
    i64 slot = -1, there = -1, fewest = 0;
    double top = 0.0;
    for (i64 t = s->first[rank]; t < s->last[rank]; t++) {
        i64 v = s->origin[t];
        if (!s->covers[t] || v == FREE || s->on[v * s->num_ranks + rank]) continue;
        double step = s->share[s->place[t]] - s->share[v];
        for (i32 b = s->head[v]; b >= 0; b = s->next[b]) {
            i64 r = s->rank_of_slot[b], given = s->covered[r];
            if (given + 2 > s->covered[rank] || s->covers[b] || !may_shift(s, v, r, rank)) continue;
            double x = s->load[rank] - step, y = s->load[r] + step, peak = x > y ? x : y;
            if (slot >= 0) {
                if (given != fewest) {
                    if (given > fewest) continue;
                } else if (peak != top) {
                    if (peak > top) continue;
                } else if (t != slot || b > there)
                    continue;
            }
            slot = t; there = b; fewest = given; top = peak;
        }
    }
    if (slot < 0) return 0;
    exchange(s, slot, there);
    s->covers[slot] = 0; s->covers[there] = 1;
    s->reference[slot] = s->origin[slot]; s->reference[there] = s->place[there];
    s->covered[rank]--; s->covered[s->rank_of_slot[there]]++;
    return 1;
}

/* A rank may be given so much more than an equal share of the lost experts: room to level the load. Mirrors MARGIN_PART. */
#define MARGIN_PART 8

/* Give every expert that no slot holds one. Returns 0, or -1 where that fails. */
static int cover(Layer *s) {
    i64 lost = list_lost(s), given = lost;
    for (i64 i = 0; i < s->num_live; i++) given += s->covered[s->live[i]];
    s->cover_share = (given + given / MARGIN_PART + s->num_live - 1) / s->num_live; /* who reads most is waited for */
    for (i64 i = 0; i < lost; i++) {
        i64 e = s->list[i], slot = find_cover(s, e);
        if (slot < 0) return -1;
        if (s->place[slot] != FREE) {
            s->spare[s->place[slot]]--;
            clear(s, slot);
        }
        fill(s, slot, e);
        s->covers[slot] = 1;
        s->covered[s->rank_of_slot[slot]]++;
        s->reference[slot] = (i32)e;
    }
    for (i64 i = 0; i < s->num_live; i++)
        while (s->covered[s->live[i]] > s->cover_share && pass_on(s, s->live[i])) {}
    return 0;
}

/* Where to bring an expert that needs a new failure domain. */
typedef struct {
    i64 off, slot, back; /* whether it is off its partners (2: no option yet), the slot, the slot given in exchange or -1 */
    double peak;
} Option;

static inline void consider(Option *best, i64 off, double peak, i64 slot, i64 back) {
    if (off != best->off) {
        if (off > best->off) return;
    } else if (peak != best->peak) {
        if (peak > best->peak) return;
    } else if (slot != best->slot) {
        if (slot > best->slot) return;
    } else if (back >= best->back)
        return;
    best->off = off;
    best->peak = peak;
    best->slot = slot;
    best->back = back;
}

/* Whether a rank is in a domain that an expert has not yet; `off` tells whether it is a partner of all its hosts. */
static int is_new_domain(Layer *s, i64 e, i64 r, i64 *off) {
    *off = 0;
    for (i32 t = s->head[e]; t >= 0; t = s->next[t]) {
        i64 q = s->rank_of_slot[t];
        if (s->domain[q] == s->domain[r]) return 0;
        if (!is_partner(s, r, q)) *off = 1;
    }
    return 1;
}

/* One more replica: into an empty slot or one whose expert can spare it. One move. */
static Option find_added(Layer *s, i64 e) {
    Option best = {2, -1, -1, INFINITY};
    double gain = s->more[e];
    for (i64 i = 0; i < s->num_live; i++) {
        i64 r = s->live[i], off;
        if (!is_new_domain(s, e, r, &off) || off > best.off) continue;
        for (i64 t = s->first[r]; t < s->last[r]; t++) {
            i64 v = s->place[t];
            double peak = s->load[r] + gain;
            if (v != FREE) {
                if (s->covers[t] || !may_drop(s, v, r)) continue;
                peak -= s->share[v];
                double other = peak_without(s, t);
                if (other > peak) peak = other;
            }
            consider(&best, off, peak, t, -1);
        }
    }
    return best;
}

/* Exchange a replica that shares its domain with another, or its place with no partner, for a slot elsewhere. Two moves. */
static Option find_exchange(Layer *s, i64 e, int for_partners) {
    Option best = {2, -1, -1, INFINITY};
    i64 has = num_domains(s, e, -1, -1);
    for (i32 b = s->head[e]; b >= 0; b = s->next[b]) {
        i64 q = s->rank_of_slot[b];
        if (s->covers[b] || (!for_partners && num_domains(s, e, q, -1) != has)) continue;
        for (i64 i = 0; i < s->num_live; i++) {
            i64 r = s->live[i], off = 0, ok = !s->on[e * s->num_ranks + r];
            for (i32 t = s->head[e]; t >= 0 && ok; t = s->next[t]) {
                i64 h = s->rank_of_slot[t];
                if (h == q) continue;
                ok = s->domain[h] != s->domain[r];
                if (!is_partner(s, r, h)) off = 1;
            }
            if (!ok || off > best.off || (for_partners && off)) continue;
            for (i64 t = s->first[r]; t < s->last[r]; t++) {
                i64 v = s->place[t];
                if (v == FREE || s->covers[t] || s->on[v * s->num_ranks + q] || !may_shift(s, v, r, q)) continue;
                double step = s->share[e] - s->share[v], x = s->load[r] + step, y = s->load[q] - step;
                double peak = x > y ? x : y;
                consider(&best, off, peak, t, b);
            }
        }
    }
    return best;
}

/* Bring experts to `need` distinct failure domains, level by level, heaviest first. Returns the moves made. */
static i64 spread(Layer *s, i64 budget) {
    i64 E = s->num_experts, moves = 0;
    for (i64 want = 2; want <= s->need; want++) {
        i64 listed = 0;
        i32 *list = s->list;
        sort_descending(s->weight, s->sorted, s->order, E);
        for (i64 i = 0; i < E; i++)
            if (num_domains(s, s->order[i], -1, -1) < want) list[listed++] = s->order[i];
        for (i64 li = 0; li < listed && moves < budget; li++) {
            i64 e = list[li];
            Option best = find_added(s, e);
            if (best.slot >= 0) {
                if (s->place[best.slot] != FREE) clear(s, best.slot);
                fill(s, best.slot, e);
                moves++;
                continue;
            }
            if (moves + 2 > budget) continue;
            best = find_exchange(s, e, 0);
            if (best.slot < 0) continue;
            exchange(s, best.slot, best.back);
            moves += 2;
        }
    }
    return moves;
}

/* Whether an expert with no replica to spare has hosts that are no partners. */
static int is_unpaired(const Layer *s, i64 e) {
    if (s->count[e] > s->need) return 0;
    for (i32 t = s->head[e]; t >= 0; t = s->next[t])
        for (i32 u = s->next[t]; u >= 0; u = s->next[u])
            if (!is_partner(s, s->rank_of_slot[t], s->rank_of_slot[u])) return 1;
    return 0;
}

/* Exchange replicas until experts live on partners where that can be had: few distinct sets of ranks then lose anything. */
static void pair_up(Layer *s) {
    for (i64 e = 0; e < s->num_experts; e++) {
        if (s->count[e] != 2 || !is_unpaired(s, e)) continue;
        Option best = find_exchange(s, e, 1);
        if (best.slot >= 0) exchange(s, best.slot, best.back);
    }
}

/* Spend empty slots, those of the least loaded rank first, on replicas that relieve the peak rank most; where none can, of
 * the expert whose replicas carry most (the one with fewest among equals). Returns the moves made. */
static i64 fill_free(Layer *s, i64 budget) {
    i64 E = s->num_experts, R = s->num_ranks, moves = 0, open = 0;
    i32 *slot_of = s->near;
    for (i64 i = 0; i < s->num_live; i++) {
        i64 r = s->live[i];
        slot_of[i] = -1;
        for (i64 t = s->last[r] - 1; t >= s->first[r]; t--)
            if (s->place[t] == FREE) slot_of[i] = (i32)t;
        open += slot_of[i] >= 0;
    }
    while (open && moves < budget) {
        i64 at = -1, best = -1;
        for (i64 i = 0; i < s->num_live; i++)
            if (slot_of[i] >= 0 && (at < 0 || s->load[s->live[i]] < s->load[s->live[at]])) at = i;
        i64 r = s->live[at], m = peak_rank(s);
        double relief = 0.0;
        for (i64 t = s->first[m]; t < s->last[m]; t++) {
            i64 e = s->place[t];
            if (e == FREE || s->on[e * R + r] || s->load[r] + s->more[e] > s->load[m]) continue;
            double d = s->share[e] - s->more[e];
            if (d > relief) { relief = d; best = e; }
        }
        if (best < 0)
            for (i64 e = 0; e < E; e++)
                if (!s->on[e * R + r] && (best < 0 || s->share[e] > s->share[best] ||
                                          (s->share[e] == s->share[best] && s->count[e] < s->count[best])))
                    best = e;
        if (best < 0) { slot_of[at] = -1; open--; continue; }
        fill(s, slot_of[at], best);
        moves++;
        i64 t = slot_of[at];
        while (t < s->last[r] && s->place[t] != FREE) t++;
        slot_of[at] = t < s->last[r] ? (i32)t : -1;
        open -= slot_of[at] < 0;
    }
    return moves;
}

#endif
