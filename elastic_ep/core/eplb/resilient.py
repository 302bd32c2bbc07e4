"""The placement solver: every expert covered, replicas apart, load level, and as little moved as that takes.

One function serves the first placement, the repair after a death, the rebalance for a new load and the return of a rank. It is a pure
function of its arguments; whoever computes it gets the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.eplb import kernels
from elastic_ep.core.eplb.kernels import Problem
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.load import as_array, as_load
from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.quotas import balance_of, level_quotas, rank_loads
from elastic_ep.core.topology import Topology


class Move(NamedTuple):
    """Load ``expert`` into physical slot ``slot`` of ``layer``."""

    layer: int
    slot: int
    expert: int


@dataclass(frozen=True, eq=False)
class PlacementPlan:
    """A placement, how to split tokens over it, and what has to be loaded to get there.

    Attributes:
        placement: what every slot is to hold; dead ranks' slots are empty.
        quotas: float64 [L, P], multiples of 2^-16 that add up to exactly 1 per resident expert; 0 in empty slots.
        move_table: int64 [N, 3] of (layer, slot, expert), in the order to do them. The first ``num_mandatory`` cover lost experts:
            after them, and before any other, every resident expert has a live replica.
        num_mandatory: moves without which an expert has no replica.
        lost: (layer, expert) pairs that no live slot held before.
        streamed: (layer, expert) -> live rank that reads it when a token needs it; empty unless slots are too few.
        balance: mean over layers of mean / highest rank load, tokens split evenly over replicas.
        balance_with_quotas: the same with ``quotas``.
        bound: the balance that no placement with even split over these slots can exceed.
        shortfall: experts over all layers with fewer than ``min_replicas`` replicas on distinct domains.
        reasons: one line per class of decision.
    """

    placement: ExpertPlacement
    quotas: NDArray[np.float64]
    move_table: NDArray[np.int64]
    num_mandatory: int
    lost: tuple[tuple[int, int], ...]
    streamed: dict[tuple[int, int], int]
    balance: float
    balance_with_quotas: float
    bound: float
    shortfall: int
    reasons: tuple[str, ...]

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """`move_table` as records."""
        return tuple(Move(*row) for row in self.move_table.tolist())

    @property
    def is_degraded(self) -> bool:
        """Whether some experts have no slot."""
        return bool(self.streamed)


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
) -> PlacementPlan:
    """Place all experts of all layers over the live slots.

    Args:
        load: [L, E] tokens per expert, or [T, L, E] snapshots that are summed.
        topology: ranks, slots and failure domains, dead ranks included.
        active_ranks: int [ep_size], 1 = alive.
        previous: what slots hold now; slots of dead ranks are ignored. None starts from nothing.
        min_replicas: replicas of each expert on distinct failure domains, before load counts.
        spread: the level of those domains: ``"rank"`` or one of ``topology.domains``.
        max_moves: moves at most; moves that cover a lost expert are made in any case.
        tolerance: with ``previous``, a layer whose peak is within this fraction of the bound is left as it is.

    Raises:
        InvalidInputError: an argument that cannot be served, named with its value.
    """
    weights = as_load(load)
    alive = _check_arguments(weights, topology, active_ranks, previous, min_replicas, max_moves, tolerance)
    problem = Problem(topology.rank_of_slot, alive, topology.domain_ids(spread), min_replicas)
    live_slots = alive[topology.rank_of_slot]
    held = None if previous is None else np.where(live_slots, previous.physical_to_logical_map, EMPTY)
    streamed: dict[tuple[int, int], int] = {}
    if int(live_slots.sum()) < weights.shape[1]:
        rows, covering, streamed = _degrade(weights, topology, alive, held)
        bound = np.maximum(weights.sum(axis=1) / max(1, int(alive.sum())), weights.max(axis=1, initial=0.0))
    else:
        solution = kernels.solve_layers(problem, weights, held, tolerance, kernels.UNLIMITED if max_moves is None else max_moves)
        rows, covering, bound = solution.rows, solution.covering, solution.bound
    placement = ExpertPlacement(rows, weights.shape[1])
    quotas = level_quotas(weights, placement, topology)
    return _assemble(weights, topology, problem, held, placement, quotas, covering, streamed, bound)


def _check_arguments(
    weights: NDArray[np.float64],
    topology: Topology,
    active_ranks: Any,
    previous: ExpertPlacement | None,
    min_replicas: int,
    max_moves: int | None,
    tolerance: float,
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
    if previous is not None:
        shape = (previous.num_layers, previous.num_slots, previous.num_logical_experts)
        wanted = (weights.shape[0], topology.num_slots, weights.shape[1])
        if shape != wanted:
            raise InvalidInputError(f"previous has (layers, slots, experts) {shape}; load and topology have {wanted}")
    return np.asarray(active != 0)


def _degrade(
    weights: NDArray[np.float64], topology: Topology, alive: NDArray[np.bool_], held: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.bool_], dict[tuple[int, int], int]]:
    """Fewer slots than experts: the heaviest experts keep or get a slot, the others are streamed, spread evenly over live ranks."""
    num_layers = weights.shape[0]
    live_slots = np.flatnonzero(alive[topology.rank_of_slot])
    ranks = np.flatnonzero(alive)
    rows = np.full((num_layers, topology.num_slots), EMPTY, dtype=np.int64)
    covering = np.zeros(rows.shape, dtype=np.bool_)
    streamed: dict[tuple[int, int], int] = {}
    for layer in range(num_layers):
        order = np.argsort(-weights[layer], kind="stable")
        resident = set(order[: len(live_slots)].tolist())
        homeless = list(order[: len(live_slots)].tolist())
        rank_load = dict.fromkeys(ranks.tolist(), 0.0)
        free: list[int] = []
        for slot in live_slots.tolist():
            expert = EMPTY if held is None else int(held[layer, slot])
            if expert in resident:
                rows[layer, slot] = expert
                resident.discard(expert)
                homeless.remove(expert)
                rank_load[int(topology.rank_of_slot[slot])] += weights[layer, expert]
            else:
                free.append(slot)
        for expert in homeless:
            slot = min(free, key=lambda s: (rank_load[int(topology.rank_of_slot[s])], s))
            free.remove(slot)
            rows[layer, slot] = expert
            covering[layer, slot] = True
            rank_load[int(topology.rank_of_slot[slot])] += weights[layer, expert]
        count = dict.fromkeys(ranks.tolist(), 0)
        for expert in order[len(live_slots) :].tolist():
            rank = min(count, key=lambda r: (count[r], rank_load[r], r))
            streamed[layer, expert] = rank
            count[rank] += 1
            rank_load[rank] += weights[layer, expert]
    return rows, covering, streamed


def _assemble(
    weights: NDArray[np.float64],
    topology: Topology,
    problem: Problem,
    held: NDArray[np.int64] | None,
    placement: ExpertPlacement,
    quotas: NDArray[np.float64],
    covering: NDArray[np.bool_],
    streamed: dict[tuple[int, int], int],
    bound: NDArray[np.float64],
) -> PlacementPlan:
    rows = placement.physical_to_logical_map
    changed = rows != EMPTY if held is None else (rows != EMPTY) & (rows != held)
    covering = changed & (covering if held is not None else _first_replicas(rows, placement.num_logical_experts))
    first, rest = np.argwhere(covering), np.argwhere(changed & ~covering)
    order = np.concatenate([first, rest])
    table = np.column_stack([order, rows[order[:, 0], order[:, 1]]]).astype(np.int64)
    lost: tuple[tuple[int, int], ...] = ()
    if held is not None:
        lost = tuple(ExpertPlacement(held, placement.num_logical_experts).missing_experts())
    ranks = np.flatnonzero(problem.alive & (np.asarray(topology.slots_per_rank) > 0))
    mean = weights.sum(axis=1) / max(1, len(ranks))
    best = float(np.where(bound > 0, mean / np.where(bound > 0, bound, 1.0), 1.0).mean()) if len(bound) else 1.0
    shortfall = 0 if problem.need <= 1 else _shortfall(rows, placement.num_logical_experts, topology, problem)
    plan = PlacementPlan(
        placement,
        quotas,
        table,
        len(first),
        lost,
        streamed,
        balance_of(rank_loads(weights, placement, topology), ranks),
        balance_of(rank_loads(weights, placement, topology, quotas), ranks),
        best,
        shortfall,
        (),
    )
    object.__setattr__(plan, "reasons", _reasons(plan, held is None, len(rest), problem))
    return plan


def _first_replicas(rows: NDArray[np.int64], num_experts: int) -> NDArray[np.bool_]:
    """bool [L, P]: the first slot of each expert."""
    first = np.zeros(rows.shape, dtype=np.bool_)
    for layer, row in enumerate(rows):
        experts, slots = np.unique(row, return_index=True)
        first[layer, slots[experts != EMPTY]] = True
    return first


def _shortfall(rows: NDArray[np.int64], num_experts: int, topology: Topology, problem: Problem) -> int:
    """Experts over all layers with fewer distinct domains than wanted."""
    num_layers = rows.shape[0]
    num_domains = int(problem.domain.max(initial=0)) + 1
    seen = np.zeros((num_layers, num_experts, num_domains), dtype=np.bool_)
    layer, slot = np.nonzero(rows != EMPTY)
    seen[layer, rows[layer, slot], problem.domain[topology.rank_of_slot[slot]]] = True
    return int((seen.sum(axis=2) < problem.need).sum())


def _reasons(plan: PlacementPlan, from_nothing: bool, num_others: int, problem: Problem) -> tuple[str, ...]:
    lines = []
    if plan.streamed:
        lines.append(f"degraded: {len(plan.streamed)} experts have no slot and are streamed, the lightest of each layer")
    if from_nothing:
        lines.append("first placement: every slot is loaded")
    elif not len(plan.move_table):
        lines.append("no moves: every expert is covered and every layer is as level as asked")
    else:
        lines.append(f"coverage: {plan.num_mandatory} moves for {len(plan.lost)} experts without a live replica")
        lines.append(f"redundancy and balance: {num_others} moves")
    if plan.shortfall:
        lines.append(f"short of {problem.need} replicas on distinct domains: {plan.shortfall} experts")
    lines.append(f"balance {plan.balance:.4f} even, {plan.balance_with_quotas:.4f} with quotas, bound {plan.bound:.4f}")
    return tuple(lines)
