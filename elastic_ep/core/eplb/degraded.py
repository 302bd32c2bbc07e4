"""Fewer live slots than experts: who keeps a slot, and which rank reads each of the others when a token needs it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.placement import EMPTY
from elastic_ep.core.topology import Topology


@dataclass
class Degraded:
    """A row per layer with one slot for each of its heaviest experts, and readers for the rest.

    Attributes:
        rows: int64 [L, P].
        covers: bool [L, P], slots that get an expert that had none.
        streamed: (layer, expert) -> live rank.
    """

    rows: NDArray[np.int64]
    covers: NDArray[np.bool_]
    streamed: dict[tuple[int, int], int]


def degrade(
    weights: NDArray[np.float64], topology: Topology, alive: NDArray[np.bool_], held: NDArray[np.int64] | None, budget: int
) -> Degraded:
    """The heaviest experts are resident, each once; the others are streamed, spread evenly over the live ranks.

    Args:
        held: int64 [L, P], what slots hold, -1 in dead ones; None places from nothing.
        budget: how many resident experts may give their slot to a heavier one. Using empty slots is not counted.
    """
    num_layers = len(weights)
    live = np.flatnonzero(alive[topology.rank_of_slot])
    rows = np.full((num_layers, topology.num_slots), EMPTY, dtype=np.int64)
    covers = np.zeros(rows.shape, dtype=np.bool_)
    for layer in range(num_layers):
        start = None if held is None else held[layer]
        rows[layer], covers[layer] = _use_free_slots(weights[layer], topology.rank_of_slot, live, start)
    exchanges = [x for layer in range(num_layers) for x in _exchanges(weights[layer], rows[layer], live, layer)]
    for _, layer, slot, expert in sorted(exchanges)[: max(0, budget)]:
        rows[layer, slot] = expert
        covers[layer, slot] = True
    return Degraded(rows, covers, _readers(weights, rows, topology.rank_of_slot, alive))


def _use_free_slots(
    weight: NDArray[np.float64], rank_of_slot: NDArray[np.int64], live: NDArray[np.int64], held: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """What a layer's slots hold, once each, and the heaviest of the other experts in the slots that are left, least loaded rank first."""
    row = np.full(len(rank_of_slot), EMPTY, dtype=np.int64)
    covers = np.zeros(len(row), dtype=np.bool_)
    if held is not None:
        experts, first = np.unique(np.where(held[live] == EMPTY, len(weight), held[live]), return_index=True)
        known = experts < len(weight)
        row[live[first[known]]] = experts[known]
    load = np.bincount(rank_of_slot[live], np.where(row[live] == EMPTY, 0.0, weight[row[live]]), int(rank_of_slot.max(initial=0)) + 1)
    free = [int(s) for s in live if row[s] == EMPTY]
    missing = np.setdiff1d(np.arange(len(weight)), row)
    for expert in missing[np.argsort(-weight[missing], kind="stable")][: len(free)]:
        slot = min(free, key=lambda s: (load[rank_of_slot[s]], s))
        free.remove(slot)
        row[slot], covers[slot] = expert, True
        load[rank_of_slot[slot]] += weight[expert]
    return row, covers


def _exchanges(
    weight: NDArray[np.float64], row: NDArray[np.int64], live: NDArray[np.int64], layer: int
) -> list[tuple[float, int, int, int]]:
    """(-gain, layer, slot, expert): the heaviest expert without a slot for the lightest with one, and so on while that gains."""
    missing = np.setdiff1d(np.arange(len(weight)), row)
    missing = missing[np.argsort(-weight[missing], kind="stable")]
    slots = live[np.argsort(weight[row[live]], kind="stable")]
    gains = [(float(weight[row[s]] - weight[e]), layer, int(s), int(e)) for s, e in zip(slots, missing, strict=False)]
    return [x for x in gains if x[0] < 0.0]


def _readers(
    weights: NDArray[np.float64], rows: NDArray[np.int64], rank_of_slot: NDArray[np.int64], alive: NDArray[np.bool_]
) -> dict[tuple[int, int], int]:
    """The rank that reads each expert without a slot: as many per rank, heaviest experts to the least loaded ranks."""
    streamed: dict[tuple[int, int], int] = {}
    total = dict.fromkeys(np.flatnonzero(alive).tolist(), 0)
    for layer, row in enumerate(rows):
        weight, slots = weights[layer], np.flatnonzero(row != EMPTY)
        load = np.bincount(rank_of_slot[slots], weight[row[slots]], len(alive))
        count = dict.fromkeys(total, 0)
        missing = np.setdiff1d(np.arange(len(weight)), row)
        for expert in missing[np.argsort(-weight[missing], kind="stable")].tolist():
            rank = min(count, key=lambda r: (count[r], load[r], total[r], r))
            streamed[layer, expert] = rank
            count[rank] += 1
            total[rank] += 1
            load[rank] += weight[expert]
    return streamed
