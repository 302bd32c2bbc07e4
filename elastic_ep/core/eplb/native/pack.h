/* A row from nothing: how many replicas, and where. Mirrors reference/pack.py. */

#ifndef ELASTIC_EP_PACK_H
#define ELASTIC_EP_PACK_H

#include "layer.h"

/* Put x in its place among the `at` entries before it. Equal keys keep their order. */
static inline void insert_sorted(Keyed *sorted, i64 at, Keyed x) {
    while (at > 0 && sorted[at - 1].key < x.key) {
        sorted[at] = sorted[at - 1];
        at--;
    }
    sorted[at] = x;
}

/* Experts by descending key (0 or more), equal ones by ascending index, into `order`; `sorted` has room for 2 n.
 *
 * The upper half of a double's bits nearly sorts it: radix sort by those, byte by byte, then insertion for what is left. */
static void sort_descending(const double *key, Keyed *sorted, i32 *order, i64 n) {
    enum { PASSES = 4, FEW = 24 };
    i64 start[PASSES][256];
    Keyed *from = sorted, *to = sorted + n;
    memset(start, 0, sizeof start);
    for (i64 i = 0; i < n; i++) {
        Keyed x = {key[i] + 0.0, 0, (i32)i};
        uint64_t bits;
        memcpy(&bits, &x.key, sizeof bits);
        x.rank = ~(uint32_t)(bits >> 32);
        from[i] = x;
        for (int p = 0; p < PASSES; p++) start[p][(x.rank >> (8 * p)) & 255]++;
    }
    for (int p = 0; p < PASSES && n > FEW; p++) {
        i64 sum = 0;
        for (i64 b = 0; b < 256; b++) {
            i64 count = start[p][b];
            start[p][b] = sum;
            sum += count;
        }
        for (i64 i = 0; i < n; i++) to[start[p][(from[i].rank >> (8 * p)) & 255]++] = from[i];
        Keyed *t = from;
        from = to;
        to = t;
    }
    for (i64 i = 1; i < n; i++)
        if (from[i - 1].key < from[i].key) insert_sorted(from, i, from[i]);
    for (i64 i = 0; i < n; i++) order[i] = from[i].index;
}

/* ---- the tree of least loaded ranks: leaf i is the i-th live rank, the lowest index wins among equals ---- */

static inline void tree_set(Layer *s, i64 i, double key) {
    i64 n = s->leaves + i;
    s->tree[n] = key;
    for (n >>= 1; n >= 1; n >>= 1) {
        i64 l = 2 * n, r = l + 1;
        int left = s->tree[l] <= s->tree[r];
        double k = left ? s->tree[l] : s->tree[r];
        i32 w = left ? s->winner[l] : s->winner[r];
        if (s->tree[n] == k && s->winner[n] == w) break;
        s->tree[n] = k;
        s->winner[n] = w;
    }
}

static void tree_start(Layer *s) {
    for (i64 i = 0; i < s->leaves; i++) {
        s->winner[s->leaves + i] = (i32)i;
        s->tree[s->leaves + i] = INFINITY;
    }
    for (i64 i = 0; i < s->num_live; i++) s->tree[s->leaves + i] = 0.0;
    for (i64 n = s->leaves - 1; n >= 1; n--) {
        int left = s->tree[2 * n] <= s->tree[2 * n + 1];
        s->tree[n] = left ? s->tree[2 * n] : s->tree[2 * n + 1];
        s->winner[n] = left ? s->winner[2 * n] : s->winner[2 * n + 1];
    }
}

/* ---- counts and the bound ---- */

/* Whether expert a should get the next replica rather than b: its replicas carry more; or as much, and it has fewer. */
static inline int is_hotter(const Layer *s, i32 a, i32 b) {
    if (s->key[a] != s->key[b]) return s->key[a] > s->key[b];
    return s->counts[a] != s->counts[b] ? s->counts[a] < s->counts[b] : a < b;
}

static void heap_down(const Layer *s, i32 *heap, i64 n, i64 i) {
    i32 item = heap[i];
    for (;;) {
        i64 c = 2 * i + 1;
        if (c >= n) break;
        if (c + 1 < n && is_hotter(s, heap[c + 1], heap[c])) c++;
        if (!is_hotter(s, heap[c], item)) break;
        heap[i] = heap[c];
        i = c;
    }
    heap[i] = item;
}

/* Replicas of each expert into `counts`, the load of one into `key`: first `need` of each as far as slots reach, heaviest
 * first, then one at a time to the expert whose replicas carry most. */
static void replica_counts(Layer *s, i64 need) {
    i64 E = s->num_experts, spare = s->live_slots - E, most = s->num_live, n = 0;
    i64 levels = need < most ? need : most;
    i32 *heap = s->order;
    for (i64 e = 0; e < E; e++) s->counts[e] = 1;
    if (levels > 1 && spare > 0) {
        sort_descending(s->weight, s->sorted, s->order, E);
        for (i64 level = 1; level < levels; level++)
            for (i64 i = 0; i < E && spare > 0; i++, spare--) s->counts[s->order[i]]++;
    }
    for (i64 e = 0; e < E; e++) {
        s->key[e] = s->weight[e] / (double)s->counts[e];
        if (s->counts[e] < most) heap[n++] = (i32)e;
    }
    if (spare <= 0) return;
    for (i64 i = n / 2 - 1; i >= 0; i--) heap_down(s, heap, n, i);
    while (spare > 0 && n > 0) {
        i32 e = heap[0];
        s->counts[e]++;
        spare--;
        s->key[e] = s->weight[e] / (double)s->counts[e];
        if (s->counts[e] >= most) heap[0] = heap[--n];
        if (n > 0) heap_down(s, heap, n, 0);
    }
}

/* No placement with these counts can have a lower peak: the mean rank load, or the heaviest replica. */
static double even_bound(const Layer *s) {
    double total = 0.0, top = 0.0;
    for (i64 e = 0; e < s->num_experts; e++) total += s->weight[e];
    for (i64 e = 0; e < s->num_experts; e++)
        if (s->key[e] > top) top = s->key[e];
    total /= (double)s->num_live;
    return total > top ? total : top;
}

/* ---- packing ---- */

/* Load that rank r shares with partners in domain d and with nobody else: what falls to it alone when that domain is lost. */
static double bond_with(const Layer *s, i64 r, i64 d) {
    double sum = 0.0;
    for (i64 i = s->partner_start[r]; i < s->partner_start[r + 1]; i++)
        if (s->domain[s->partner[i]] == d) sum += s->bond[i];
    return sum;
}

static void add_bond(Layer *s, i64 a, i64 b, double w) {
    for (i64 i = s->partner_start[a]; i < s->partner_start[a + 1]; i++)
        if (s->partner[i] == b) s->bond[i] += w;
    for (i64 i = s->partner_start[b]; i < s->partner_start[b + 1]; i++)
        if (s->partner[i] == a) s->bond[i] += w;
}

/* Whether the live rank at `at` has room and may take a replica of e in a new failure domain (those stamped with `tick`
 * are taken). */
static inline int is_open(const Layer *s, i64 at, i64 e, i64 tick) {
    i64 r = s->live[at];
    return s->near[at] < s->last[r] && !s->on[e * s->num_ranks + r] && s->stamp[s->domain[r]] != tick;
}

/* The least loaded rank in a new domain that is open. A live index, or -1. */
static i64 pick_elsewhere(const Layer *s, i64 e, i64 tick) {
    i64 best = -1;
    double top = INFINITY;
    for (i64 at = 0; at < s->num_live; at++)
        if (is_open(s, at, e, tick) && s->load[s->live[at]] < top) {
            top = s->load[s->live[at]];
            best = at;
        }
    return best;
}

/* The same among partners of rank `home`, counting what falls to them when `home`'s domain is lost; any rank if none is
 * open. */
static i64 pick_partner(const Layer *s, i64 home, i64 e, i64 tick) {
    i64 best = -1;
    double top = INFINITY;
    for (i64 i = s->partner_start[home]; i < s->partner_start[home + 1]; i++) {
        i64 r = s->partner[i], at = s->live_index[r];
        if (at < 0 || !is_open(s, at, e, tick)) continue;
        double there = bond_with(s, r, s->domain[home]), here = bond_with(s, home, s->domain[r]);
        double key = s->load[r] + (there > here ? there : here) + s->bond[i];
        if (key < top || (key == top && at < best)) { top = key; best = at; }
    }
    return best >= 0 ? best : pick_elsewhere(s, e, tick);
}

/* Fill an empty row with `counts` (loads in `key`): heaviest first, each replica to the least loaded rank that may take
 * it. Where distinct domains are needed, the second and later of the first `need` go to partners of the first, and all to
 * new domains while there are any. */
static void pack(Layer *s) {
    i64 E = s->num_experts;
    i32 *free_slot = s->near; /* next empty slot of the i-th live rank */
    sort_descending(s->key, s->sorted, s->order, E);
    tree_start(s);
    for (i64 i = 0; i < s->partner_start[s->num_ranks]; i++) s->bond[i] = 0.0;
    for (i64 i = 0; i < s->num_live; i++) free_slot[i] = s->first[s->live[i]];
    for (i64 oi = 0; oi < E; oi++) {
        i64 e = s->order[oi], want = s->counts[e], tick = ++s->tick, home = -1, num_hidden = 0;
        for (i64 c = 0; c < want; c++) {
            i64 at = -1;
            if (c > 0 && s->need > 1) at = c < s->need ? pick_partner(s, home, e, tick) : pick_elsewhere(s, e, tick);
            if (at < 0) {
                if (s->tree[1] == INFINITY) break;
                at = s->winner[1];
            }
            i64 r = s->live[at];
            attach(s, free_slot[at]++, e);
            s->load[r] += s->key[e];
            if (home < 0) home = r;
            else if (want == 2 && s->need == 2) add_bond(s, home, r, s->weight[e]);
            s->stamp[s->domain[r]] = tick;
            if (want == 1) {
                tree_set(s, at, free_slot[at] < s->last[r] ? s->load[r] : INFINITY);
                break;
            }
            tree_set(s, at, INFINITY); /* hidden until this expert is placed */
            s->hidden[num_hidden++] = (i32)at;
        }
        for (i64 i = 0; i < num_hidden; i++) {
            i64 at = s->hidden[i], r = s->live[at];
            if (free_slot[at] < s->last[r]) tree_set(s, at, s->load[r]);
        }
    }
    settle(s);
}

/* The same, with the first `need` replicas of all experts placed before any other, each in the domains with most room
 * left. That finds distinct domains for all whenever there are any (Gale and Ryser), where `pack` may paint itself into a
 * corner. */
static void pack_by_domains(Layer *s) {
    i64 E = s->num_experts, R = s->num_ranks;
    i32 *free_slot = s->near;
    sort_descending(s->key, s->sorted, s->order, E);
    for (i64 d = 0; d < R; d++) s->room[d] = 0;
    for (i64 at = 0; at < s->num_live; at++) {
        i64 r = s->live[at];
        free_slot[at] = s->first[r];
        s->room[s->domain[r]] += s->last[r] - s->first[r];
    }
    for (int extra = 0; extra < 2; extra++)
        for (i64 oi = 0; oi < E; oi++) {
            i64 e = s->order[oi], tick = ++s->tick, base = s->counts[e] < s->need ? s->counts[e] : s->need;
            for (i64 c = 0; c < (extra ? s->counts[e] - base : base); c++) {
                i64 best = -1, top = -1;
                for (i64 at = 0; at < s->num_live; at++) {
                    i64 r = s->live[at], room = extra ? 0 : s->room[s->domain[r]];
                    if (!is_open(s, at, e, extra ? -1 : tick)) continue;
                    if (room > top || (room == top && s->load[r] < s->load[s->live[best]])) { top = room; best = at; }
                }
                if (best < 0) break;
                i64 r = s->live[best];
                attach(s, free_slot[best]++, e);
                s->load[r] += s->key[e];
                s->stamp[s->domain[r]] = tick;
                s->room[s->domain[r]]--;
            }
        }
    settle(s);
}

#endif
