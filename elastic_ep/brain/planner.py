"""From members and what their slots hold to what the next epochs install. Pure; the shell or the simulator runs it and times it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_ep.brain.events import GroupPlan
from elastic_ep.core.eplb.plan import PlacementPlan
from elastic_ep.core.eplb.resilient import solve_placement
from elastic_ep.core.errors import InsufficientSlotsError
from elastic_ep.core.links import LinkSpeeds, Source, SourceKind
from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.quotas import level_quotas, rank_loads
from elastic_ep.core.survivability import survives_one
from elastic_ep.core.topology import Topology
from elastic_ep.core.transfer import Round, pick_sources, plan_transfer


@dataclass(frozen=True)
class PlanSettings:
    """What stays the same from epoch to epoch.

    Attributes:
        stream_when_short: with fewer live slots than experts, stream the rest through spare buffers instead of refusing.
        spread: the failure domain level on which replicas are kept apart.
        expert_bytes: of one expert of one layer, in a slot.
        speeds: of the ways an expert can come, to choose among them.
        staging_slots: experts that a rank may hold beside its live slots during a change.
    """

    num_experts: int
    stream_when_short: bool = True
    spread: str = "rank"
    expert_bytes: int = 1
    speeds: LinkSpeeds = field(default_factory=LinkSpeeds)
    staging_slots: int = 1024


Backups = Mapping[str, NDArray[np.bool_]]
"""node label -> bool [L, E]: the experts in that node's host memory"""


def plan(
    settings: PlanSettings,
    topology: Topology,
    active: tuple[int, ...],
    contents: NDArray[np.int64],
    load: NDArray[np.float64] | None = None,
    backups: Backups | None = None,
    solver: Solver | None = None,
) -> GroupPlan:
    """Recover: place all experts over the active ranks, moving only what has to be, all of it in place.

    Args:
        contents: int64 [L, P], what each slot holds now (-1: nothing); slots of inactive ranks are ignored.
        load: float [L, E] tokens per expert, None when nothing was measured yet.
        solver: what places the experts, `solve` or one that remembers its answers.

    Raises:
        InsufficientSlotsError: too few live slots and streaming is not allowed.
    """
    held = _live(topology, active, contents)
    solved = (solver or solve)(settings, topology, active, held, load, 0)
    loads = tuple((move.layer, move.slot, move.expert) for move in solved.plan.moves)
    sources = pick_sources(loads, held, topology, expert_bytes=settings.expert_bytes, backups=backups, speeds=settings.speeds)
    lost = len(solved.plan.lost) if (held != EMPTY).any() else 0
    return _final(solved, loads, sources, lost)


def plan_change(
    settings: PlanSettings,
    topology: Topology,
    active: tuple[int, ...],
    contents: NDArray[np.int64],
    load: NDArray[np.float64] | None = None,
    backups: Backups | None = None,
    leaving: Sequence[int] = (),
    solver: Solver | None = None,
) -> tuple[GroupPlan, ...]:
    """Restore redundancy and balance: rounds, each staged beside what is served and installed at once. Arguments as in `plan`.

    No round takes the last replica of an expert; one that has none is streamed until its round comes. Always at least one round.
    Ranks that are ``leaving`` are no longer active after the last one.
    """
    present = tuple(1 if rank in leaving else alive for rank, alive in enumerate(active))
    held = _live(topology, present, contents)
    solved = (solver or solve)(settings, topology, active, _live(topology, active, contents), load, None)
    gain = 0.0 if load is None else _gain(ExpertPlacement(held.copy(), settings.num_experts), solved.plan, topology, load)
    transfer = plan_transfer(
        held,
        solved.plan.placement,
        topology,
        present,
        expert_bytes=settings.expert_bytes,
        backups=backups,
        speeds=settings.speeds,
        staging_slots=settings.staging_slots,
        in_place=False,
    )
    plans = []
    for number, part in enumerate(transfer.rounds, 1):
        loads, sources = _of_round(part, held, topology)
        for layer, slot, expert in loads:
            held[layer, slot] = expert
        if number == len(transfer.rounds):
            plans.append(_final(solved, loads, sources))
        else:
            plans.append(_between(held.copy(), settings.num_experts, topology, present, loads, sources, number))
    plans = plans or [_final(solved, (), ())]
    return tuple(replace(each, gain=gain) for each in plans) if gain else tuple(plans)


def _gain(before: ExpertPlacement, solved: PlacementPlan, topology: Topology, load: NDArray[np.float64]) -> float:
    """How much less the busiest ranks of all layers have to do, as a share of what is left for them."""
    now = rank_loads(load, before, topology, level_quotas(load, before, topology)).max(axis=1).sum()
    then = rank_loads(load, solved.placement, topology, solved.quotas).max(axis=1).sum()
    return float(now / then - 1) if then else 0.0


def _live(topology: Topology, active: tuple[int, ...], contents: NDArray[np.int64]) -> NDArray[np.int64]:
    """A copy of the contents without dead ranks' slots."""
    return np.where(topology.live_slot_mask(active)[None, :], contents, EMPTY)


class Solved(NamedTuple):
    """A placement, and what is told of it: what it survives and how it came about."""

    plan: PlacementPlan
    survives: dict[str, Any]
    reason: str


Solver = Callable[
    [PlanSettings, Topology, tuple[int, ...], NDArray[np.int64], NDArray[np.float64] | None, int | None],
    Solved,
]


def solve(
    settings: PlanSettings,
    topology: Topology,
    active: tuple[int, ...],
    held: NDArray[np.int64],
    load: NDArray[np.float64] | None,
    max_moves: int | None,
    *,
    with_reason: bool = True,
) -> Solved:
    """Place all experts. Of the settings it uses the number of experts, `spread`, and, when slots are too few, `stream_when_short`.

    Args:
        held: int64 [L, P], what slots of active ranks hold, -1 elsewhere.
        max_moves: None for no limit, 0 for a recovery: then only lost experts move.
        with_reason: put into words how it came about.

    Raises:
        InsufficientSlotsError: too few live slots and streaming is not allowed.
    """
    num_live, num_experts = int(topology.live_slot_mask(active).sum()), settings.num_experts
    if num_live < num_experts and not settings.stream_when_short:
        raise InsufficientSlotsError(num_live, num_experts)
    from_nothing = not (held != EMPTY).any()
    solved = solve_placement(
        np.ones((len(held), num_experts)) if load is None else load,
        topology,
        active,
        None if from_nothing else ExpertPlacement(held.copy(), num_experts),
        min_replicas=max(1, min(num_live // num_experts, sum(active))),
        spread=_spread(settings.spread, topology, active),
        max_moves=None if from_nothing else max_moves,
    )
    return Solved(solved, survives_object(solved.placement, topology, active), "; ".join(solved.reasons) if with_reason else "")


Loads = tuple[tuple[int, int, int], ...]


def _of_round(part: Round, held: NDArray[np.int64], topology: Topology) -> tuple[Loads, tuple[Source, ...]]:
    loads = [(copy.layer, copy.slot, copy.expert) for copy in part.copies]
    loads += [(move.layer, move.slot, int(held[move.layer, move.from_slot])) for move in part.local_moves]
    sources = [copy.source for copy in part.copies]
    sources += [Source(SourceKind.LOCAL, int(topology.rank_of_slot[move.slot]), move.from_slot) for move in part.local_moves]
    return tuple(loads), tuple(sources)


def _final(solved: Solved, loads: Loads, sources: Sequence[Source], lost: int = 0) -> GroupPlan:
    return GroupPlan(
        placement=solved.plan.placement,
        quotas=solved.plan.quotas,
        streamed=solved.plan.streamed,
        loads=loads,
        experts_lost=lost,
        survives=solved.survives,
        reason=solved.reason,
        sources=tuple(sources),
    )


def _between(
    held: NDArray[np.int64],
    num_experts: int,
    topology: Topology,
    active: tuple[int, ...],
    loads: Loads,
    sources: Sequence[Source],
    number: int,
) -> GroupPlan:
    """The group after a round that is not the last: it serves what slots hold then; what none holds yet is streamed, dealt out in turn."""
    placement = ExpertPlacement(held, num_experts)
    ranks = [rank for rank, alive in enumerate(active) if alive]
    streamed = {pair: ranks[i % len(ranks)] for i, pair in enumerate(placement.missing_experts())}
    reason = f"round {number} of a change in several"
    return GroupPlan(placement, None, streamed, loads, 0, survives_object(placement, topology, active), reason, tuple(sources))


def survives_object(placement: ExpertPlacement, topology: Topology, active: tuple[int, ...]) -> dict[str, Any]:
    """`survives` of `/elastic/status`: how many ranks may fail, whichever they are, and whether any one node may, with no expert lost."""
    any_ranks, any_node = survives_one(placement, topology, active)
    return {"any_ranks": any_ranks, "any_node": any_node}


def _spread(level: str, topology: Topology, active: tuple[int, ...]) -> str:
    """The level to keep replicas apart on: where one domain alone is left, its ranks still can be."""
    labels = topology.labels(level)
    return level if len({label for label, alive in zip(labels, active, strict=True) if alive}) > 1 else "rank"
