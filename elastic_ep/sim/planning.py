"""Answers to MakePlan with the planner that serves, remembered: it is a pure function. And what trace and checks note of the brain."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_ep.brain import events as ev
from elastic_ep.brain import planner
from elastic_ep.brain.brain import Brain
from elastic_ep.brain.messages import Install
from elastic_ep.core.errors import InsufficientSlotsError
from elastic_ep.core.topology import Topology
from elastic_ep.sim.machines import Backups
from elastic_ep.sim.routing import Routing

REMEMBERED = 20_000
_plans: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
_solved: OrderedDict[tuple[Any, ...], planner.Solved] = OrderedDict()
_routings: OrderedDict[tuple[Any, ...], Routing] = OrderedDict()


def answer(brain: Brain, command: ev.MakePlan, backups: Backups) -> ev.Planned:
    """Solve for these members, from what slots and hosts' copies hold now."""
    state = brain.state
    topology, contents = topology_of(brain), state.contents.experts
    load = state.load.recent()
    where = (topology.slots_per_rank, topology.domains.get("node"), tuple((label, has.tobytes()) for label, has in backups.items()))
    asked = (state.settings.plan, command.active, command.change is None, command.leaving)
    key = (*asked, *where, contents.tobytes(), contents.shape, None if load is None else load.tobytes())
    if key not in _plans:
        _remember(_plans, key, _solve(brain, command, load, backups))
    _plans.move_to_end(key)
    plans, reason = _plans[key]
    if not plans:
        return ev.Planned(command.epoch, None, reason, command.change)
    return ev.Planned(command.epoch, plans[0], change=command.change, then=plans[1:])


def _solve(brain: Brain, command: ev.MakePlan, load: NDArray[np.float64] | None, backups: Backups) -> tuple[tuple[ev.GroupPlan, ...], str]:
    state = brain.state
    arguments = (state.settings.plan, topology_of(brain), command.active, state.contents.experts, load, backups)
    try:
        if command.change is None:
            return (planner.plan(*arguments, solver=solve),), ""
        return planner.plan_change(*arguments, leaving=command.leaving, solver=solve), ""
    except InsufficientSlotsError as error:
        return (), str(error)


def solve(
    settings: planner.PlanSettings,
    topology: Topology,
    active: tuple[int, ...],
    held: NDArray[np.int64],
    load: NDArray[np.float64] | None,
    max_moves: int | None,
) -> planner.Solved:
    """`planner.solve`, remembered by what it uses: many plans differ only in staging memory or in hosts' copies. Nobody reads reasons."""
    where = (topology.slots_per_rank, topology.domains.get("node"), active, held.shape, held.tobytes())
    key = (settings.num_experts, settings.stream_when_short, settings.spread, max_moves, *where, None if load is None else load.tobytes())
    if key not in _solved:
        _remember(_solved, key, planner.solve(settings, topology, active, held, load, max_moves, with_reason=False))
    _solved.move_to_end(key)
    return _solved[key]


def topology_of(brain: Brain) -> Topology:
    return brain.state.topology


def _remember(store: OrderedDict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> None:
    store[key] = value
    if len(store) > REMEMBERED:
        store.popitem(last=False)


def routing_of(order: Install) -> Routing:
    """The tables of an Install, made once for all ranks."""
    key = (order.epoch, order.physical_to_logical_map, order.active_ranks, order.streamed, order.slots_per_rank, order.num_experts)
    if key not in _routings:
        _remember(_routings, key, Routing(order))
    return _routings[key]


# ---- what is noted


def fingerprint(brain: Brain) -> tuple[Any, ...]:
    """All that decides what happens next, in short."""
    state = brain.state
    return (
        state.membership,
        state.group.phase,
        state.steps_run,
        state.tokens_committed,
        id(state.step),
        id(state.install),
        None if state.step is None else frozenset(state.step.pending),
        None if state.install is None else frozenset(state.install.pending),
        state.contents.experts.tobytes(),
        len(state.digests),
        tuple((s.state, s.incarnation) for s in state.seats),
    )


def fingerprint_of_the_dead(brain: Brain, event: ev.Event) -> tuple[Any, ...] | None:
    """The brain as it is, if the event comes from or tells of a process that was given up before."""
    match event:
        case ev.RankSaid() | ev.RankFailed() | ev.RankRuns():
            rank, incarnation = event.rank, event.incarnation
        case ev.RankConnected():
            rank, incarnation = event.hello.rank, event.hello.incarnation
        case _:
            return None
    seat = brain.state.seats[rank]
    return None if seat.incarnation == incarnation and seat.is_alive else fingerprint(brain)


def describe(event: ev.Event, commands: list[ev.Command]) -> str:
    """One line of the trace."""
    return f"{_name(event)} -> {' '.join([_name(command) for command in commands])}"


def _name(thing: Any) -> str:
    kind = type(thing).__name__
    match thing:
        case ev.RankSaid() | ev.Send():
            message = thing.message
            epoch, step = getattr(message, "epoch", ""), getattr(message, "step", "")
            return f"{kind}({thing.rank} {type(message).__name__} {epoch} {step})"
        case ev.RankFailed():
            return f"{kind}({thing.rank} {thing.cause.value})"
        case ev.Emit():
            token = thing.event.token.token if thing.event.token else ""
            return f"{kind}({thing.request_id} {thing.event.index} {token} {thing.event.finish})"
        case ev.Publish():
            return f"{kind}({thing.kind})"
        case ev.MakePlan() | ev.Planned():
            return f"{kind}({thing.epoch} {thing.change})"
        case ev.RankFenced() | ev.Fence() | ev.StartRank() | ev.Probe() | ev.RankRuns():
            return f"{kind}({thing.rank} {thing.incarnation})"
    return kind
