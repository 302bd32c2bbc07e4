"""From members and what their slots hold to what a new epoch installs. Pure; the shell or the simulator runs it and times it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_ep.brain.events import GroupPlan
from elastic_ep.core.eplb.resilient import solve_placement
from elastic_ep.core.errors import InsufficientSlotsError
from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.survivability import survives
from elastic_ep.core.topology import Topology


@dataclass(frozen=True)
class PlanSettings:
    """What stays the same from epoch to epoch.

    Attributes:
        stream_when_short: with fewer live slots than experts, stream the rest through spare buffers instead of refusing.
        spread: the failure domain level on which replicas are kept apart.
    """

    num_experts: int
    stream_when_short: bool = True
    spread: str = "rank"


def plan(
    settings: PlanSettings,
    topology: Topology,
    active: tuple[int, ...],
    contents: NDArray[np.int64],
    load: NDArray[np.float64] | None = None,
    max_moves: int | None = None,
) -> GroupPlan:
    """Place all experts over the active ranks, starting from what their slots hold.

    Args:
        contents: int64 [L, P], what each slot holds now (-1: nothing); slots of inactive ranks are ignored.
        load: float [L, E] tokens per expert, None when nothing was measured yet.
        max_moves: moves at most, besides those that lost experts need. 0 in a recovery, so that serving goes on soon.

    Raises:
        InsufficientSlotsError: too few live slots and streaming is not allowed.
    """
    live = topology.live_slot_mask(active)
    num_live, num_experts = int(live.sum()), settings.num_experts
    if num_live < num_experts and not settings.stream_when_short:
        raise InsufficientSlotsError(num_live, num_experts)
    held = np.where(live[None, :], contents, EMPTY)
    from_nothing = not (held != EMPTY).any()
    weights = np.ones((len(held), num_experts)) if load is None else load
    solved = solve_placement(
        weights,
        topology,
        active,
        None if from_nothing else ExpertPlacement(held, num_experts),
        min_replicas=max(1, min(num_live // num_experts, sum(active))),
        spread=settings.spread,
        max_moves=None if from_nothing else max_moves,
    )
    return GroupPlan(
        placement=solved.placement,
        quotas=solved.quotas,
        streamed=solved.streamed,
        loads=tuple((move.layer, move.slot, move.expert) for move in solved.moves),
        experts_lost=0 if from_nothing else len(solved.lost),
        survives=survives_object(solved.placement, topology, active),
        reason="; ".join(solved.reasons),
    )


def survives_object(placement: ExpertPlacement, topology: Topology, active: tuple[int, ...]) -> dict[str, Any]:
    """`survives` of `/elastic/status`: how many ranks may fail, whichever they are, and whether any one node may, with no expert lost."""
    found = survives(placement, topology, active, max_failures=1)
    return {"any_ranks": found.any_ranks, "any_node": found.any_node}
