"""Seats whose host is away: given up, not restarted, not held against them; filled again when it is back. Functions over the state."""

from __future__ import annotations

from elastic_ep.brain import members, operations
from elastic_ep.brain.events import FailureCause, SeatsAbsent, SeatsPresent
from elastic_ep.brain.seats import SeatState
from elastic_ep.brain.state import BrainState


def leave(state: BrainState, event: SeatsAbsent, now: float) -> None:
    """The group goes on without these seats, also while it boots."""
    for rank in event.ranks:
        state.seats[rank].absent, state.seats[rank].restart_at = event.reason, None
    if state.operation is not None and set(event.ranks) & set(state.operation.joiners):
        operations.undo(state, f"the host of rank {min(set(event.ranks) & set(state.operation.joiners))} is away: {event.reason}", now)
    for rank in event.ranks:
        members.fail(state, rank, FailureCause.AGENT_LOST, event.reason, now)


def come(state: BrainState, event: SeatsPresent, now: float) -> None:
    """What failed before was the host's absence, or may have been: every seat starts afresh."""
    for rank in event.ranks:
        seat = state.seats[rank]
        if not seat.absent:
            continue
        seat.absent = ""
        seat.failed_starts = seat.quick_deaths = 0
        if seat.state is SeatState.DEAD and members.may_restart(state, seat):
            seat.restart_at = now
            state.starts_due_at = now if state.starts_due_at is None else min(state.starts_due_at, now)
