"""A failing schedule made shorter while the same predicate still fails: fewer faults, fewer and shorter requests, fewer ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from elastic_ep.sim.check import run
from elastic_ep.sim.schedule import Schedule

MAX_RUNS = 400


def shrink(schedule: Schedule, predicate: str, fails: Callable[[Schedule], str] = lambda s: run(s).predicate) -> Schedule:
    """The shortest found that still breaks `predicate`, after `MAX_RUNS` runs at most."""
    runs = 0
    improved = True
    while improved and runs < MAX_RUNS:
        improved = False
        for smaller in _smaller(schedule):
            runs += 1
            if fails(smaller) == predicate:
                schedule, improved = smaller, True
                break
            if runs >= MAX_RUNS:
                break
    return schedule


def with_ranks(schedule: Schedule, ep_size: int) -> Schedule:
    """The same with fewer ranks; what named other nodes does so no more."""
    nodes = schedule.nodes[:ep_size]
    return replace(schedule, ep_size=ep_size, nodes=nodes, remote=tuple(label for label in schedule.remote if label in nodes))


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    """Simpler schedules, the boldest first."""
    faults, requests = schedule.faults, schedule.requests
    for i in range(len(faults)):
        yield replace(schedule, faults=faults[:i] + faults[i + 1 :])
    for i in range(len(requests)):
        yield replace(schedule, requests=requests[:i] + requests[i + 1 :])
    for i in range(len(schedule.orders)):
        yield replace(schedule, orders=schedule.orders[:i] + schedule.orders[i + 1 :])
    if schedule.ep_size > 1:
        yield with_ranks(schedule, schedule.ep_size - 1)
    for change in (
        {"remote": ()},
        {"has_backup": False},
        {"spread": "rank"},
        {"late_s": 0.01},
        {"restart_limit": 5},
        {"num_layers": 1},
        {"loss": 0.0},
        {"plan_s": 0.0},
        {"staging_slots": 1024},
        {"is_local": True},
        {"rebalance_s": 0.0},
    ):
        if any(getattr(schedule, name) != value for name, value in change.items()):
            yield replace(schedule, **change)
    for i, request in enumerate(requests):
        for shorter in (
            replace(request, prompt=request.prompt[:1]),
            replace(request, max_tokens=max(1, request.max_tokens // 2)),
            replace(request, cancel_after=0),
            replace(request, after=0),
        ):
            if shorter != request:
                yield replace(schedule, requests=(*requests[:i], shorter, *requests[i + 1 :]))
    for i, fault in enumerate(faults):
        for less in (replace(fault, after=fault.after // 2), replace(fault, after=max(0, fault.after - 1))):
            if less != fault:
                yield replace(schedule, faults=(*faults[:i], less, *faults[i + 1 :]))
