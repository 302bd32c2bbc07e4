"""The solver's inner loops over all layers: array in, array out. The compiled form and `reference` give the very same results."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.eplb import reference
from elastic_ep.core.eplb.reference import FREE, Layer

UNLIMITED = 1 << 40


@dataclass(frozen=True)
class Problem:
    """What all layers share.

    Attributes:
        rank_of_slot: int64 [P].
        alive: bool [ep_size].
        domain: int64 [ep_size], failure domain of each rank at the level replicas are spread over.
        need: replicas on distinct domains.
    """

    rank_of_slot: NDArray[np.int64]
    alive: NDArray[np.bool_]
    domain: NDArray[np.int64]
    need: int


@dataclass(frozen=True)
class Solution:
    """Per layer: the row of slots, the slots that cover lost experts, and the bound on the peak."""

    rows: NDArray[np.int64]
    covering: NDArray[np.bool_]
    peak: NDArray[np.float64]
    bound: NDArray[np.float64]


def solve_layers(problem: Problem, load: NDArray[np.float64], held: NDArray[np.int64] | None, tolerance: float, budget: int) -> Solution:
    """Place every layer, from nothing (``held`` None) or from what slots hold."""
    num_layers, num_experts = load.shape
    num_slots = len(problem.rank_of_slot)
    live = int(problem.alive[problem.rank_of_slot].sum())
    rank_of_slot, alive, domain = problem.rank_of_slot.tolist(), problem.alive.tolist(), problem.domain.tolist()
    ranks_with_slots = len({rank_of_slot[s] for s in range(num_slots) if alive[rank_of_slot[s]]})
    rows = np.full((num_layers, num_slots), FREE, dtype=np.int64)
    covering = np.zeros((num_layers, num_slots), dtype=np.bool_)
    peak, bound = np.zeros(num_layers), np.zeros(num_layers)
    if held is not None:
        budget = max(0, budget - sum(num_experts - len(set(row[row >= 0].tolist())) for row in held))
    for index in range(num_layers):
        weight = load[index].tolist()
        counts = reference.replica_counts(weight, live, ranks_with_slots, problem.need)
        bound[index] = reference.even_bound(weight, counts, ranks_with_slots)
        start = [FREE] * num_slots if held is None else held[index].tolist()
        layer = Layer(weight, rank_of_slot, alive, domain, problem.need, start)
        if held is None:
            layer.pack(counts)
        layer.cover()
        if held is not None:
            covering[index, sorted(layer.pinned)] = True
        else:
            layer.pinned.clear()
        budget -= layer.spread(budget)
        budget -= layer.fill_free(budget)
        slack = 0.0 if held is None else tolerance
        gain = 1e-4 if held is None else 1e-3
        budget -= layer.refine(bound[index] * (1.0 + slack), budget, bound[index] * gain, 4 * len(alive))
        rows[index] = layer.place
        peak[index] = layer.load[layer.peak_rank()]
    return Solution(rows, covering, peak, bound)


def quota_units(
    load: NDArray[np.float64], rows: NDArray[np.int64], rank_of_slot: NDArray[np.int64], num_ranks: int, rounds: int, units: int
) -> NDArray[np.int64]:
    """int64 [L, P], see `reference.quota_units`."""
    slots = rank_of_slot.tolist()
    out = [reference.quota_units(w.tolist(), r.tolist(), slots, num_ranks, rounds, units) for w, r in zip(load, rows, strict=True)]
    return np.array(out, dtype=np.int64).reshape(rows.shape)
