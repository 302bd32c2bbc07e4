"""Fault points: named places in a rank where a test can make it fail. Given by configuration; a plan without faults costs one lookup."""

from __future__ import annotations

import enum
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_ep.core.errors import InvalidInputError

POINTS = ("dense_loaded", "install_begin", "load_expert", "install_end", "stage_expert", "step_begin", "step_end")


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
    """At the `nth` time (1-based) that `point` is reached, do `action`."""

    point: str
    action: FaultAction
    nth: int = 1

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise InvalidInputError(f"unknown fault point {self.point!r}; known: {', '.join(POINTS)}")
        if self.nth < 1:
            raise InvalidInputError(f"fault at {self.point!r} is to happen the {self.nth}th time; give 1 or more")


def parse_fault(point: str, action: str, nth: int) -> Fault:
    """From text. Raises InvalidInputError naming what is known."""
    if action not in (a.value for a in FaultAction):
        raise InvalidInputError(f"unknown fault action {action!r}; known: {', '.join(a.value for a in FaultAction)}")
    return Fault(point, FaultAction(action), nth)


class FaultPlan:
    """The faults of one process."""

    def __init__(self, faults: Sequence[Fault] = (), control: socket.socket | None = None) -> None:
        self._faults = list(faults)
        self._control = control
        self._reached: Counter[str] = Counter()

    def reach(self, point: str, **where: int) -> None:
        """The process is at `point`; `where` (epoch, step, …) is for whoever debugs it."""
        if not self._faults:
            return
        self._reached[point] += 1
        for fault in self._faults:
            if fault.point == point and fault.nth == self._reached[point]:
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
