"""The group's life as one table: who may serve, who is being fenced, what is being installed. Pure; an illegal event changes nothing.

A recovery is one walk from a failure back to SERVING. A failure in any phase goes back to FENCING under a newer epoch; what was loaded
meanwhile stays in the contents record, so nothing is read twice.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from elastic_ep.core.errors import IllegalTransitionError


class Phase(enum.Enum):
    """What the group is doing."""

    BOOTING = "booting"
    """no member yet, or none any more: ranks are starting and reading dense weights"""
    FENCING = "fencing"
    """a rank failed: make sure that it can change nothing any more"""
    PLANNING = "planning"
    """the members of the new epoch are known; a placement is being solved"""
    INSTALLING = "installing"
    """ranks swap tables, match the mesh, and load what the placement needs"""
    RESUMING = "resuming"
    """installed; the first step of the epoch has not been committed yet"""
    SERVING = "serving"
    REFUSING = "refusing"
    """too few slots for all experts and told not to stream them: requests get 503"""
    DOWN = "down"
    """no rank is left"""


class Trigger(enum.Enum):
    """What moves the group from one phase to another."""

    RANKS_READY = "ranks_ready"
    RANK_FAILED = "rank_failed"
    FENCED = "fenced"
    PLANNED = "planned"
    TOO_FEW_SLOTS = "too_few_slots"
    INSTALLED = "installed"
    COMMITTED = "committed"
    CHANGE_STAGED = "change_staged"
    MEMBERS_LOST = "members_lost"
    NO_RANK_LEFT = "no_rank_left"


_P, _T = Phase, Trigger
TRANSITIONS: dict[tuple[Phase, Trigger], Phase] = {
    (_P.BOOTING, _T.RANK_FAILED): _P.BOOTING,
    (_P.BOOTING, _T.RANKS_READY): _P.PLANNING,
    (_P.PLANNING, _T.PLANNED): _P.INSTALLING,
    (_P.PLANNING, _T.TOO_FEW_SLOTS): _P.REFUSING,
    (_P.INSTALLING, _T.INSTALLED): _P.RESUMING,
    (_P.RESUMING, _T.COMMITTED): _P.SERVING,
    (_P.FENCING, _T.FENCED): _P.PLANNING,
    (_P.SERVING, _T.CHANGE_STAGED): _P.INSTALLING,
    (_P.SERVING, _T.RANK_FAILED): _P.FENCING,
    (_P.RESUMING, _T.RANK_FAILED): _P.FENCING,
    (_P.INSTALLING, _T.RANK_FAILED): _P.FENCING,
    (_P.PLANNING, _T.RANK_FAILED): _P.FENCING,
    (_P.FENCING, _T.RANK_FAILED): _P.FENCING,
    (_P.REFUSING, _T.RANK_FAILED): _P.REFUSING,
    (_P.REFUSING, _T.RANKS_READY): _P.PLANNING,
    **{(phase, _T.MEMBERS_LOST): _P.BOOTING for phase in Phase if phase is not _P.DOWN},
    **{(phase, _T.NO_RANK_LEFT): _P.DOWN for phase in Phase if phase is not _P.DOWN},
}

HISTORY_LIMIT = 256


@dataclass(frozen=True)
class Transition:
    """One line of the story: what happened when, under which epoch, and why."""

    at: float
    epoch: int
    trigger: Trigger
    before: Phase
    after: Phase
    reason: str


@dataclass
class GroupState:
    """The phase, and a bounded story of how it came about."""

    phase: Phase = Phase.BOOTING
    history: deque[Transition] = field(default_factory=lambda: deque(maxlen=HISTORY_LIMIT))

    def apply(self, trigger: Trigger, *, now: float, epoch: int, reason: str) -> Phase:
        """Move to the next phase. Raises IllegalTransitionError, and changes nothing, if the table has no such move."""
        after = TRANSITIONS.get((self.phase, trigger))
        if after is None:
            raise IllegalTransitionError(f"{trigger.value} is not allowed while {self.phase.value} (epoch {epoch}): {reason}")
        self.history.append(Transition(now, epoch, trigger, self.phase, after, reason))
        self.phase = after
        return after

    def story(self) -> list[str]:
        """The transitions kept, oldest first, one line each."""
        return [f"{t.at:.4f} epoch {t.epoch} {t.before.value} -> {t.after.value} ({t.trigger.value}: {t.reason})" for t in self.history]


class Tier(enum.IntEnum):
    """How much a recovery had to do."""

    MASK = 0
    """every expert had a live replica: no bytes moved"""
    COVER = 1
    """some experts had none and were loaded"""
    REBALANCE = 2
    """planned movement while serving"""


@dataclass
class RecoveryRecord:
    """Timeline of one recovery, all times in seconds on the controller's clock. A restart in the middle keeps the first `last_sign`.

    The five phases add up to the stall: detect (last sign of life of the first failed rank -> failure known), agree (-> fenced,
    members agreed), plan (-> placement solved), move (-> installed on every member), resume (-> first tokens committed). When a
    second failure restarts the walk, agree runs on until the last agreement.
    """

    kind: str
    ranks: list[int]
    last_sign: float
    detected: float
    epoch: int = 0
    agreed: float | None = None
    planned: float | None = None
    moved: float | None = None
    resumed: float | None = None
    tier: Tier = Tier.MASK
    experts_lost: int = 0
    bytes_moved: dict[str, int] = field(default_factory=lambda: {"peer": 0, "host": 0, "checkpoint": 0})
    stage_ms: float = 0.0
    """of a planned change: how long its experts were on their way while the group served"""
    rank_move_ms: float = 0.0
    """the slowest rank's own part of the move phase, by its own clock"""
    reason: str = ""

    def restart(self, rank: int, kind: str) -> None:
        """Another rank failed before this recovery was over: one walk, one record."""
        if rank not in self.ranks:
            self.ranks.append(rank)
        if kind not in self.kind.split("+"):
            self.kind = f"{self.kind}+{kind}"
        self.agreed = self.planned = self.moved = None

    def as_status(self) -> dict[str, Any]:
        """The object of `/elastic/status`: milliseconds, null for what has not happened yet."""
        return {
            "epoch": self.epoch,
            "ranks": list(self.ranks),
            "kind": self.kind,
            "tier": int(self.tier),
            "detect_ms": _span_ms(self.last_sign, self.detected),
            "agree_ms": _span_ms(self.detected, self.agreed),
            "plan_ms": _span_ms(self.agreed, self.planned),
            "move_ms": _span_ms(self.planned, self.moved),
            "resume_ms": _span_ms(self.moved, self.resumed),
            "stall_ms": _span_ms(self.last_sign, self.resumed),
            "stage_ms": round(self.stage_ms, 3),
            "rank_move_ms": round(self.rank_move_ms, 3),
            "experts_lost": self.experts_lost,
            "bytes_moved": dict(self.bytes_moved),
            "reason": self.reason,
        }


def _span_ms(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else round((end - begin) * 1e3, 3)
