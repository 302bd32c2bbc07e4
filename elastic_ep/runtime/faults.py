"""Fault points: named places in a rank where a test can make it fail. Given by configuration, once or in a file that is read again
whenever it changes; a rank without a plan pays one look-up at the points outside of the layers, and nothing in them."""

from __future__ import annotations

import enum
import json
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_ep.core.errors import InvalidInputError

POINTS = {
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
    "serve_expert": "a peer asked for an expert",
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

    In a file: `rank` says in which rank (-1: whichever comes first), `after` the place in the file of a fault that must have happened
    before reaching counts.
    """

    point: str
    action: FaultAction
    nth: int = 1
    rank: int = -1
    after: int = -1

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise InvalidInputError(f"unknown fault point {self.point!r}; known: {', '.join(POINTS)}")
        if self.nth < 1:
            raise InvalidInputError(f"fault at {self.point!r} is to happen the {self.nth}th time; give 1 or more")


def parse_fault(point: str, action: str, nth: int = 1, rank: int = -1, after: int = -1) -> Fault:
    """From text. Raises InvalidInputError naming what is known."""
    if action not in (a.value for a in FaultAction):
        raise InvalidInputError(f"unknown fault action {action!r}; known: {', '.join(a.value for a in FaultAction)}")
    return Fault(point, FaultAction(action), nth, rank, after)


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
        except FileNotFoundError:
            self.faults = []
            return False
        seen = stat.st_ino, stat.st_mtime_ns
        if seen == self._seen:
            return False
        with open(self.path) as file:
            record = json.load(file)
        self._seen, self.id = seen, record["id"]
        self.faults = [parse_fault(**fault) for fault in record["faults"]]
        return True

    def has_happened(self, place: int) -> bool:
        return os.path.exists(self.marker(place))

    def claim(self, place: int) -> bool:
        """Whether the caller is the first to let this fault happen."""
        try:
            os.close(os.open(self.marker(place), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


class FaultPlan:
    """The faults of one process: `faults`, each once, and those that `file` holds for this rank."""

    def __init__(
        self, faults: Sequence[Fault] = (), control: socket.socket | None = None, *, rank: int = -1, file: FaultFile | None = None
    ) -> None:
        self._faults = list(faults)
        self._control = control
        self._rank = rank
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
            if fault.point != point or fault.rank not in (-1, self._rank) or (fault.after >= 0 and not file.has_happened(fault.after)):
                continue
            self._reached_in_file[place] += 1
            if self._reached_in_file[place] >= fault.nth and file.claim(place):
                self._act(fault.action)

    def _act(self, action: FaultAction) -> None:
        match action:
            case FaultAction.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case FaultAction.STOP:
                os.kill(os.getpid(), signal.SIGSTOP)
            case FaultAction.WEDGE:
                threading.Event().wait()
            case FaultAction.CLOSE:
                if self._control is not None:
                    self._control.shutdown(socket.SHUT_RDWR)
