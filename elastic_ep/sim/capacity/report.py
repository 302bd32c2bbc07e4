"""From a history to figures: availability, tokens lost to pauses, bytes, capacity; and the same failures with others' published pauses."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

from elastic_ep.sim.capacity.group import HOUR_S, History
from elastic_ep.sim.capacity.rates import PUBLISHED
from elastic_ep.sim.capacity.setup import Setup


def union_s(intervals: list[tuple[float, float]], end_s: float) -> float:
    """How long at least one of the (start, length) intervals lasts before `end_s`."""
    total, reached = 0.0, 0.0
    for start, length in sorted(intervals):
        stop = min(start + length, end_s)
        if stop > reached:
            total += stop - max(start, reached)
            reached = stop
    return total


def mean_capacity(history: History, end_s: float) -> float:
    """Time-weighted mean of the capacity, pauses included."""
    total = 0.0
    marks = sorted(history.capacity, key=lambda mark: mark[0])
    for (at, share), (until, _) in zip(marks, [*marks[1:], (end_s, 0.0)], strict=True):
        total += share * (min(until, end_s) - min(max(at, 0.0), end_s))
    return total / end_s


def figures(setup: Setup, history: History, hours: float) -> dict[str, Any]:
    """The object that `elastic-ep simulate --hours --json` prints."""
    end_s = hours * HOUR_S
    tokens_per_s = setup.tokens_per_s * setup.ep_size
    stalls = sorted(pause.seconds for pause in history.pauses if pause.tier < 2)
    switches = sorted(pause.seconds for pause in history.pauses if pause.tier == 2)
    paused = union_s([(pause.start_s, pause.seconds) for pause in history.pauses], end_s)
    return {
        "ranks": setup.ep_size,
        "slots_per_rank": setup.slots_per_rank,
        "layers": setup.num_layers,
        "experts": setup.num_experts,
        "placed_layers": setup.placed_layers,
        "hours": hours,
        "failures": len(history.failures),
        "rejoins": len(history.rejoins),
        "experts_lost": history.lost_experts,
        "tiers": dict(sorted(Counter(str(pause.tier) for pause in history.pauses).items())),
        "availability": 1 - paused / end_s,
        "paused_s": paused,
        "failure_pause_s": _spread(stalls),
        "change_pause_s": _spread(switches),
        "mean_capacity": mean_capacity(history, end_s),
        "lowest_capacity": min((share for _, share in history.capacity if share > 0), default=1.0),
        "tokens_lost_to_pauses": paused * tokens_per_s,
        "bytes_moved": {kind: num for kind, num in sorted(history.moved.items()) if num},
        "solve_ms": None if not history.solve_s else round(median(history.solve_s) * 1e3, 1),
        "others": [_other(published, history, end_s, tokens_per_s) for published in PUBLISHED],
    }


def _spread(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {"median": median(seconds), "p99": seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))], "max": seconds[-1]}


def _other(published: Any, history: History, end_s: float, tokens_per_s: float) -> dict[str, Any]:
    intervals = [(at, published.failure_s) for at in history.failures]
    intervals += [(at, published.rejoin_s) for at in history.rejoins]
    paused = union_s(intervals, end_s)
    return {
        "name": published.name,
        "failure_pause_s": published.failure_s,
        "rejoin_pause_s": published.rejoin_s,
        "paused_s": paused,
        "availability": 1 - paused / end_s,
        "tokens_lost_to_pauses": paused * tokens_per_s,
        "note": published.note,
    }
