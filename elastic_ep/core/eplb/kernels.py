"""The solver's inner loops over all layers: arrays in, arrays out; compiled where that could be built, else in Python.

Both give the very same results: `tests/core/test_kernels.py` compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.eplb.reference.layer import FREE, World
from elastic_ep.core.eplb.reference.quotas import quota_units as quota_units_of_layer
from elastic_ep.core.eplb.reference.solve import Limits, solve_layer

native: ModuleType | None
try:
    from elastic_ep.core.eplb import _native as native
except ImportError:  # installed without a compiler
    native = None

FRESH_TOLERANCE = 0.0025
"""rows from nothing are refined to this part above the bound"""
FRESH_GAIN = 0.03
"""a row from nothing replaces a repaired one, at the price of moving most of it, if its peak is lower by this part of the bound"""
STILL = 1e-5
"""quotas are done when no part of an expert changes by more than this part of the layer's load"""


@dataclass(frozen=True)
class Problem:
    """What all layers share.

    Attributes:
        rank_of_slot: int64 [P], ascending.
        alive: bool [ep_size].
        domain: int64 [ep_size], failure domain of each rank, 0 <= domain < ep_size.
        partners: per rank, the ranks that should hold the other replicas of its experts.
        need: replicas on distinct domains.
        tolerance: with held slots, rows within this part of the bound are left alone.
        quota_tolerance: and rows that quotas level to within this; negative: not asked.
    """

    rank_of_slot: NDArray[np.int64]
    alive: NDArray[np.bool_]
    domain: NDArray[np.int64]
    partners: list[list[int]]
    need: int
    tolerance: float
    quota_tolerance: float


@dataclass
class Solution:
    """Arrays over layers.

    Attributes:
        rows: int64 [L, P], what slots are to hold.
        reference: int64 [L, P], what they hold once lost experts are covered and nothing else was done.
        covers: bool [L, P], slots of the reference that cover a lost expert.
        peak, bound: float64 [L], highest rank load with an even split, and the least that any placement can have.
        moves: int64 [L, 3], moves for distinct domains, empty slots, balance.
        fresh: bool [L], whether a row from nothing replaced the repaired one.
        trace_moves, trace_peak: [L, T], balance moves so far and peak after each step; steps: int64 [L], how many.
    """

    rows: NDArray[np.int64]
    reference: NDArray[np.int64]
    covers: NDArray[np.bool_]
    peak: NDArray[np.float64]
    bound: NDArray[np.float64]
    moves: NDArray[np.int64]
    fresh: NDArray[np.bool_]
    steps: NDArray[np.int64]
    trace_moves: NDArray[np.int64] = field(repr=False)
    trace_peak: NDArray[np.float64] = field(repr=False)


def solve_layers(
    problem: Problem,
    load: NDArray[np.float64],
    held: NDArray[np.int64] | None,
    limits: NDArray[np.int64] | None = None,
    trace_steps: int = 0,
    backend: ModuleType | None = native,
) -> Solution:
    """Place every layer, from nothing (``held`` None) or from what slots hold.

    Args:
        load: float64 [L, E], finite, 0 or more; a live slot for every expert.
        held: int64 [L, P], -1 for nothing and in dead slots.
        limits: int64 [L, 3], moves at most per layer for distinct domains, empty slots, balance.
        trace_steps: steps of each layer's balance phase that are recorded.
        backend: the compiled module, or None for the Python form.
    """
    solve = _solve_python if backend is None else _solve_native
    return solve(problem, np.ascontiguousarray(load), held, limits, trace_steps)


def _solve_native(
    problem: Problem, load: NDArray[np.float64], held: NDArray[np.int64] | None, limits: NDArray[np.int64] | None, trace_steps: int
) -> Solution:
    assert native is not None
    num_layers, num_experts = load.shape
    num_slots, num_ranks = len(problem.rank_of_slot), len(problem.alive)
    starts = np.concatenate(([0], np.cumsum([len(p) for p in problem.partners]))).astype(np.int64)
    none = np.zeros(0, dtype=np.int64)
    shape = (num_layers, num_slots)
    rows, reference, covers = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.bool_)
    peak, bound, stats = np.empty(num_layers), np.empty(num_layers), np.empty((num_layers, 5), dtype=np.int64)
    trace = (num_layers, trace_steps)
    trace_moves, trace_peak = np.zeros(trace, dtype=np.int64), np.zeros(trace)
    native.solve(
        num_layers,
        num_experts,
        num_slots,
        num_ranks,
        problem.need,
        problem.tolerance,
        FRESH_TOLERANCE,
        FRESH_GAIN,
        problem.quota_tolerance,
        held is not None,
        limits is not None,
        load,
        none if held is None else np.ascontiguousarray(held, dtype=np.int64),
        np.ascontiguousarray(problem.rank_of_slot, dtype=np.int64),
        np.ascontiguousarray(problem.alive, dtype=np.bool_),
        np.ascontiguousarray(problem.domain, dtype=np.int64),
        starts,
        np.array([r for p in problem.partners for r in p], dtype=np.int64),
        none if limits is None else np.ascontiguousarray(limits, dtype=np.int64),
        rows,
        reference,
        covers,
        peak,
        bound,
        stats,
        trace_moves,
        trace_peak,
    )
    fresh = stats[:, 3].astype(np.bool_)
    return Solution(rows, reference, covers, peak, bound, stats[:, :3], fresh, stats[:, 4], trace_moves, trace_peak)


def _solve_python(
    problem: Problem, load: NDArray[np.float64], held: NDArray[np.int64] | None, limits: NDArray[np.int64] | None, trace_steps: int
) -> Solution:
    world = World(
        problem.rank_of_slot.tolist(),
        problem.alive.tolist(),
        problem.domain.tolist(),
        problem.partners,
        problem.need,
        [0] * len(problem.alive),
    )
    out = []
    for index, weight in enumerate(load.tolist()):
        most = None if limits is None else (int(limits[index, 0]), int(limits[index, 1]), int(limits[index, 2]))
        limit = Limits(problem.tolerance, FRESH_TOLERANCE, FRESH_GAIN, problem.quota_tolerance, most)
        out.append(solve_layer(world, weight, None if held is None else held[index].tolist(), limit))
    shape = (len(out), len(problem.rank_of_slot))
    trace = (len(out), trace_steps)
    trace_moves, trace_peak = np.zeros(trace, dtype=np.int64), np.zeros(trace)
    steps = np.array([min(len(o.trace.moves), trace_steps) for o in out], dtype=np.int64)
    for index, o in enumerate(out):
        trace_moves[index, : steps[index]] = o.trace.moves[: steps[index]]
        trace_peak[index, : steps[index]] = o.trace.peak[: steps[index]]
    return Solution(
        np.array([o.row for o in out], dtype=np.int64).reshape(shape),
        np.array([o.reference for o in out], dtype=np.int64).reshape(shape),
        np.array([o.covers for o in out], dtype=np.bool_).reshape(shape),
        np.array([o.peak for o in out], dtype=np.float64),
        np.array([o.bound for o in out], dtype=np.float64),
        np.array([(o.spread, o.fill, o.refine) for o in out], dtype=np.int64).reshape(-1, 3),
        np.array([o.fresh for o in out], dtype=np.bool_),
        steps,
        trace_moves,
        trace_peak,
    )


def quota_units(
    load: NDArray[np.float64],
    rows: NDArray[np.int64],
    rank_of_slot: NDArray[np.int64],
    num_ranks: int,
    rounds: int,
    units: int,
    backend: ModuleType | None = native,
) -> NDArray[np.int64]:
    """int64 [L, P]: the share of its expert that each slot takes, in ``units`` parts, so that rank loads are level; 0 in empty slots."""
    if backend is None:
        slots = rank_of_slot.tolist()
        layers = zip(load.tolist(), rows.tolist(), strict=True)
        out = [quota_units_of_layer(w, r, slots, num_ranks, rounds, STILL, units) for w, r in layers]
        return np.array(out, dtype=np.int64).reshape(rows.shape)
    result = np.empty(rows.shape, dtype=np.int64)
    backend.quota_units(
        load.shape[0],
        load.shape[1],
        rows.shape[1],
        num_ranks,
        rounds,
        units,
        STILL,
        np.ascontiguousarray(load, dtype=np.float64),
        np.ascontiguousarray(rows, dtype=np.int64),
        np.ascontiguousarray(rank_of_slot, dtype=np.int64),
        result,
    )
    return result


__all__ = ["FREE", "Problem", "Solution", "native", "quota_units", "solve_layers"]
