"""The object of `/elastic/status`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic_ep.brain.state import BrainState


def status_object(brain: BrainState, pids: Mapping[tuple[int, int], int], device: str) -> dict[str, Any]:
    """A snapshot. `pids` maps (rank, incarnation) to process ids known before the rank's own hello; device: of all ranks."""
    requests = brain.requests
    running = dict.fromkeys(range(len(brain.seats)), 0)
    for sequence in requests.running.values():
        if sequence.home is not None:
            running[sequence.home] += 1
    slots = brain.topology.slots_per_rank
    nodes = brain.topology.domains.get("node")
    ranks = [
        {
            "rank": seat.rank,
            "pid": seat.pid or pids.get((seat.rank, seat.incarnation)),
            "host": seat.host,
            **({} if nodes is None else {"node": nodes[seat.rank]}),
            "device": device,
            "state": seat.state.value,
            "incarnation": seat.incarnation,
            "slots": slots[seat.rank],
            "running_requests": running[seat.rank],
            "failure": "" if seat.is_alive else seat.failure,
        }
        for seat in brain.seats
    ]
    records = [*brain.recoveries, *([brain.record] if brain.record else [])]
    return {
        "phase": brain.group.phase.value,
        "epoch": brain.membership.epoch,
        "ep_size": brain.membership.ep_size,
        "active_ranks": list(brain.membership.active),
        "ranks": ranks,
        "survives": brain.plan.survives if brain.plan else {},
        "streamed_experts": len(brain.plan.streamed) if brain.plan else 0,
        "recoveries": [record.as_status() for record in records],
        "steps": brain.steps_run,
        "tokens_committed": brain.tokens_committed,
        "requests": {
            "running": len(requests.running),
            "waiting": len(requests.waiting),
            "finished": requests.finished,
            "failed": requests.failed,
            "cancelled": requests.cancelled,
        },
    }
