"""Fault points: named places where a test can make a process fail. Given by configuration, once or in a file that is read again whenever it
changes. A rank without a plan pays one look-up at the points outside of the layers, and nothing in them; a controller one per event.

A rank and an agent do what the fault says to themselves. The controller may not fail (docs/guarantees.md): at its points it does it to the
rank that the fault names.
"""

from __future__ import annotations

import enum
import json
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from elastic_ep.core.errors import InvalidInputError

RANK_POINTS = {
    "hello_said": "the controller was told who this is",
    "dense_loaded": "dense weights are read, the controller does not know",
    "dense_told": "it does",
    "install_begin": "an epoch's order came",
    "install_connected": "the mesh has its peers",
    "load_expert": "before an expert goes into a slot",
    "expert_loaded": "the slot holds it",
    "install_end": "the tables are swapped, the controller does not know",
    "install_told": "it does",
    "stage_begin": "an order to stage came",
    "stage_expert": "before an expert is staged",
    "stage_end": "all is staged, the controller does not know",
    "stage_told": "it does",
    "serve_addresses": "a peer asked where experts lie in memory",
    "serve_expert": "a peer asked for an expert",
    "serve_length": "the peer was told how many bytes come, and has none",
    "serve_end": "it was sent all of them",
    "backup_begin": "before an expert is written into the host's backup",
    "backup_bytes": "its bytes are written, it does not count as ready",
    "backup_end": "it does",
    "step_begin": "a step's work came",
    "dispatch_begin": "before a layer's dispatch",
    "frame_out": "before a frame to one peer",
    "frames_out": "all frames of a dispatch or combine are on their way",
    "frame_in": "one peer's frame came",
    "dispatch_end": "a layer's rows are here, the experts not computed",
    "combine_begin": "the experts are computed",
    "combine_end": "a layer is done",
    "step_end": "the step's tokens are sampled, the controller does not know",
    "step_told": "it does",
}
"""name -> where it is, in the order of a rank's life"""
SHELL_POINTS = {
    "rank_start": "a seat's process is about to be asked for",
    "rank_asked": "it was",
    "rank_spawned": "it exists",
    "rank_connected": "it said hello, nothing has come of it",
    "send_install": "before an Install is written to a rank",
    "install_sent": "after",
    "send_step": "before a step's work is written to a rank",
    "step_sent": "after",
    "commit": "every member has answered for a step, nobody was told of its tokens",
    "emitted": "a client has its token",
    "change_begin": "a change is to be planned beside the steps",
    "send_stage": "before an order to stage is written to a rank",
    "stage_sent": "after",
    "fencing_begin": "a member failed, nothing was done about it",
    "fencing_end": "it was fenced",
    "planning_begin": "members are agreed, nothing is solved",
    "planning_end": "the placement is solved, nobody knows",
    "installing_begin": "the placement is known, nobody was told",
    "installing_end": "all members were sent the epoch",
    "resuming_begin": "all members have installed it, no step was sent",
    "resuming_end": "the first was",
    "serving_begin": "its tokens are committed, clients have none",
    "serving_end": "they do",
    "operation_begin": "a scaling or drain was accepted",
    "operation_grow": "it is to have a process started for a new seat",
    "operation_retire": "it is to have a seat emptied",
    "operation_end": "it is over, nobody was told",
    "seats_offered": "another host's agent is to get its seats",
    "seats_given": "it was told",
    "seats_lost": "an agent is gone, nothing was done about its ranks",
}
"""places in the controller"""
AGENT_POINTS = {
    "agent_terms": "the controller's terms came",
    "agent_offered": "the seats were asked for",
    "agent_seated": "the seats were given",
    "agent_beat": "before a beat",
    "agent_start": "an order to start a process came",
    "agent_started": "the launcher was asked for it",
    "agent_spawned": "it exists, the controller does not know",
    "agent_spawned_told": "it does",
    "agent_exited": "a process ended, the controller does not know",
    "agent_exited_told": "it does",
    "agent_kill": "an order to kill a process came",
    "agent_killed": "it was killed",
}
"""places in the agent of a host without the controller"""
POINTS = RANK_POINTS | SHELL_POINTS | AGENT_POINTS
FRAME_POINTS = ("frame_out", "frames_out", "frame_in")


class FaultAction(enum.Enum):
    """What happens to the process that reaches the point."""

    KILL = "kill"
    STOP = "stop"
    WEDGE = "wedge"
    """alive and beating, but this thread never goes on"""
    CLOSE = "close"
    """its control channel is cut; the process goes on"""


@dataclass(frozen=True)
class Fault:
    """At the `nth` time (1-based) that `point` is reached, do `action`.

    In a file: `rank` says in which rank (-1: whichever comes first), or in the agent of which, or, at a point of the controller, to which;
    `after` is the place in the file of a fault that must have happened before reaching counts. At a point of the controller, `incarnation`
    is the first process of the rank that is meant.
    """

    point: str
    action: FaultAction
    nth: int = 1
    rank: int = -1
    after: int = -1
    incarnation: int = 0

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise InvalidInputError(f"unknown fault point {self.point!r}; known: {', '.join(POINTS)}")
        if self.nth < 1:
            raise InvalidInputError(f"fault at {self.point!r} is to happen the {self.nth}th time; give 1 or more")


def parse_fault(point: str, action: str, nth: int = 1, rank: int = -1, after: int = -1, incarnation: int = 0) -> Fault:
    """From text. Raises InvalidInputError naming what is known."""
    if action not in (a.value for a in FaultAction):
        raise InvalidInputError(f"unknown fault action {action!r}; known: {', '.join(a.value for a in FaultAction)}")
    return Fault(point, FaultAction(action), nth, rank, after, incarnation)


class FaultFile:
    """Faults that a test gives to running ranks: {"id": word, "faults": [{"rank", "point", "action", "nth", "after"}]}.

    Whoever lets one happen first makes the file `marker(i)`: each happens once, whichever processes and incarnations get there, and
    the test sees that it did.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.id = ""
        self.faults: list[Fault] = []
        self._seen: tuple[int, int] | None = None

    def marker(self, place: int) -> str:
        """The file that says that a fault has happened."""
        return f"{self.path}.{self.id}.{place}"

    def has_changed(self) -> bool:
        """Look; True after another file was read. One that is gone has no faults. Replace it, never write to it in place."""
        try:
            stat = os.stat(self.path)
            if (stat.st_ino, stat.st_mtime_ns) == self._seen:
                return False
            with open(self.path) as file:
                stat, record = os.fstat(file.fileno()), json.load(file)
        except FileNotFoundError:
            self.faults = []
            return False
        seen = stat.st_ino, stat.st_mtime_ns
        self._seen, self.id = seen, record["id"]
        self.faults = [parse_fault(**fault) for fault in record["faults"]]
        return True

    def has_happened(self, place: int) -> bool:
        return os.path.exists(self.marker(place))

    def victim(self, place: int) -> int | None:
        """The process to which this fault has happened; None if it has not."""
        try:
            with open(self.marker(place)) as file:
                return int(file.read())
        except FileNotFoundError:
            return None

    def claim(self, place: int, pid: int) -> bool:
        """Whether the caller is the first to let this fault happen, to process `pid`."""
        marker = self.marker(place)
        mine = f"{marker}.{os.getpid()}.{threading.get_ident()}"
        with open(mine, "w") as file:
            file.write(str(pid))
        try:
            os.link(mine, marker)  # whoever sees it sees who it was, too
        except FileExistsError:
            return False
        finally:
            os.unlink(mine)
        return True


class FaultPlan:
    """The faults of one process: `faults`, each once, and those that `file` holds for it.

    Attributes:
        ranks: who this process is; an agent is all the ranks whose seats it has.
        control: its channel to the controller.
    """

    def __init__(
        self, faults: Sequence[Fault] = (), control: socket.socket | None = None, *, rank: int = -1, file: FaultFile | None = None
    ) -> None:
        self.ranks: Collection[int] = (rank,)
        self.control = control
        self._faults = list(faults)
        self._file = file
        self._reached: Counter[str] = Counter()
        self._reached_in_file: Counter[int] = Counter()

    def __bool__(self) -> bool:
        """Whether there may ever be a fault."""
        return bool(self._faults) or self._file is not None

    @property
    def watches_frames(self) -> bool:
        """Whether a fault waits at a single frame: then frames must be sent and taken one by one."""
        self._look()
        known = [*self._faults, *(self._file.faults if self._file else ())]
        return any(fault.point in FRAME_POINTS for fault in known)

    def reach(self, point: str, **where: int) -> None:
        """The process is at `point`; `where` (epoch, step, …) is for whoever debugs it."""
        if self._faults:
            self._reached[point] += 1
            for fault in self._faults:
                if fault.point == point and fault.nth == self._reached[point]:
                    self._act(fault.action)
        if self._file is not None:
            self._look()
            self._reach_in_file(point, self._file)

    def _look(self) -> None:
        if self._file is not None and self._file.has_changed():
            self._reached_in_file.clear()

    def _reach_in_file(self, point: str, file: FaultFile) -> None:
        for place, fault in enumerate(file.faults):
            if fault.point in SHELL_POINTS:
                self._obey(place, fault, file)
                continue
            is_here = fault.point == point and (fault.rank == -1 or fault.rank in self.ranks)
            if is_here and self._is_due(place, fault, file) and file.claim(place, os.getpid()):
                self._act(fault.action)

    def _is_due(self, place: int, fault: Fault, file: FaultFile) -> bool:
        """Count that the fault's point was reached."""
        if fault.after >= 0 and not file.has_happened(fault.after):
            return False
        self._reached_in_file[place] += 1
        return self._reached_in_file[place] >= fault.nth

    def _obey(self, place: int, fault: Fault, file: FaultFile) -> None:
        """The controller can kill, stop and cut off a rank, but not wedge it: that the rank does itself, where its main thread is next."""
        is_wedge = fault.action is FaultAction.WEDGE and fault.rank in self.ranks
        if is_wedge and threading.current_thread() is threading.main_thread() and file.victim(place) == os.getpid():
            self._act(FaultAction.WEDGE)

    def _act(self, action: FaultAction) -> None:
        match action:
            case FaultAction.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case FaultAction.STOP:
                os.kill(os.getpid(), signal.SIGSTOP)
            case FaultAction.WEDGE:
                threading.Event().wait()
            case FaultAction.CLOSE:
                if self.control is not None:
                    with suppress(OSError):  # it may be closed already
                        self.control.shutdown(socket.SHUT_RDWR)
