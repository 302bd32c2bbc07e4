"""Sharing out a number of moves among layers: first what restores distinct domains, then empty slots, then the highest peaks."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.eplb.kernels import Solution


def share_out(full: Solution, budget: int) -> NDArray[np.int64]:
    """int64 [L, 3]: moves at most per layer for distinct domains, empty slots, balance, of a solution that would make more in all.

    Args:
        full: the solution without limits, its balance phases traced.
        budget: moves in all, those that cover lost experts not counted.
    """
    limits = np.zeros_like(full.moves)
    for phase in (0, 1):
        used = np.minimum(full.moves[:, phase], np.maximum(0, budget - (np.cumsum(full.moves[:, phase]) - full.moves[:, phase])))
        limits[:, phase] = used
        budget -= int(used.sum())
    # Each layer's steps in their order; next is always the layer with the highest peak beside its bound.
    bound = np.where(full.bound > 0, full.bound, 1.0)
    heap = [(-float("inf"), layer, 0) for layer in range(len(bound)) if full.steps[layer]]
    heapify(heap)
    while heap:
        _, layer, step = heappop(heap)
        cost = int(full.trace_moves[layer, step]) - int(limits[layer, 2])
        if cost > budget:
            continue
        limits[layer, 2] += cost
        budget -= cost
        if step + 1 < full.steps[layer]:
            heappush(heap, (-float(full.trace_peak[layer, step] / bound[layer]), layer, step + 1))
    return limits
