"""Planned changes: a rank comes back, redundancy is restored. Staged while steps go on, installed between two. Functions over the state."""

from __future__ import annotations

from elastic_ep.brain import epochs, members, operations
from elastic_ep.brain.events import FailureCause, GroupPlan, MakePlan, Planned, Send, StartRank
from elastic_ep.brain.messages import Stage, Staged, StageFailed
from elastic_ep.brain.seats import Seat, SeatState
from elastic_ep.brain.state import BrainState, Change, ChangeKind
from elastic_ep.core.membership import Membership
from elastic_ep.core.recovery import Phase, RecoveryRecord, Tier, Trigger

FAILURES_BEFORE_UNDOING = 5


def start_seats(state: BrainState, now: float) -> None:
    """Start the processes whose time has come, and give up those that take too long."""
    if state.starts_due_at is None or state.starts_due_at > now:
        return
    for seat in state.seats:
        if seat.restart_at is not None and seat.restart_at <= now:
            seat.restart_at = None
            seat.incarnation += 1
            seat.pid, seat.host, seat.address = None, "", ""
            seat.move(SeatState.STARTING)
            seat.start_deadline = now + state.settings.boot_timeout_s
            state.publish("rank_starting", rank=seat.rank, incarnation=seat.incarnation)
            state.out.append(StartRank(seat.rank, seat.incarnation))
        elif seat.start_deadline is not None and seat.start_deadline <= now:
            seat.start_deadline = None
            members.fail(state, seat.rank, FailureCause.WEDGED, f"not ready after {state.settings.boot_timeout_s:g} s", now)
    due = (t for seat in state.seats for t in (seat.restart_at, seat.start_deadline) if t is not None)
    state.starts_due_at = min(due, default=None)


def consider(state: BrainState, now: float) -> None:
    """Begin a change if there is a reason for one and nothing else is going on."""
    if state.group.phase is not Phase.SERVING or state.change is not None or state.stopping:
        return
    if state.changes_wait_until is not None:
        return
    if state.next_round is not None:
        state.change, state.next_round = state.next_round, None
        assert state.change.plan is not None
        _stage(state, state.change, state.change.plan, now)
        return
    is_asked = state.operation is not None or state.restore_due or state.rebalance_due
    if not is_asked and not any(seat.state is SeatState.READY for seat in state.seats):
        return  # as nearly always: this is asked after every event of a group without a step
    operations.grow(state, now)
    ready = [s.rank for s in state.seats if s.state is SeatState.READY and not state.membership.is_active(s.rank)]
    joiners = tuple(rank for rank in ready if not operations.is_held_back(state, rank))
    leavers = () if joiners else operations.leavers_ready(state)
    kind = _kind(state, joiners, leavers)
    if kind is None:
        return
    active = tuple(int((state.membership.is_active(s.rank) or s.rank in joiners) and s.rank not in leavers) for s in state.seats)
    state.restore_due = state.rebalance_due = False
    state.changes_made += 1
    state.change = Change(state.changes_made, kind, joiners, leavers, active, now)
    state.out.append(MakePlan(state.membership.epoch, active, state.change.number, leavers))


def _kind(state: BrainState, joiners: tuple[int, ...], leavers: tuple[int, ...]) -> ChangeKind | None:
    """Why a change is to be made now, the weightiest reason first; None: there is none."""
    if joiners:
        wanted = state.operation.joiners if state.operation is not None else ()
        return ChangeKind.JOIN if set(joiners) & set(wanted) else ChangeKind.REJOIN
    if leavers:
        return ChangeKind.DRAIN
    if state.restore_due:
        return ChangeKind.RESTORE
    return ChangeKind.REBALANCE if state.rebalance_due else None


def check_wait(state: BrainState, now: float) -> None:
    """Let changes begin again when they have been put off for long enough."""
    if state.changes_wait_until is not None and state.changes_wait_until <= now:
        state.changes_wait_until = None


def check_rebalance(state: BrainState, now: float) -> None:
    """At the interval's end, have a placement made for the recorded load; `on_planned` judges whether it is worth its moves."""
    if state.rebalance_at is None or state.rebalance_at > now:
        return
    state.rebalance_at = now + state.settings.rebalance_interval_s
    state.rebalance_due = state.load.recent() is not None


def on_planned(state: BrainState, event: Planned, now: float) -> None:
    """Have everything that the plan moves staged on its rank."""
    change = state.change
    if change is None or event.change != change.number or event.epoch != state.membership.epoch:
        return
    if event.plan is None:
        postpone(state, event.reason, now)
        return
    if change.kind in (ChangeKind.RESTORE, ChangeKind.REBALANCE) and not event.plan.loads:
        state.change = None
        return
    if change.kind is ChangeKind.REBALANCE and event.plan.gain < state.settings.rebalance_min_gain:
        state.change = None
        state.publish("rebalance_skipped", gain=round(event.plan.gain, 4), needed=state.settings.rebalance_min_gain)
        return
    change.plan, change.later = event.plan, event.then
    _stage(state, change, event.plan, now)


def _stage(state: BrainState, change: Change, plan: GroupPlan, now: float) -> None:
    members_then = [rank for rank, alive in enumerate(change.members) if alive]
    orders = dict.fromkeys(members_then, ()) | epochs.load_orders(state, plan)
    ahead = epochs.install_of(state, state.membership.epoch + 1, change.members, plan)
    change.pending = set(orders)
    change.readers = {rank for rank, loads in orders.items() if loads}
    change.staging_since = now
    rate, weights = state.settings.stage_bytes_per_s, {r: state.seats[r].weights_address for r in state.membership.ranks}
    change.deadline = now + state.settings.stage_deadline_s(max(map(len, orders.values()), default=0))
    for rank, loads in orders.items():
        waits = state.between_steps if rank not in change.joiners else state.out  # who joins is in no step that it would interrupt
        waits.append(Send(rank, Stage(change.number, loads, rate, weights, ahead)))
    facts = {"joiners": list(change.joiners), "leavers": list(change.leavers), "loads": len(plan.loads), "gain": round(plan.gain, 4)}
    state.publish("change_started", change=change.number, kind=change.kind.value, **facts)


def on_staged(state: BrainState, seat: Seat, message: Staged, now: float) -> None:
    change = state.change
    if change is None or message.change != change.number:
        return
    epochs.note_sources(state, seat.rank, message.source_errors)
    change.bytes_read.update(message.bytes_read)
    change.pending.discard(seat.rank)
    change.is_due = not change.pending
    change.staged_after_s = now - change.staging_since


def on_stage_failed(state: BrainState, seat: Seat, message: StageFailed, now: float) -> None:
    """A joiner that cannot read its share is given up; a member goes on serving what it holds."""
    change = state.change
    if change is None or message.change != change.number:
        return
    if seat.rank in change.joiners:
        members.fail(state, seat.rank, FailureCause.FATAL, message.error, now)
    else:
        postpone(state, f"rank {seat.rank}: {message.error}", now)


def postpone(state: BrainState, reason: str, now: float) -> None:
    """A change cannot be made now. It is tried again later, and later each time; an operation that needs it fails after a few."""
    assert state.change is not None
    state.publish("change_failed", change=state.change.number, reason=reason)
    state.drop_change()
    state.change_failures += 1
    wait = state.settings.restart_backoff_s * 2 ** min(state.change_failures - 1, 16)
    state.changes_wait_until = now + min(wait, state.settings.restart_backoff_max_s)
    if state.change_failures >= FAILURES_BEFORE_UNDOING:
        operations.undo(state, f"its change failed {state.change_failures} times; the last: {reason}", now)


def check_deadline(state: BrainState, now: float) -> None:
    """A rank whose background reading hangs could not recover anything either: give it up. If all that read are late, the source is
    slow, and giving up every rank would help no one: try again later."""
    change = state.change
    if change is None or change.deadline is None or change.deadline > now:
        return
    change.deadline = None
    late = sorted(change.pending)
    if len(change.readers) > 1 and change.readers <= change.pending and not set(late) <= set(change.joiners):
        postpone(state, f"nobody had read their experts after {now - change.staging_since:.1f} s", now)
        return
    for rank in late:
        members.fail(state, rank, FailureCause.WEDGED, f"change {change.number} not staged after {now - change.started:.1f} s", now)


def switch(state: BrainState, now: float) -> None:
    """Install a change whose bytes all lie ready: the next epoch begins, no step is in flight."""
    change = state.change
    assert change is not None
    assert change.plan is not None
    assert state.step is None
    state.change = None
    if change.later:
        state.changes_made += 1
        state.next_round = Change(state.changes_made, change.kind, (), change.leavers, change.active, now)
        state.next_round.plan, state.next_round.later = change.later[0], change.later[1:]
    state.change_failures = 0
    state.membership = Membership(state.membership.epoch + 1, change.members)
    ranks = [*change.joiners, *change.leavers]
    state.record = RecoveryRecord(change.kind.value, ranks, last_sign=now, detected=now, tier=Tier.REBALANCE)
    state.record.epoch, state.record.agreed, state.record.planned = state.membership.epoch, now, now
    state.record.reason = change.plan.reason
    state.record.bytes_moved.update(change.bytes_read)
    state.record.stage_ms = change.staged_after_s * 1e3
    state.plan = change.plan
    reason = f"{change.kind.value} of ranks {ranks}, {len(change.plan.loads)} experts staged"
    state.group.apply(Trigger.CHANGE_STAGED, now=now, epoch=state.membership.epoch, reason=reason)
    epochs.send_installs(state, change.plan, now)
    for rank in change.leavers if not change.later else ():
        operations.retire(state, state.seats[rank], now)
