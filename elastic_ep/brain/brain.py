"""The controller's decisions, without I/O: events in, commands out, `now` passed in. The server and the simulator drive this same object.

Steps are transactions: the tokens of a step are committed when every member answered done for it, else nothing of it is kept. A failure
voids the step in flight, fences the failed rank, makes a new epoch, plans, installs, and serving goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from elastic_ep.brain.events import (
    Cancelled,
    Command,
    EmitToken,
    Event,
    FailureCause,
    Fence,
    GroupPlan,
    MakePlan,
    Planned,
    Probe,
    Publish,
    RankConnected,
    RankFailed,
    RankFenced,
    RankRuns,
    RankSaid,
    Send,
    Stopped,
    StopRequested,
    Submitted,
    TimePassed,
)
from elastic_ep.brain.messages import (
    DenseLoaded,
    Heartbeat,
    Hello,
    Install,
    Installed,
    InstallFailed,
    LoadedSlot,
    LoadOrder,
    RankFatal,
    RunStep,
    SampledToken,
    SequenceWork,
    Shutdown,
    StepDone,
    StepFailed,
)
from elastic_ep.brain.requests import RequestTable, Sequence
from elastic_ep.brain.scheduler import place_waiting, step_work
from elastic_ep.brain.seats import Seat, SeatState
from elastic_ep.brain.settings import BrainSettings
from elastic_ep.brain.verdict import DEADLINE, judge
from elastic_ep.core.membership import Membership
from elastic_ep.core.placement import SlotContents
from elastic_ep.core.recovery import GroupState, Phase, RecoveryRecord, Tier, Trigger

_SERVING = (Phase.SERVING, Phase.RESUMING)
_MAX_STEP_EXTENSIONS = 8
RECOVERIES_KEPT = 256


@dataclass
class Transaction:
    """One step or one install in flight: who has not answered, and what the others said."""

    number: int
    pending: set[int]
    started: float
    deadline: float
    work: dict[int, list[tuple[Sequence, SequenceWork]]] = field(default_factory=dict)
    release: dict[int, tuple[int, ...]] = field(default_factory=dict)
    tokens: dict[int, SampledToken] = field(default_factory=dict)
    accusations: dict[int, dict[int, str]] = field(default_factory=dict)
    verdict_at: float | None = None
    extensions: int = 0


class Brain:
    """One group of ranks and the requests it serves. See the module docstring; `handle` is the only way to change it."""

    def __init__(self, settings: BrainSettings, now: float) -> None:
        self.settings = settings
        ep_size = settings.topology.ep_size
        self.seats = [Seat(rank, last_sign=now) for rank in range(ep_size)]
        self.membership = Membership.all_active(ep_size)
        self.group = GroupState()
        self.contents = SlotContents(settings.num_layers, settings.topology.num_slots)
        self.requests = RequestTable()
        self.plan: GroupPlan | None = None
        self.step: Transaction | None = None
        self.install: Transaction | None = None
        self.record: RecoveryRecord | None = None
        self.recoveries: deque[RecoveryRecord] = deque(maxlen=RECOVERIES_KEPT)
        self.steps_run = 0
        self.tokens_committed = 0
        self.stopping = False
        self._stopped = False
        self._boot_deadline: float | None = now + settings.boot_timeout_s
        self._fence_deadline: float | None = None
        self._release: dict[int, list[int]] = {rank: [] for rank in range(ep_size)}
        self._out: list[Command] = []

    # ---- the two calls of the shell

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event; return the I/O still to be done, in order."""
        self._out = []
        match event:
            case RankSaid():
                self._on_said(event, now)
            case TimePassed():
                self._on_time(now)
            case Submitted():
                self.requests.add(event.request)
            case Cancelled():
                self._on_cancelled(event.request_id)
            case RankConnected():
                self._on_connected(event.hello, now)
            case RankFailed():
                if self._seat(event.rank, event.incarnation):
                    self._fail(event.rank, event.cause, event.detail, now)
            case RankFenced():
                self._on_fenced(event, now)
            case RankRuns():
                seat = self._seat(event.rank, event.incarnation)
                if seat:
                    seat.probed_at = None
                    seat.seen_running = now
            case Planned():
                self._on_planned(event, now)
            case StopRequested():
                self.stopping = True
        self._run_step(now)
        self._finish_stop()
        return self._out

    def next_deadline(self) -> float | None:
        """When TimePassed is due, if nothing else happens."""
        times = [self._boot_deadline, self._fence_deadline]
        for transaction in (self.step, self.install):
            if transaction:
                times += [transaction.deadline, transaction.verdict_at]
        times += [self._silence_deadline(seat) for seat in self.seats]
        return min((t for t in times if t is not None), default=None)

    def refusal(self) -> tuple[str, str] | None:
        """Why a new request can't be taken now: ("queue_full" | "unavailable", reason), or None."""
        if self.stopping:
            return "unavailable", "the server is stopping"
        if self.group.phase is Phase.DOWN:
            return "unavailable", "no rank is left alive"
        if self.group.phase is Phase.REFUSING:
            return "unavailable", self.group.history[-1].reason
        if len(self.requests.waiting) >= self.settings.max_waiting:
            return "queue_full", f"{len(self.requests.waiting)} requests are waiting, the limit is {self.settings.max_waiting}"
        return None

    def expects(self, rank: int, incarnation: int) -> bool:
        """Whether a process that names itself so may still become, or is, a member."""
        return 0 <= rank < len(self.seats) and self._seat(rank, incarnation) is not None

    # ---- ranks come and go

    def _seat(self, rank: int, incarnation: int) -> Seat | None:
        """The seat, if this very process sits in it and has not been given up: what a dead one says changes nothing."""
        seat = self.seats[rank]
        return seat if seat.incarnation == incarnation and seat.is_alive else None

    def _silence_deadline(self, seat: Seat) -> float | None:
        if not seat.is_alive or seat.state is SeatState.STARTING or seat.probed_at is not None:
            return None
        return max(seat.last_sign, seat.seen_running) + self.settings.heartbeat_timeout_s

    def _on_connected(self, hello: Hello, now: float) -> None:
        seat = self._seat(hello.rank, hello.incarnation)
        if seat is None or seat.state is not SeatState.STARTING:
            return
        seat.move(SeatState.LOADING)
        seat.pid, seat.host, seat.address, seat.last_sign = hello.pid, hello.host, hello.address, now

    def _on_said(self, event: RankSaid, now: float) -> None:
        seat = self._seat(event.rank, event.incarnation)
        if seat is None:
            return
        seat.last_sign, seat.probed_at = now, None
        match event.message:
            case StepDone() as done:
                self._on_step_done(seat, done, now)
            case Heartbeat():
                pass
            case StepFailed() as failed:
                if self.step and (failed.epoch, failed.step) == (self.membership.epoch, self.step.number):
                    self._accuse(self.step, seat.rank, failed.failed_peers, now)
            case Installed() as installed:
                self._on_installed(seat, installed, now)
            case InstallFailed() as failed:
                self._on_install_failed(seat, failed, now)
            case DenseLoaded():
                seat.move(SeatState.READY)
                self._boot_if_ready(now)
            case RankFatal() as fatal:
                if self.group.phase is Phase.BOOTING or (self.membership.epoch <= 1 and self.group.phase is Phase.INSTALLING):
                    self._stop(fatal.error)
                else:
                    self._fail(seat.rank, FailureCause.FATAL, fatal.error, now)

    def _boot_if_ready(self, now: float) -> None:
        if self.group.phase is not Phase.BOOTING:
            return
        alive = [s for s in self.seats if s.is_alive]
        if not alive or any(s.state is not SeatState.READY for s in alive) or self._fencing():
            return
        self._boot_deadline = None
        self.group.apply(Trigger.RANKS_READY, now=now, epoch=self.membership.epoch, reason=f"{len(alive)} ranks ready")
        self._make_plan(now)

    def _fencing(self) -> list[Seat]:
        return [s for s in self.seats if s.state is SeatState.FENCING]

    def _fail(self, rank: int, cause: FailureCause, detail: str, now: float) -> None:
        """Give a rank up: void what is in flight, fence it, and start (or restart) the recovery."""
        seat = self.seats[rank]
        if not seat.is_alive:
            return
        last_sign = seat.last_sign
        seat.move(SeatState.FENCING)
        seat.failure = f"{cause.value}{': ' + detail if detail else ''}"
        self._publish("rank_failed", rank=rank, cause=cause.value, detail=detail, epoch=self.membership.epoch)
        self._out.append(Fence(rank, seat.incarnation, seat.failure))
        self._fence_deadline = now + self.settings.fence_timeout_s
        if self.group.phase is Phase.DOWN:
            return
        self._void()
        if not any(s.is_alive for s in self.seats):
            self.group.apply(Trigger.NO_RANK_LEFT, now=now, epoch=self.membership.epoch, reason=f"rank {rank} was the last: {seat.failure}")
            self._stop(f"no rank is left alive; the last, rank {rank}, failed: {seat.failure}")
            return
        if self.group.phase is not Phase.BOOTING:
            if self.record is None:
                self.record = RecoveryRecord(cause.value, [rank], last_sign=last_sign, detected=now)
            else:
                self.record.restart(rank, cause.value)
        self.group.apply(Trigger.RANK_FAILED, now=now, epoch=self.membership.epoch, reason=f"rank {rank} {seat.failure}")

    def _void(self) -> None:
        """Nothing of the step or install in flight is kept, except that what it was to release is released with the next."""
        if self.step:
            for rank, seq_ids in self.step.release.items():
                self._release[rank] = [*seq_ids, *self._release[rank]]
        self.step = self.install = None

    def _on_fenced(self, event: RankFenced, now: float) -> None:
        seat = self.seats[event.rank]
        if seat.incarnation != event.incarnation or seat.state is not SeatState.FENCING:
            return
        self._bury(seat)
        self._after_fencing(now)

    def _bury(self, seat: Seat) -> None:
        seat.move(SeatState.DEAD)
        self.contents.clear_rank(self.settings.topology, seat.rank)
        self._release[seat.rank] = []
        moved = self.requests.evict_rank(seat.rank)
        self._publish("rank_fenced", rank=seat.rank, requests_moved=len(moved))

    def _after_fencing(self, now: float) -> None:
        if self._fencing():
            return
        self._fence_deadline = None
        if self.group.phase is Phase.FENCING:
            self.group.apply(Trigger.FENCED, now=now, epoch=self.membership.epoch, reason="all failed ranks are harmless")
            self._make_plan(now)
        else:
            self._boot_if_ready(now)

    # ---- epochs

    def _make_plan(self, now: float) -> None:
        active = tuple(int(s.state in (SeatState.READY, SeatState.ACTIVE)) for s in self.seats)
        self.membership = Membership(self.membership.epoch + 1, active)
        if self.record:
            self.record.agreed, self.record.epoch = now, self.membership.epoch
        self._out.append(MakePlan(self.membership.epoch, active))

    def _on_planned(self, event: Planned, now: float) -> None:
        if event.epoch != self.membership.epoch or self.group.phase is not Phase.PLANNING:
            return
        epoch = self.membership.epoch
        if event.plan is None:
            self.group.apply(Trigger.TOO_FEW_SLOTS, now=now, epoch=epoch, reason=event.reason)
            self._abort_all(event.reason)
            self._close_record(now)
            return
        self.plan = event.plan
        self.group.apply(Trigger.PLANNED, now=now, epoch=epoch, reason=event.plan.reason)
        if self.record:
            self.record.planned, self.record.reason = now, event.plan.reason
            self.record.experts_lost = max(self.record.experts_lost, event.plan.experts_lost)
            self.record.tier = max(self.record.tier, Tier.COVER if event.plan.loads else Tier.MASK)
        self._send_installs(event.plan, now)

    def _send_installs(self, plan: GroupPlan, now: float) -> None:
        topology, ranks = self.settings.topology, self.membership.ranks
        orders: dict[int, list[LoadOrder]] = {rank: [] for rank in ranks}
        for layer, slot, expert in plan.loads:
            orders[int(topology.rank_of_slot[slot])].append(LoadOrder(layer, slot, expert))
        peers = {rank: self.seats[rank].address for rank in ranks}
        patience = self.settings.install_deadline_s(max(map(len, orders.values())))
        self.install = Transaction(self.membership.epoch, set(ranks), now, now + patience)
        p2l = plan.placement.physical_to_logical_map.astype("<i4").tobytes()
        quotas = None if plan.quotas is None else plan.quotas.astype("<f8").tobytes()
        streamed = tuple((layer, expert, rank) for (layer, expert), rank in sorted(plan.streamed.items()))
        for rank in ranks:
            message = Install(
                epoch=self.membership.epoch,
                active_ranks=self.membership.active,
                slots_per_rank=topology.slots_per_rank,
                num_layers=self.settings.num_layers,
                num_experts=self.settings.plan.num_experts,
                peers=peers,
                physical_to_logical_map=p2l,
                quotas=quotas,
                streamed=streamed,
                loads=tuple(orders[rank]),
                deadline_s=self.settings.install_timeout_s / 2,
            )
            self._out.append(Send(rank, message))

    def _record_loaded(self, loaded: Iterable[LoadedSlot]) -> None:
        for slot in loaded:
            self.contents.record(slot.layer, slot.slot, slot.expert, slot.digest)

    def _on_installed(self, seat: Seat, message: Installed, now: float) -> None:
        self._record_loaded(message.loaded)
        if self.record:
            self.record.bytes_moved["checkpoint"] += message.bytes_read
        if self.install is None or message.epoch != self.install.number:
            return
        self.install.pending.discard(seat.rank)
        if self.install.pending:
            return
        self.install = None
        for rank in self.membership.ranks:
            if self.seats[rank].state is SeatState.READY:
                self.seats[rank].move(SeatState.ACTIVE)
        if self.record:
            self.record.moved = now
        self.group.apply(Trigger.INSTALLED, now=now, epoch=message.epoch, reason=f"{len(self.membership.ranks)} ranks installed")
        self._publish("installed", epoch=message.epoch, active_ranks=list(self.membership.active))

    def _on_install_failed(self, seat: Seat, message: InstallFailed, now: float) -> None:
        self._record_loaded(message.loaded)
        if self.install is None or message.epoch != self.install.number:
            return
        if message.error:
            self._fail(seat.rank, FailureCause.FATAL, message.error, now)
        else:
            self._accuse(self.install, seat.rank, message.failed_peers, now)

    # ---- steps

    def _run_step(self, now: float) -> None:
        """Start the next step if the group may serve and there is anything to do."""
        if self.group.phase not in _SERVING or self.step is not None:
            return
        place_waiting(self.requests, self.membership.ranks, self.settings.limits)
        work = step_work(self.requests, self.membership.ranks, self.settings.limits)
        if not any(work.values()):
            if self.group.phase is Phase.RESUMING:
                self._resumed(now, "nothing to resume")
            return
        self.steps_run += 1
        self.step = Transaction(self.steps_run, set(work), now, now + self.settings.step_timeout_s, work)
        for rank, items in work.items():
            self.step.release[rank], self._release[rank] = tuple(self._release[rank]), []
            message = RunStep(self.membership.epoch, self.step.number, tuple(w for _, w in items), self.step.release[rank])
            self._out.append(Send(rank, message))

    def _on_step_done(self, seat: Seat, done: StepDone, now: float) -> None:
        step = self.step
        if step is None or (done.epoch, done.step) != (self.membership.epoch, step.number):
            return
        step.pending.discard(seat.rank)
        for token in done.tokens:
            step.tokens[token.seq_id] = token
        if not step.pending:
            self._commit(step, now)

    def _commit(self, step: Transaction, now: float) -> None:
        for rank, items in step.work.items():
            for _, work in items:
                if work.sample is not None and work.seq_id not in step.tokens:
                    self._fail(rank, FailureCause.FATAL, f"no token for sequence {work.seq_id} in step {step.number}", now)
                    return
        self.step = None
        for items in step.work.values():
            for sequence, work in items:
                self._commit_sequence(sequence, work, step.tokens.get(work.seq_id))
        if self.group.phase is Phase.RESUMING:
            self._resumed(now, f"step {step.number} committed")

    def _commit_sequence(self, sequence: Sequence, work: SequenceWork, token: SampledToken | None) -> None:
        request_id = sequence.request.request_id
        if self.requests.find(request_id) is not sequence:
            return
        emit = sequence.commit(work, token)
        if emit is None:
            return
        self.tokens_committed += 1
        self._out.append(emit)
        if emit.finish:
            self._drop(request_id)
            self.requests.finished += 1

    def _resumed(self, now: float, reason: str) -> None:
        self.group.apply(Trigger.COMMITTED, now=now, epoch=self.membership.epoch, reason=reason)
        self._close_record(now)

    def _close_record(self, now: float) -> None:
        if self.record:
            self.record.resumed = now
            self.recoveries.append(self.record)
            self._publish("recovery", **self.record.as_status())
            self.record = None

    # ---- accusations and deadlines

    def _accuse(self, transaction: Transaction, accuser: int, accused: dict[int, str], now: float) -> None:
        """Judge when the window closes, or, of missed deadlines only, when everyone else has spoken. A closed channel mostly means a
        process that ended, and the news of that is on its way here."""
        transaction.accusations[accuser] = accused
        if transaction.verdict_at is None:
            transaction.verdict_at = now + self.settings.verdict_window_s
        named = {peer for peers in transaction.accusations.values() for peer in peers}
        late = all(how == DEADLINE for peers in transaction.accusations.values() for how in peers.values())
        if late and not transaction.pending - set(transaction.accusations) - named:
            self._judge(transaction, now)

    def _judge(self, transaction: Transaction, now: float) -> None:
        transaction.verdict_at = None
        answered = set(self.membership.ranks) - transaction.pending | set(transaction.accusations)
        dead = [s.rank for s in self.seats if not s.is_alive]
        for rank, reason in judge(transaction.accusations, answered, dead).guilty.items():
            self._fail(rank, FailureCause.PEERS, reason, now)

    def _on_time(self, now: float) -> None:
        for seat in self.seats:
            due = self._silence_deadline(seat)
            if due is not None and due <= now:
                seat.probed_at = now
                self._out.append(Probe(seat.rank, seat.incarnation))
        if self._boot_deadline is not None and self._boot_deadline <= now:
            self._boot_deadline = None
            for seat in self.seats:
                if seat.state in (SeatState.STARTING, SeatState.LOADING):
                    self._fail(seat.rank, FailureCause.WEDGED, f"not ready after {self.settings.boot_timeout_s:g} s", now)
        if self._fence_deadline is not None and self._fence_deadline <= now:
            for seat in self._fencing():
                self._bury(seat)
            self._after_fencing(now)
        for transaction in (self.step, self.install):
            if transaction and transaction.verdict_at is not None and transaction.verdict_at <= now:
                self._judge(transaction, now)
        self._on_overdue(self.step, "step", now)
        self._on_overdue(self.install, "install", now)

    def _on_overdue(self, transaction: Transaction | None, what: str, now: float) -> None:
        if transaction is None or transaction.deadline > now or transaction not in (self.step, self.install):
            return
        silent = transaction.pending - set(transaction.accusations)
        if silent == set(self.membership.ranks) and transaction.extensions < _MAX_STEP_EXTENSIONS:
            # Nobody finished and nobody complains: the whole group is slow. Giving up every rank would help no one.
            transaction.extensions += 1
            transaction.deadline = now + (now - transaction.started)
            self._publish("slow", what=what, number=transaction.number, seconds=round(now - transaction.started, 3))
            return
        for rank in sorted(silent or transaction.pending):
            self._fail(rank, FailureCause.WEDGED, f"{what} {transaction.number} not done after {now - transaction.started:.1f} s", now)

    # ---- requests and the end

    def _drop(self, request_id: str) -> Sequence | None:
        """Forget a request and let its home free its KV."""
        sequence = self.requests.remove(request_id)
        if sequence is not None and sequence.home is not None:
            self._release[sequence.home].append(sequence.seq_id)
        return sequence

    def _on_cancelled(self, request_id: str) -> None:
        if self._drop(request_id) is not None:
            self.requests.cancelled += 1

    def _abort_all(self, reason: str) -> None:
        for sequence in [*self.requests.running.values(), *self.requests.waiting.values()]:
            self._drop(sequence.request.request_id)
            self.requests.failed += 1
            self._out.append(EmitToken(sequence.request.request_id, None, sequence.num_generated, "error", reason))

    def _finish_stop(self) -> None:
        if self.stopping and not self.requests.waiting and not self.requests.running:
            self._stop("")

    def _stop(self, error: str) -> None:
        if self._stopped:
            return
        self._stopped = self.stopping = True
        if error:
            self._abort_all(error)
        for seat in self.seats:
            if seat.is_alive and seat.state is not SeatState.STARTING:
                self._out.append(Send(seat.rank, Shutdown()))
        self._out.append(Stopped(error))

    def _publish(self, kind: str, /, **data: Any) -> None:
        self._out.append(Publish(kind, data))
