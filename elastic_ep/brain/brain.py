"""The controller's decisions, without I/O: events in, commands out, `now` passed in. Server and simulator drive this same object.

Steps are transactions: the tokens of a step are committed when every member answered done for it, else nothing of it is kept. A failure
voids the step in flight, fences the failed rank, makes a new epoch, plans, installs, and serving goes on.
"""

from __future__ import annotations

from elastic_ep.brain import absence, changes, epochs, members, operations, steps
from elastic_ep.brain.events import (
    Cancelled,
    Command,
    DrainRequested,
    Event,
    FailureCause,
    Planned,
    Probe,
    RankConnected,
    RankFailed,
    RankFenced,
    RankRuns,
    RankSaid,
    ScaleRequested,
    SeatsAbsent,
    SeatsPresent,
    StopRequested,
    Submitted,
    TimePassed,
)
from elastic_ep.brain.messages import (
    DenseLoaded,
    Heartbeat,
    Hello,
    Installed,
    InstallFailed,
    RankFatal,
    Staged,
    StageFailed,
    StepDone,
    StepFailed,
)
from elastic_ep.brain.seats import Seat, SeatState
from elastic_ep.brain.settings import BrainSettings
from elastic_ep.brain.state import BrainState, Transaction
from elastic_ep.core.recovery import Phase

MAX_EXTENSIONS = 2


class Brain:
    """One group of ranks and the requests it serves. `handle` is the only way to change `state`."""

    def __init__(self, settings: BrainSettings, now: float) -> None:
        self.state = BrainState(settings, now)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event; return the I/O still to be done, in order."""
        state = self.state
        state.out = []
        match event:
            case RankSaid():
                self._on_said(event, now)
            case TimePassed():
                self._on_time(now)
            case Submitted():
                state.requests.add(event.request)
            case Cancelled():
                if members.drop(state, event.request_id) is not None:
                    state.requests.finished += event.is_done
                    state.requests.cancelled += not event.is_done
            case RankConnected():
                self._on_connected(event.hello, now)
            case RankFailed():
                if state.seat(event.rank, event.incarnation):
                    members.fail(state, event.rank, event.cause, event.detail, now)
            case RankFenced():
                members.on_fenced(state, event, now)
            case RankRuns():
                seat = state.seat(event.rank, event.incarnation)
                if seat:
                    seat.probed_at, seat.seen_running = None, now
                    state.silence_check_at = min(state.silence_check_at, now + state.settings.heartbeat_timeout_s)
            case SeatsAbsent():
                absence.leave(state, event, now)
            case SeatsPresent():
                absence.come(state, event, now)
            case Planned() if event.change is not None:
                changes.on_planned(state, event, now)
            case Planned():
                epochs.on_planned(state, event, now)
            case ScaleRequested() | DrainRequested():
                operations.begin(state, event, now)
            case StopRequested():
                state.stopping = True
        steps.run_step(state, now)
        if state.stopping and not state.requests.waiting and not state.requests.running:
            members.stop(state, "")
        return state.out

    def next_deadline(self) -> float | None:
        """When TimePassed is due, if nothing else happens."""
        state = self.state
        due = state.silence_check_at
        for at in (state.boot_deadline, state.fence_deadline, state.starts_due_at, state.rebalance_at, state.changes_wait_until):
            if at is not None and at < due:
                due = at
        if state.change is not None and state.change.deadline is not None and state.change.deadline < due:
            due = state.change.deadline
        for transaction in (state.step, state.install):
            if transaction is not None:
                due = min(due, transaction.deadline)
                if transaction.verdict_at is not None and transaction.verdict_at < due:
                    due = transaction.verdict_at
        return due

    def refusal(self) -> tuple[str, str] | None:
        """Why a new request can't be taken now: ("queue_full" | "unavailable", reason), or None."""
        state = self.state
        waiting, limit = len(state.requests.waiting), state.settings.max_waiting
        if state.stopping:
            return "unavailable", "the server is stopping"
        if state.group.phase is Phase.DOWN:
            return "unavailable", "no rank is left alive"
        if state.group.phase is Phase.REFUSING:
            return "unavailable", state.group.history[-1].reason
        if waiting >= limit:
            return "queue_full", f"{waiting} requests are waiting, the limit is {limit}"
        return None

    def expects(self, rank: int, incarnation: int) -> bool:
        """Whether a process that names itself so may still become, or is, a member."""
        return self.state.seat(rank, incarnation) is not None

    # ---- ranks

    def _on_connected(self, hello: Hello, now: float) -> None:
        seat = self.state.seat(hello.rank, hello.incarnation)
        if seat is None or seat.state is not SeatState.STARTING:
            return
        seat.move(SeatState.LOADING)
        self.state.silence_check_at = min(self.state.silence_check_at, now + self.state.settings.heartbeat_timeout_s)
        seat.pid, seat.host, seat.last_sign = hello.pid, hello.host, now
        seat.address, seat.weights_address = hello.address, hello.weights_address

    def _on_said(self, event: RankSaid, now: float) -> None:
        state = self.state
        seat = state.seat(event.rank, event.incarnation)
        if seat is None:
            return
        seat.last_sign, seat.probed_at = now, None
        match event.message:
            case StepDone() as done:
                steps.on_step_done(state, seat, done, now)
            case Heartbeat():
                pass
            case StepFailed() as failed:
                if state.step and (failed.epoch, failed.step) == (state.membership.epoch, state.step.number):
                    epochs.accuse(state, state.step, seat.rank, failed.failed_peers, now)
            case Installed() as installed:
                epochs.on_installed(state, seat, installed, now)
            case InstallFailed() as failed:
                epochs.on_install_failed(state, seat, failed, now)
            case Staged() as staged:
                changes.on_staged(state, seat, staged, now)
            case StageFailed() as failed:
                changes.on_stage_failed(state, seat, failed, now)
            case DenseLoaded() as loaded:
                self._on_dense_loaded(seat, loaded, now)
            case RankFatal() as fatal:
                self._on_fatal(seat, fatal.error, now)

    def _on_dense_loaded(self, seat: Seat, message: DenseLoaded, now: float) -> None:
        """A rank that has read other weights than the first one would compute other tokens."""
        state = self.state
        if state.dense_digest is None:
            state.dense_digest = message.digest
        if message.digest != state.dense_digest:
            error = (
                f"rank {seat.rank} has read a configuration and dense weights of digest {message.digest:016x}, the group began with "
                f"{state.dense_digest:016x}: the checkpoint has changed since; restore it, or restart the server"
            )
            self._on_fatal(seat, error, now)
            return
        seat.move(SeatState.READY)
        seat.start_deadline = None
        members.boot_if_ready(state, now)

    def _on_fatal(self, seat: Seat, error: str, now: float) -> None:
        state = self.state
        if state.membership.epoch == 0 or (state.membership.epoch == 1 and state.group.phase is Phase.INSTALLING):
            members.stop(state, error)
        else:
            members.fail(state, seat.rank, FailureCause.FATAL, error, now)

    # ---- deadlines

    def _silence_deadline(self, seat: Seat) -> float | None:
        if not seat.is_alive or seat.state is SeatState.STARTING or seat.probed_at is not None:
            return None
        return max(seat.last_sign, seat.seen_running) + self.state.settings.heartbeat_timeout_s

    def _check_silence(self, now: float) -> None:
        """Probe who is silent, and find out when the next could be: a sign of life only moves that time on, so it is worked out here
        and not with every message."""
        state = self.state
        next_check = now + state.settings.heartbeat_timeout_s
        for seat in state.seats:
            due = self._silence_deadline(seat)
            if due is not None and due <= now:
                seat.probed_at = now
                state.out.append(Probe(seat.rank, seat.incarnation))
            elif due is not None:
                next_check = min(next_check, due)
        state.silence_check_at = next_check

    def _on_time(self, now: float) -> None:
        state = self.state
        changes.start_seats(state, now)
        changes.check_deadline(state, now)
        changes.check_wait(state, now)
        changes.check_rebalance(state, now)
        if state.silence_check_at <= now:
            self._check_silence(now)
        if state.boot_deadline is not None and state.boot_deadline <= now:
            state.boot_deadline = None
            for seat in state.seats:
                if seat.state in (SeatState.STARTING, SeatState.LOADING):
                    members.fail(state, seat.rank, FailureCause.WEDGED, f"not ready after {state.settings.boot_timeout_s:g} s", now)
        if state.fence_deadline is not None and state.fence_deadline <= now:
            for seat in members.fencing_seats(state):
                members.bury(state, seat, now)
            members.after_fencing(state, now)
        for transaction in (state.step, state.install):
            if transaction and transaction.verdict_at is not None and transaction.verdict_at <= now:
                epochs.reach_verdict(state, transaction, now)
        self._on_overdue(state.step, "step", now)
        self._on_overdue(state.install, "install", now)

    def _on_overdue(self, transaction: Transaction | None, what: str, now: float) -> None:
        state = self.state
        if transaction is None or transaction.deadline > now or transaction not in (state.step, state.install):
            return
        waited = now - transaction.started
        silent = transaction.pending - set(transaction.accusations)
        if silent == set(state.membership.ranks) and transaction.extensions < MAX_EXTENSIONS:
            # Nobody finished and nobody complains: the whole group is slow. Giving up every rank would help no one.
            transaction.extensions += 1
            transaction.deadline = now + waited / transaction.extensions
            state.publish("slow", what=what, number=transaction.number, seconds=round(waited, 3))
            return
        for rank in sorted(silent or transaction.pending):
            members.fail(state, rank, FailureCause.WEDGED, f"{what} {transaction.number} not done after {waited:.1f} s", now)
