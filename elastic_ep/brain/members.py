"""Ranks that come, fail and go: fencing, the next epoch's members, and the end. Functions over the brain's state."""

from __future__ import annotations

from elastic_ep.brain import operations
from elastic_ep.brain.events import Emit, FailureCause, Fence, MakePlan, RankFenced, Send, Stopped, TokenEvent
from elastic_ep.brain.messages import Shutdown
from elastic_ep.brain.requests import Sequence
from elastic_ep.brain.seats import Seat, SeatState
from elastic_ep.brain.state import BrainState
from elastic_ep.core.membership import Membership
from elastic_ep.core.recovery import Phase, RecoveryRecord, Tier, Trigger


def boot_if_ready(state: BrainState, now: float) -> None:
    """Plan with every rank that lives, once all of them are ready. Not while the group serves: then a rank that is ready joins it."""
    if state.group.phase not in (Phase.BOOTING, Phase.REFUSING):
        return
    alive = [s for s in state.seats if s.is_alive]
    if any(s.state not in (SeatState.READY, SeatState.ACTIVE) for s in alive) or fencing_seats(state):
        return
    if not any(s.state is SeatState.READY for s in alive):
        return
    state.boot_deadline = None
    state.group.apply(Trigger.RANKS_READY, now=now, epoch=state.membership.epoch, reason=f"{len(alive)} ranks ready")
    make_plan(state, tuple(int(s.is_alive) for s in state.seats), now)


def is_member(state: BrainState, rank: int) -> bool:
    """Whether the group depends on this rank. While it boots it depends on all of them."""
    return state.group.phase is Phase.BOOTING or state.membership.is_active(rank)


def fail(state: BrainState, rank: int, cause: FailureCause, detail: str, now: float) -> None:
    """Give a rank up and fence it. If it was a member, void what is in flight and start (or restart) the recovery."""
    seat = state.seats[rank]
    if not seat.is_alive:
        return
    was_member = is_member(state, rank)
    last_sign = seat.last_sign
    if seat.state is not SeatState.ACTIVE and not seat.absent:
        seat.failed_starts += 1
    seat.move(SeatState.FENCING)
    seat.start_deadline = None
    seat.failure = f"{cause.value}{': ' + detail if detail else ''}"
    state.publish("rank_failed", rank=rank, cause=cause.value, detail=detail, epoch=state.membership.epoch)
    state.out.append(Fence(rank, seat.incarnation, seat.failure))
    state.fence_deadline = now + state.settings.fence_timeout_s
    if state.group.phase is Phase.DOWN:
        return
    if not was_member:
        if state.change is not None and rank in state.change.joiners:
            state.drop_change()
        operations.on_seat_lost(state, rank, now)
        return
    state.drop_change()
    operations.on_seat_lost(state, rank, now)
    void(state)
    if state.record is not None and state.record.tier is not Tier.REBALANCE:
        state.record.restart(rank, cause.value)
    elif state.group.phase is not Phase.BOOTING:
        state.record = RecoveryRecord(cause.value, [rank], last_sign=last_sign, detected=now)
    if not any(_may_go_on(state, s) for s in state.seats):
        _lose_all(state, seat, now)
        return
    state.group.apply(Trigger.RANK_FAILED, now=now, epoch=state.membership.epoch, reason=f"rank {rank} {seat.failure}")


def _may_go_on(state: BrainState, seat: Seat) -> bool:
    """Whether this seat can be one of the next epoch's members. A process that was started again in a member's seat while others were
    still being fenced is not one yet."""
    if state.group.phase is Phase.BOOTING:
        return seat.is_alive
    return seat.state in (SeatState.READY, SeatState.ACTIVE) and state.membership.is_active(seat.rank)


def _lose_all(state: BrainState, last: Seat, now: float) -> None:
    """No member is left. Those that start, or may be started again, boot anew; requests wait for them. Else it is over."""
    reason = f"rank {last.rank} was the last: {last.failure}"
    if any(s.is_alive for s in state.seats) or any(may_restart(state, s) for s in state.seats):
        state.group.apply(Trigger.MEMBERS_LOST, now=now, epoch=state.membership.epoch, reason=reason)
        state.boot_deadline = now + state.settings.boot_timeout_s
        return
    state.group.apply(Trigger.NO_RANK_LEFT, now=now, epoch=state.membership.epoch, reason=reason)
    stop(state, f"no rank is left alive; the last, rank {last.rank}, failed: {last.failure}")


def may_restart(state: BrainState, seat: Seat) -> bool:
    """Whether its seat is to get another process."""
    if seat.state is SeatState.RETIRED or seat.is_leaving:
        return False
    return state.settings.restart and not state.stopping and seat.failed_starts < state.settings.restart_limit


def void(state: BrainState) -> None:
    """Nothing of the step or install in flight is kept, except that what it was to release is released with the next."""
    if state.step:
        for rank, seq_ids in state.step.release.items():
            state.release[rank] = [*seq_ids, *state.release[rank]]
        state.publish("step_void", step=state.step.number)
    state.step = state.install = None


def on_fenced(state: BrainState, event: RankFenced, now: float) -> None:
    seat = state.seats[event.rank]
    if seat.incarnation != event.incarnation or seat.state is not SeatState.FENCING:
        return
    bury(state, seat, now)
    after_fencing(state, now)


def bury(state: BrainState, seat: Seat, now: float) -> None:
    """Its place is empty now: forget what it held, move its requests, and perhaps start another process for the seat."""
    leaves = seat.is_leaving or (state.operation is not None and seat.rank in state.operation.leavers)
    seat.move(SeatState.RETIRED if leaves else SeatState.DEAD)
    seat.is_leaving = False
    lived = 0.0 if seat.member_since is None else now - seat.member_since
    seat.quick_deaths = 0 if lived >= state.settings.restart_reset_s else seat.quick_deaths + 1
    seat.member_since = None
    state.contents.clear_rank(state.topology, seat.rank)
    state.release[seat.rank] = []
    moved = state.requests.evict_rank(seat.rank)
    state.publish("rank_fenced", rank=seat.rank, requests_moved=len(moved))
    if leaves:
        operations.check(state, now)
    elif seat.absent:
        pass  # its host comes back, or not (absence.py)
    elif may_restart(state, seat):
        wait = state.settings.restart_backoff_s * 2 ** min(max(0, seat.quick_deaths - 1), 16)
        seat.restart_at = now + min(wait, state.settings.restart_backoff_max_s)
        due = state.starts_due_at
        state.starts_due_at = seat.restart_at if due is None else min(due, seat.restart_at)
    elif state.settings.restart and not state.stopping:
        reason = f"{seat.failed_starts} processes in a row failed before they were members; the last: {seat.failure}"
        state.publish("rank_left_out", rank=seat.rank, reason=reason)
        operations.on_seat_left_out(state, seat.rank, reason, now)


def fencing_seats(state: BrainState) -> list[Seat]:
    return [s for s in state.seats if s.state is SeatState.FENCING]


def after_fencing(state: BrainState, now: float) -> None:
    if fencing_seats(state):
        return
    state.fence_deadline = None
    if state.group.phase is Phase.FENCING:
        state.group.apply(Trigger.FENCED, now=now, epoch=state.membership.epoch, reason="all failed ranks are harmless")
        ready = (SeatState.READY, SeatState.ACTIVE)
        make_plan(state, tuple(int(s.state in ready and state.membership.is_active(s.rank)) for s in state.seats), now)
    else:
        boot_if_ready(state, now)


def make_plan(state: BrainState, active: tuple[int, ...], now: float) -> None:
    """Begin the next epoch with these members."""
    state.membership = Membership(state.membership.epoch + 1, active)
    if state.record:
        state.record.agreed, state.record.epoch = now, state.membership.epoch
    state.out.append(MakePlan(state.membership.epoch, active))


def close_record(state: BrainState, now: float) -> None:
    if state.record:
        state.record.resumed = now
        state.recoveries.append(state.record)
        state.publish("recovery", **state.record.as_status())
        state.restore_due = state.restore_due or state.record.tier is not Tier.REBALANCE
        state.record = None


def drop(state: BrainState, request_id: str) -> Sequence | None:
    """Forget a request and let its home free its KV."""
    sequence = state.requests.remove(request_id)
    if sequence is not None and sequence.home is not None:
        state.release[sequence.home].append(sequence.seq_id)
    return sequence


def abort_all(state: BrainState, reason: str) -> None:
    for sequence in [*state.requests.running.values(), *state.requests.waiting.values()]:
        drop(state, sequence.request.request_id)
        state.requests.failed += 1
        state.out.append(Emit(sequence.request.request_id, TokenEvent(None, sequence.num_generated, "error", reason)))


def stop(state: BrainState, error: str) -> None:
    if state.stopped:
        return
    state.stopped = state.stopping = True
    if state.operation is not None:
        operations.abandon(state, error or "the server stops")
    if error:
        abort_all(state, error)
    for seat in state.seats:
        if seat.is_alive and seat.state is not SeatState.STARTING:
            state.out.append(Send(seat.rank, Shutdown()))
    state.out.append(Stopped(error))
