"""What goes into the brain and what comes out. The shell turns I/O into events and commands into I/O; the simulator does both in memory."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elastic_ep.brain.messages import ControllerMessage, Hello, RankMessage, SampledToken, SamplingParams
from elastic_ep.core.links import Source
from elastic_ep.core.placement import ExpertPlacement

Finish = Literal["stop", "length", "error"]
Drain = Literal["move", "finish"]


class FailureCause(enum.Enum):
    """How the controller came to hold a rank for failed."""

    EXITED = "exited"
    """its process ended (pidfd, or the launcher's wait)"""
    STOPPED = "stopped"
    """its process was stopped by a signal"""
    CHANNEL_CLOSED = "channel_closed"
    """its control channel reached end-of-file"""
    HEARTBEAT = "heartbeat"
    """no sign of life within the heartbeat timeout"""
    WEDGED = "wedged"
    """alive and beating, but a step or an install did not end before its deadline"""
    PEERS = "peers"
    """other ranks could not exchange with it"""
    AGENT_LOST = "agent_lost"
    """the agent of its host is gone: nobody there could start, kill or watch it"""
    FATAL = "fatal"
    """it said that it cannot go on"""


# ---- events


@dataclass(frozen=True, slots=True)
class RankConnected:
    hello: Hello


@dataclass(frozen=True, slots=True)
class RankSaid:
    rank: int
    incarnation: int
    message: RankMessage


@dataclass(frozen=True, slots=True)
class RankFailed:
    """The shell saw a rank fail."""

    rank: int
    incarnation: int
    cause: FailureCause
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RankFenced:
    """The process is gone, or can reach nobody any more."""

    rank: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class RankRuns:
    """The answer to Probe: its process is seen to run (it may be starved of CPU)."""

    rank: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class SeatsAbsent:
    """No process can be started for these seats: the host that has them is not here. Theirs that run are given up."""

    ranks: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class SeatsPresent:
    """Their host is here (again)."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """The answer to MakePlan, whose epoch and change it repeats. `plan` is None when the live slots cannot hold all experts and
    streaming them is not allowed. `then` are the rounds that follow it, each from what the one before has left."""

    epoch: int
    plan: GroupPlan | None
    reason: str = ""
    change: int | None = None
    then: tuple[GroupPlan, ...] = ()


@dataclass(frozen=True, slots=True)
class Submitted:
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Cancelled:
    """`is_done`: the client has all it asked for, as a text that ends at a stop string."""

    request_id: str
    is_done: bool = False


@dataclass(frozen=True, slots=True)
class ScaleRequested:
    """The operator wants so many ranks. `drain`: "move" computes the leavers' requests elsewhere, "finish" lets them end first."""

    operation_id: str
    new_ep_size: int
    drain: Drain = "move"


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """The operator wants this rank gone."""

    operation_id: str
    rank: int
    drain: Drain = "move"


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Graceful: no new requests, finish those that run, then stop the ranks."""


@dataclass(frozen=True, slots=True)
class TimePassed:
    """`next_deadline()` was reached."""


Event = (
    RankConnected
    | RankSaid
    | RankFailed
    | RankFenced
    | RankRuns
    | SeatsAbsent
    | SeatsPresent
    | Planned
    | Submitted
    | Cancelled
    | ScaleRequested
    | DrainRequested
    | StopRequested
    | TimePassed
)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate: one prompt of one choice.

    Attributes:
        request_id: unique among the server's requests.
        prompt_ids: at least one token id, each in [0, vocab_size).
        max_tokens: at least 1; len(prompt_ids) + max_tokens <= max_model_len.
        sampling: with the seed already chosen.
        eos_ids: ids that end the sequence; empty when the client ignores them.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    eos_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One committed token, or the end of the sequence, or both.

    Attributes:
        token: None only when `finish` is set and no token comes with it (always so for "error").
        index: position of the token among the sequence's generated ones, from 0.
        finish: None while more follows; "stop" when `token` is one of eos_ids; nothing follows an event that has it.
        error: the reason, for finish "error".
    """

    token: SampledToken | None
    index: int
    finish: Finish | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What a new epoch installs.

    Attributes:
        quotas: float64 [L, P], or None for an even split.
        streamed: (layer, expert) -> rank for experts without a slot.
        loads: (layer, slot, expert) in the order to be loaded, and `sources`, where each is to come from.
        experts_lost: (layer, expert) pairs that no member held before the loads.
        survives: what the placement survives from here, as `/elastic/status` shows it.
        gain: by how much the busiest ranks get faster at the recorded load once all rounds are installed, as a share.
    """

    placement: ExpertPlacement
    quotas: NDArray[np.float64] | None
    streamed: dict[tuple[int, int], int]
    loads: tuple[tuple[int, int, int], ...]
    experts_lost: int
    survives: dict[str, Any]
    reason: str
    sources: tuple[Source, ...]
    gain: float = 0.0


# ---- commands


@dataclass(frozen=True, slots=True)
class Send:
    rank: int
    message: ControllerMessage


@dataclass(frozen=True, slots=True)
class Fence:
    """Make sure that this process can change nothing any more: kill it, or where it can't be killed, shut it out. Answer RankFenced."""

    rank: int
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class StartRank:
    """Start a process for this seat."""

    rank: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Probe:
    """A rank is silent. Look at its process: answer RankRuns if it is seen to run, RankFailed if it is not or cannot be seen."""

    rank: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Solve for these members (a pure function, `planner.plan`); answer Planned.

    Attributes:
        change: number of the planned change it is for, None for a recovery. A recovery moves only what it must; a change also restores
            redundancy and balance.
        leaving: members that will not be any more; until the last round they serve, and can be read from.
    """

    epoch: int
    active: tuple[int, ...]
    change: int | None = None
    leaving: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Emit:
    """The next event of a request's stream."""

    request_id: str
    event: TokenEvent


@dataclass(frozen=True, slots=True)
class StepCommitted:
    """Every member answered done for a step; its tokens are in the Emits that follow."""

    step: int
    started: float


@dataclass(frozen=True, slots=True)
class Publish:
    """An entry for the event log."""

    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stopped:
    """All is done: the shell may end."""

    error: str = ""


Command = Send | Fence | StartRank | Probe | MakePlan | Emit | StepCommitted | Publish | Stopped
