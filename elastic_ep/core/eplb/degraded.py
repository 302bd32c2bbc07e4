"""Fewer live slots than experts: who keeps a slot, and which rank reads each of the others when a token needs it.

Once it is known who is resident, placing the residents is the ordinary problem with as many experts as there are slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.placement import EMPTY


def choose_residents(
    weights: NDArray[np.float64], num_slots: int, held: NDArray[np.int64] | None, tolerance: float, budget: int | None
) -> tuple[NDArray[np.int64], int]:
    """int64 [L, num_slots], ascending: the experts of each layer that have a slot; and how many others had to give theirs up.

    The heaviest are resident. Where slots hold something, what they hold stays, the heaviest of the others fill up the slots that are
    left, and the lightest give way to experts that are heavier by more than ``tolerance``, ``budget`` of them at most.
    """
    order = np.argsort(-weights, axis=1, kind="stable")
    if held is None:
        return np.sort(order[:, :num_slots], axis=1), 0
    chosen = []
    exchanges: list[tuple[float, int, int, int]] = []  # (-gain, layer, expert that leaves, expert that comes)
    for layer, ranked in enumerate(order):
        is_held = np.isin(ranked, held[layer])
        resident = np.concatenate([ranked[is_held], ranked[~is_held]])[:num_slots]
        chosen.append(resident)
        waiting = ranked[~np.isin(ranked, resident)]
        leaving = resident[np.argsort(weights[layer, resident], kind="stable")]
        for out, back in zip(leaving.tolist(), waiting.tolist(), strict=False):
            if weights[layer, back] > weights[layer, out] * (1.0 + tolerance):
                exchanges.append((float(weights[layer, out] - weights[layer, back]), layer, out, back))
    done = sorted(exchanges)[:budget]
    for _, layer, out, back in done:
        chosen[layer] = np.where(chosen[layer] == out, back, chosen[layer])
    return np.sort(np.array(chosen, dtype=np.int64).reshape(len(weights), num_slots), axis=1), len(done)


def to_compact(residents: NDArray[np.int64], rows: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """Rows of expert ids as rows of positions in ``residents``; -1 for who is not resident."""
    position = np.full((len(rows), num_experts + 1), EMPTY, dtype=np.int64)
    np.put_along_axis(position, residents, np.broadcast_to(np.arange(residents.shape[1]), residents.shape), axis=1)
    return np.take_along_axis(position, np.where(rows == EMPTY, num_experts, rows), axis=1)


def from_compact(residents: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The inverse of `to_compact`."""
    if residents.shape[1] == 0:
        return np.full_like(rows, EMPTY)
    return np.where(rows == EMPTY, EMPTY, np.take_along_axis(residents, np.maximum(rows, 0), axis=1))


def assign_readers(
    weights: NDArray[np.float64], rows: NDArray[np.int64], rank_of_slot: NDArray[np.int64], alive: NDArray[np.bool_]
) -> dict[tuple[int, int], int]:
    """The live rank that reads each expert without a slot: as many per rank in every layer and over all, the heaviest to the least loaded
    of those that have fewest."""
    streamed: dict[tuple[int, int], int] = {}
    total = dict.fromkeys(np.flatnonzero(alive).tolist(), 0)
    for layer, row in enumerate(rows):
        weight, slots = weights[layer], np.flatnonzero(row != EMPTY)
        load = np.bincount(rank_of_slot[slots], weight[row[slots]], len(alive)).tolist()
        count = dict.fromkeys(total, 0)
        missing = np.setdiff1d(np.arange(len(weight)), row)
        for expert in missing[np.argsort(-weight[missing], kind="stable")].tolist():
            rank = min(count, key=lambda r: (count[r], total[r], load[r], r))
            streamed[layer, expert] = rank
            count[rank] += 1
            total[rank] += 1
            load[rank] += float(weight[expert])
    return streamed
