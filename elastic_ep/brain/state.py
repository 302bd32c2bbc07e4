"""All that the brain knows, in one place. Only the functions of this package change it, one event at a time."""

from __future__ import annotations

import enum
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from elastic_ep.brain.events import Command, GroupPlan, Publish, Send
from elastic_ep.brain.load_recorder import LoadRecorder
from elastic_ep.brain.messages import SampledToken, SequenceWork
from elastic_ep.brain.requests import RequestTable, Sequence
from elastic_ep.brain.seats import Seat
from elastic_ep.brain.settings import BrainSettings
from elastic_ep.core.membership import Membership
from elastic_ep.core.placement import SlotContents
from elastic_ep.core.recovery import GroupState, RecoveryRecord

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


class ChangeKind(enum.Enum):
    """Why a planned change is made."""

    REJOIN = "rejoin"
    """processes that took dead ranks' seats become members"""
    RESTORE = "restore"
    """redundancy and balance after a recovery"""
    REBALANCE = "rebalance"
    """balance, because the load has changed"""
    JOIN = "join"
    """the group grows"""
    DRAIN = "drain"
    """members leave on purpose"""


@dataclass
class Change:
    """A planned change: staged beside the live slots while steps go on, then installed between two steps.

    Attributes:
        joiners: seats that become members with it; `leavers` cease to be.
        active: the members after its last round.
        later: the rounds that follow this one.
        pending: ranks that still stage; `readers` are those that have something to read; `deadline` is when they must have.
        is_due: all is staged; it is installed before the next step.
    """

    number: int
    kind: ChangeKind
    joiners: tuple[int, ...]
    leavers: tuple[int, ...]
    active: tuple[int, ...]
    started: float
    staging_since: float = 0.0
    staged_after_s: float = 0.0
    deadline: float | None = None
    plan: GroupPlan | None = None
    pending: set[int] = field(default_factory=set)
    readers: set[int] = field(default_factory=set)
    later: tuple[GroupPlan, ...] = ()
    bytes_read: Counter[str] = field(default_factory=Counter)
    is_due: bool = False

    @property
    def members(self) -> tuple[int, ...]:
        """[ep_size], 1 = a member once this round is installed: leavers stay until the last round."""
        if not self.later:
            return self.active
        return tuple(1 if rank in self.leavers else alive for rank, alive in enumerate(self.active))


class OperationKind(enum.Enum):
    SCALE = "scale"
    DRAIN = "drain"


class OperationState(enum.Enum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    """undone: the group has the size that it had"""


@dataclass
class Operation:
    """What an operator asked for, under a name of their own.

    Attributes:
        target: the new ep_size of a SCALE, the rank of a DRAIN.
        drain: "move" computes the leavers' requests again elsewhere, "finish" lets them end first.
        joiners, leavers: the ranks that it adds and retires; `seats_to_add` are not seats yet, `seats_before` of the joiners were given up.
    """

    operation_id: str
    kind: OperationKind
    target: int
    drain: str
    started: float
    joiners: tuple[int, ...] = ()
    leavers: tuple[int, ...] = ()
    seats_to_add: int = 0
    seats_before: tuple[int, ...] = ()
    state: OperationState = OperationState.RUNNING
    reason: str = ""
    finished: float | None = None

    def describe(self) -> str:
        return f"{self.kind.value} {'to' if self.kind is OperationKind.SCALE else 'of rank'} {self.target}"

    def as_status(self) -> dict[str, Any]:
        """The object of `/elastic/operations/ID`."""
        return {
            "operation_id": self.operation_id,
            "operation": self.describe(),
            "state": self.state.value,
            "reason": self.reason,
            "drain": self.drain,
            "joining_ranks": list(self.joiners),
            "leaving_ranks": list(self.leavers),
            "seconds": None if self.finished is None else round(self.finished - self.started, 3),
        }


class BrainState:
    """One group of ranks and the requests it serves.

    Attributes:
        membership: of the newest epoch, installed or not.
        step, install: the transaction in flight, if any; never both.
        topology: of the seats there are now; scaling up adds some.
        change: the planned change under way; `next_round` is what follows when it is installed; `restore_due` asks for one that
            restores redundancy.
        changes_wait_until: no change begins before this; `change_failures` in a row have put it off.
        load: what experts were asked for; `rebalance_at` is when to look whether another placement would serve it better.
        operation: what an operator asked for and is not done yet; `operations` keeps the last ones by their name.
        between_steps: messages held until no step is in flight, since what a rank hears during a step interrupts it.
        record: the recovery under way; `recoveries` keeps the finished ones.
        digests: (layer, expert) -> digest of its bytes as first read; `dense_digest` of what the first rank read besides.
        starts_due_at: no seat is to be started, nor a start overdue, before this.
        release: rank -> sequences whose KV it may free, told with its next step.
        out: the commands that the event in hand has led to.
    """

    def __init__(self, settings: BrainSettings, now: float) -> None:
        self.settings = settings
        self.topology = settings.topology
        ep_size = self.topology.ep_size
        self.seats = [Seat(rank, last_sign=now) for rank in range(ep_size)]
        self.membership = Membership.all_active(ep_size)
        self.group = GroupState()
        self.contents = SlotContents(settings.num_layers, self.topology.num_slots)
        self.digests: dict[tuple[int, int], int] = {}
        self.dense_digest: int | None = None
        self.requests = RequestTable()
        self.plan: GroupPlan | None = None
        self.step: Transaction | None = None
        self.install: Transaction | None = None
        self.change: Change | None = None
        self.next_round: Change | None = None
        self.changes_made = 0
        self.change_failures = 0
        self.changes_wait_until: float | None = None
        self.restore_due = False
        self.load = LoadRecorder(settings.num_layers, settings.plan.num_experts, settings.load_window_s, now, settings.load_windows_kept)
        self.rebalance_at = now + settings.rebalance_interval_s if settings.rebalance_interval_s else None
        self.rebalance_due = False
        self.operation: Operation | None = None
        self.operations: dict[str, Operation] = {}
        self.between_steps: list[Send] = []
        self.record: RecoveryRecord | None = None
        self.recoveries: deque[RecoveryRecord] = deque(maxlen=RECOVERIES_KEPT)
        self.steps_run = 0
        self.tokens_committed = 0
        self.stopping = False
        self.stopped = False
        self.boot_deadline: float | None = now + settings.boot_timeout_s
        self.fence_deadline: float | None = None
        self.silence_check_at = now + settings.heartbeat_timeout_s
        self.starts_due_at: float | None = None
        self.release: dict[int, list[int]] = {rank: [] for rank in range(ep_size)}
        self.out: list[Command] = []

    def seat(self, rank: int, incarnation: int) -> Seat | None:
        """The seat, if this very process sits in it and has not been given up: what a dead one says changes nothing."""
        if not 0 <= rank < len(self.seats):
            return None
        seat = self.seats[rank]
        return seat if seat.incarnation == incarnation and seat.is_alive else None

    def publish(self, kind: str, /, **data: Any) -> None:
        self.out.append(Publish(kind, data))

    def drop_change(self) -> None:
        """Give up a change that is being staged; what it was for is looked at again when the group serves."""
        self.change = self.next_round = None
        self.between_steps = []
        self.restore_due = True
