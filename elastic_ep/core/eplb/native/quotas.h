/* Token quotas of one layer. Mirrors reference/quotas.py. */

#ifndef ELASTIC_EP_QUOTAS_H
#define ELASTIC_EP_QUOTAS_H

#include "layer.h"

typedef struct {
    i64 num_experts, num_slots, num_ranks;
    const i64 *rank_of_slot;
    i32 *start, *slots; /* the slots of an expert: slots[start[e]] .. slots[start[e + 1] - 1], ascending */
    double *load, *part, *columns;
} Pour;

/* Even parts. */
static void pour_evenly(Pour *p, const double *weight, const i32 *row) {
    i64 E = p->num_experts, P = p->num_slots;
    memset(p->start, 0, sizeof(i32) * (size_t)(E + 1));
    for (i64 t = 0; t < P; t++)
        if (row[t] != FREE) p->start[row[t] + 1]++;
    for (i64 e = 0; e < E; e++) p->start[e + 1] += p->start[e];
    for (i64 t = 0; t < P; t++)
        if (row[t] != FREE) p->slots[p->start[row[t]]++] = (i32)t;
    for (i64 e = E; e > 0; e--) p->start[e] = p->start[e - 1];
    p->start[0] = 0;
    for (i64 r = 0; r < p->num_ranks; r++) p->load[r] = 0.0;
    for (i64 t = 0; t < P; t++) {
        p->part[t] = 0.0;
        if (row[t] == FREE) continue;
        i64 e = row[t];
        p->part[t] = weight[e] / (double)(p->start[e + 1] - p->start[e]);
        p->load[p->rank_of_slot[t]] += p->part[t];
    }
}

/* Level one expert over the ranks that hold it. Returns the largest change of a part. */
static double pour(Pour *p, double weight, i64 e) {
    i32 *held = p->slots + p->start[e];
    i64 n = p->start[e + 1] - p->start[e], c = 1;
    double *col = p->columns;
    for (i64 i = 0; i < n; i++) {
        double x = (p->load[p->rank_of_slot[held[i]]] -= p->part[held[i]]);
        i64 j = i;
        while (j > 0 && col[j - 1] > x) { col[j] = col[j - 1]; j--; }
        col[j] = x;
    }
    double rest = weight, level = col[0], moved = 0.0;
    while (c < n && (col[c] - level) * (double)c < rest) {
        rest -= (col[c] - level) * (double)c;
        level = col[c];
        c++;
    }
    level += rest / (double)c;
    for (i64 i = 0; i < n; i++) {
        double *load = &p->load[p->rank_of_slot[held[i]]];
        double part = level - *load;
        if (part < 0.0) part = 0.0;
        double d = fabs(part - p->part[held[i]]);
        if (d > moved) moved = d;
        p->part[held[i]] = part;
        *load += part;
    }
    return moved;
}

/* Pour every expert anew, up to `rounds` times, until nothing moves more than `still` or no rank has more than `enough`. */
static void pour_all(Pour *p, const double *weight, i64 rounds, double still, double enough) {
    for (i64 n = 0; n < rounds; n++) {
        double moved = 0.0, top = 0.0;
        for (i64 r = 0; r < p->num_ranks; r++)
            if (p->load[r] > top) top = p->load[r];
        if (top <= enough) break;
        for (i64 e = 0; e < p->num_experts; e++)
            if (p->start[e + 1] - p->start[e] > 1 && weight[e] > 0.0) {
                double d = pour(p, weight[e], e);
                if (d > moved) moved = d;
            }
        if (moved <= still) break;
    }
}

/* Whole numbers near units * part / sum of parts (even ones if there is none) that add up to `units`; the remainder goes
 * to the largest fractions, the first among equals. */
static void to_units(Pour *p, i64 e, i64 units, i64 *out) {
    i32 *held = p->slots + p->start[e];
    i64 n = p->start[e + 1] - p->start[e], rest = units;
    double *lack = p->columns, total = 0.0; /* lack: whole - exact */
    for (i64 i = 0; i < n; i++) total += p->part[held[i]];
    for (i64 i = 0; i < n; i++) {
        double exact = total > 0.0 ? (double)units * (p->part[held[i]] / total) : (double)units / (double)n;
        i64 whole = (i64)exact;
        out[held[i]] = whole;
        lack[i] = (double)whole - exact;
        rest -= whole;
    }
    while (rest != 0) {
        i64 at = -1, sign = rest > 0 ? 1 : -1;
        for (i64 i = 0; i < n; i++) {
            if (sign < 0 && out[held[i]] == 0) continue;
            if (at < 0 || (sign > 0 ? lack[i] < lack[at] : lack[i] > lack[at])) at = i;
        }
        out[held[at]] += sign;
        lack[at] += (double)sign;
        rest -= sign;
    }
}

/* Units of every slot of a row (0 where it holds nothing); `row` is room for it. */
static void quota_layer(Pour *p, const double *weight, const i64 *given, i32 *row, i64 rounds, double still, i64 units,
                        i64 *out) {
    double total = 0.0;
    for (i64 e = 0; e < p->num_experts; e++) total += weight[e];
    for (i64 t = 0; t < p->num_slots; t++) {
        row[t] = (i32)given[t];
        out[t] = 0;
    }
    pour_evenly(p, weight, row);
    pour_all(p, weight, rounds, still * total, 0.0);
    for (i64 e = 0; e < p->num_experts; e++)
        if (p->start[e + 1] > p->start[e]) to_units(p, e, units, out);
}

#endif
