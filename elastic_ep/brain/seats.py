"""One seat per rank: which process sits in it and how far it has come."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from elastic_ep.core.errors import IllegalTransitionError


class SeatState(enum.Enum):
    """The life of a rank's process, as the controller knows it."""

    STARTING = "starting"
    """its process was asked for; nothing heard yet"""
    LOADING = "loading"
    """it said hello and reads dense weights"""
    READY = "ready"
    """it can take an Install"""
    ACTIVE = "active"
    """a member of the current epoch"""
    FENCING = "fencing"
    """it failed; being made harmless"""
    DEAD = "dead"
    """it is gone; the seat is empty, perhaps until a restart"""
    RETIRED = "retired"
    """the seat was given up on purpose; it is filled again only when the group grows"""


_S = SeatState
_GONE = (_S.FENCING, _S.DEAD, _S.RETIRED)
_ALLOWED: dict[SeatState, tuple[SeatState, ...]] = {
    _S.STARTING: (_S.LOADING, _S.FENCING),
    _S.LOADING: (_S.READY, _S.FENCING),
    _S.READY: (_S.ACTIVE, _S.FENCING),
    _S.ACTIVE: (_S.FENCING,),
    _S.FENCING: (_S.DEAD, _S.RETIRED),
    _S.DEAD: (_S.STARTING, _S.RETIRED),
    _S.RETIRED: (_S.STARTING,),
}


@dataclass
class Seat:
    """What is known of one rank. `incarnation` counts the processes that sat here; whatever names an older one is ignored."""

    rank: int
    incarnation: int = 0
    state: SeatState = SeatState.STARTING
    pid: int | None = None
    host: str = ""
    address: str = ""
    weights_address: str = ""
    last_sign: float = 0.0
    """when anything was last heard from it (controller's clock, seconds)"""
    probed_at: float | None = None
    """when a Probe went out for its silence; None when none is open"""
    seen_running: float = 0.0
    """when a Probe last saw its process run"""
    failure: str = ""
    failed_starts: int = 0
    """processes in a row that never became a member"""
    quick_deaths: int = 0
    """processes in a row that did not live long as a member; each makes the wait before the next longer"""
    member_since: float | None = None
    absent: str = ""
    """why no process can be started here (its host is away); "" when one can"""
    restart_at: float | None = None
    is_leaving: bool = False
    """being fenced because its seat is to be retired"""
    start_deadline: float | None = None
    """when a process that was started again must have its dense weights"""

    def move(self, state: SeatState) -> None:
        if state not in _ALLOWED[self.state]:
            raise IllegalTransitionError(f"rank {self.rank} cannot go from {self.state.value} to {state.value}")
        self.state = state

    @property
    def is_alive(self) -> bool:
        """Its process may be running and has not been given up."""
        return self.state not in _GONE
