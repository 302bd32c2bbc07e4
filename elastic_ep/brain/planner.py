"""From members and what their slots hold to what a new epoch installs. Pure; the shell or the simulator runs it and times it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_ep.brain.events import GroupPlan
from elastic_ep.core.errors import InsufficientSlotsError
from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.topology import Topology


@dataclass(frozen=True)
class PlanSettings:
    """What stays the same from epoch to epoch.

    Attributes:
        stream_when_short: with fewer live slots than experts, stream the rest through spare slots instead of refusing.
    """

    num_experts: int
    stream_when_short: bool = True


def plan(
    settings: PlanSettings,
    topology: Topology,
    active: tuple[int, ...],
    contents: NDArray[np.int64],
    load: NDArray[np.float64] | None = None,
) -> GroupPlan:
    """Place all experts over the active ranks, keeping what their slots hold.

    Args:
        contents: int64 [L, P], what each slot holds now (-1: nothing); slots of inactive ranks are ignored.
        load: float [L, E] tokens per expert, None when nothing was measured yet.

    Raises:
        InsufficientSlotsError: too few live slots and streaming is not allowed.
    """
    live = topology.live_slot_mask(active)
    held = np.where(live[None, :], contents, EMPTY)
    if int(live.sum()) < settings.num_experts and not settings.stream_when_short:
        raise InsufficientSlotsError(int(live.sum()), settings.num_experts)
    lost = len(ExpertPlacement(held, settings.num_experts).missing_experts())
    p2l, streamed = _fill(held, live, settings.num_experts, topology, active)
    placement = ExpertPlacement(p2l, settings.num_experts)
    wanted = placement.physical_to_logical_map
    order = [(int(a), int(b), int(wanted[a, b])) for a, b in np.argwhere((wanted != EMPTY) & (wanted != held))]
    return GroupPlan(placement, None, streamed, tuple(order), lost, survives={}, reason=f"{lost} experts had no live replica")


def _fill(held: NDArray[np.int64], live: NDArray[np.bool_], num_experts: int, topology: Topology, active: tuple[int, ...]) -> Any:
    """Stand-in until the solver is wired: missing experts into free or doubled slots."""
    p2l = held.copy()
    streamed: dict[tuple[int, int], int] = {}
    ranks = [r for r, a in enumerate(active) if a]
    for layer in range(p2l.shape[0]):
        row = p2l[layer]
        count = np.bincount(row[row >= 0], minlength=num_experts)
        for expert in np.nonzero(count == 0)[0]:
            free = np.nonzero(live & (row == EMPTY))[0]
            if not len(free):
                free = np.array([s for s in np.nonzero(live)[0] if count[row[s]] > 1])
            if not len(free):
                streamed[layer, int(expert)] = ranks[int(expert) % len(ranks)]
                continue
            slot = free[0]
            if row[slot] >= 0:
                count[row[slot]] -= 1
            row[slot] = expert
            count[expert] += 1
        for slot in np.nonzero(live & (row == EMPTY))[0]:
            mine = set(row[list(topology.slots_of(int(topology.rank_of_slot[slot])))])
            best = min((e for e in range(num_experts) if e not in mine), key=lambda e: count[e], default=None)
            if best is not None:
                row[slot] = best
                count[best] += 1
    return p2l, streamed
