"""The placement solver: every expert covered, replicas apart, load level, and as little moved as that takes.

One function serves the first placement, the repair after a death, the rebalance for a new load and the return of a rank. It is a pure
function of its arguments: whoever computes it gets the same plan.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.eplb import kernels
from elastic_ep.core.eplb.budget import share_out
from elastic_ep.core.eplb.degraded import assign_readers, choose_residents, from_compact, to_compact
from elastic_ep.core.eplb.kernels import Problem, Solution
from elastic_ep.core.eplb.partners import partner_ranks
from elastic_ep.core.eplb.plan import Asked, Found, Move, PlacementPlan, make_plan
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.load import as_array, as_load
from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.topology import Topology

__all__ = ["Move", "PlacementPlan", "solve_placement"]

QUOTA_PART = 0.25
"""part of the tolerance to which quotas must level a layer for it to need no balance moves"""


def solve_placement(
    load: Any,
    topology: Topology,
    active_ranks: Any,
    previous: ExpertPlacement | None = None,
    *,
    min_replicas: int = 1,
    spread: str = "rank",
    max_moves: int | None = None,
    tolerance: float = 0.02,
    split: str = "quotas",
) -> PlacementPlan:
    """Place all experts of all layers over the live slots.

    Example, two experts of load 3 and 1 on two ranks of two slots: both ranks hold both, and each takes half of each expert's tokens::

        plan = solve_placement([[3.0, 1.0]], Topology.uniform(2, 4), [1, 1])
        plan.placement.physical_to_logical_map  # [[0, 1, 0, 1]]
        plan.quotas                             # [[0.5, 0.5, 0.5, 0.5]]

    Args:
        load: [L, E] tokens per expert, or [T, L, E] snapshots that are summed.
        topology: ranks, slots and failure domains, dead ranks included.
        active_ranks: int [ep_size], 1 = alive.
        previous: what slots hold now; slots of dead ranks are ignored. None starts from nothing.
        min_replicas: replicas of each expert on distinct failure domains, before load counts.
        spread: the level of those domains: ``"rank"`` or one of ``topology.domains``.
        max_moves: moves at most; moves that cover a lost expert are made in any case.
        tolerance: with ``previous``, a layer whose peak is within this fraction of the bound is left as it is.
        split: how tokens will be split over replicas: by the plan's ``"quotas"`` (a layer that they level needs no moves), or ``"even"``.

    Raises:
        InvalidInputError: an argument that cannot be served, named with its value.
    """
    weights = as_load(load)
    alive = _check_arguments(weights, topology, active_ranks, previous, min_replicas, max_moves, tolerance, split)
    live_slots = alive[topology.rank_of_slot]
    held = None if previous is None else np.where(live_slots, previous.physical_to_logical_map, EMPTY)
    domain = topology.domain_ids(spread)
    asked = Asked(weights, topology, alive, held, min_replicas, domain)
    if int(live_slots.sum()) < weights.shape[1]:
        return make_plan(asked, _solve_degraded(asked, max_moves, tolerance))
    usable = alive & (np.asarray(topology.slots_per_rank) > 0)
    need = min(min_replicas, len(np.unique(domain[usable])))
    partners = partner_ranks(domain.tolist(), topology.slots_per_rank) if need > 1 else [[] for _ in range(topology.ep_size)]
    quota_tolerance = tolerance * QUOTA_PART if split == "quotas" else -1.0
    problem = Problem(topology.rank_of_slot, alive, domain, partners, need, tolerance, quota_tolerance)
    solution = _solve_within(problem, weights, held, max_moves)
    return make_plan(asked, Found(solution.rows, solution.reference, solution.covers, solution.bound, {}))


def _solve_degraded(asked: Asked, max_moves: int | None, tolerance: float) -> Found:
    """Fewer live slots than experts: the heaviest are placed, one slot each; the others are streamed, spread evenly over live ranks."""
    weights, topology, alive, held = asked.weights, asked.topology, asked.alive, asked.held
    live = int(alive[topology.rank_of_slot].sum())
    residents, num_exchanged = choose_residents(weights, live, held, tolerance, max_moves)
    rows = np.full((len(weights), topology.num_slots), EMPTY, dtype=np.int64)
    reference, covers = rows, np.zeros(rows.shape, dtype=np.bool_)
    if live:
        ranks = np.arange(topology.ep_size)
        problem = Problem(topology.rank_of_slot, alive, ranks, [[] for _ in ranks], 1, tolerance, -1.0)
        budget = None if max_moves is None else max(0, max_moves - num_exchanged)
        compact = None if held is None else to_compact(residents, held, weights.shape[1])
        solution = _solve_within(problem, np.take_along_axis(weights, residents, axis=1), compact, budget)
        rows, reference, covers = from_compact(residents, solution.rows), from_compact(residents, solution.reference), solution.covers
    bound = np.maximum(weights.sum(axis=1) / int(alive.sum()), weights.max(axis=1))
    return Found(rows, reference, covers, bound, assign_readers(weights, rows, topology.rank_of_slot, alive))


def _solve_within(problem: Problem, load: NDArray[np.float64], held: NDArray[np.int64] | None, max_moves: int | None) -> Solution:
    """Without limits; and once more with the moves shared out among layers if that made more than ``max_moves``."""
    # Scaled by a power of two, which is exact, so that no load is too large or too small to add up.
    exponent = int(np.frexp(load.max(initial=0.0))[1])
    solution = _solve_scaled(problem, np.ldexp(load, -exponent), held, max_moves)
    return replace(solution, peak=np.ldexp(solution.peak, exponent), bound=np.ldexp(solution.bound, exponent))


def _solve_scaled(problem: Problem, scaled: NDArray[np.float64], held: NDArray[np.int64] | None, max_moves: int | None) -> Solution:
    if held is None or max_moves is None:
        return kernels.solve_layers(problem, scaled, held)
    nothing = np.zeros((len(scaled), 3), dtype=np.int64)
    if max_moves == 0:
        return kernels.solve_layers(problem, scaled, held, nothing)
    full = kernels.solve_layers(problem, scaled, held, trace_steps=16 * len(problem.alive) + 64)
    mandatory = int(full.covers.sum())
    if mandatory + int((full.rows != full.reference).sum()) <= max_moves:
        return full
    return kernels.solve_layers(problem, scaled, held, share_out(full, max(0, max_moves - mandatory)))


def _check_arguments(
    weights: NDArray[np.float64],
    topology: Topology,
    active_ranks: Any,
    previous: ExpertPlacement | None,
    min_replicas: int,
    max_moves: int | None,
    tolerance: float,
    split: str,
) -> NDArray[np.bool_]:
    """Refuse what cannot be served; returns which ranks live, bool [ep_size]."""
    active = as_array(active_ranks)
    if active.shape != (topology.ep_size,):
        raise InvalidInputError(f"active_ranks has shape {active.shape}; expected ({topology.ep_size},)")
    if not (active != 0).any():
        raise InvalidInputError("no rank is alive; at least one must be")
    if min_replicas < 1:
        raise InvalidInputError(f"min_replicas is {min_replicas}; give 1 or more")
    if max_moves is not None and max_moves < 0:
        raise InvalidInputError(f"max_moves is {max_moves}; give 0 or more, or None for no limit")
    if not 0.0 <= tolerance < float("inf"):
        raise InvalidInputError(f"tolerance is {tolerance}; give a fraction of 0 or more")
    if split not in ("quotas", "even"):
        raise InvalidInputError(f"split is {split!r}; give 'quotas' or 'even'")
    if previous is not None:
        shape = (previous.num_layers, previous.num_slots, previous.num_logical_experts)
        wanted = (weights.shape[0], topology.num_slots, weights.shape[1])
        if shape != wanted:
            raise InvalidInputError(f"previous has (layers, slots, experts) {shape}; load and topology have {wanted}")
    return np.asarray(active != 0)
