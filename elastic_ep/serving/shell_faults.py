"""Fault points of the controller's shell. The controller may not fail, so what happens there is done to the rank that the fault names."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from typing import NamedTuple

from elastic_ep.brain.events import Command, Emit, MakePlan, Publish, Send, StartRank, StepCommitted
from elastic_ep.brain.messages import Install, RunStep, Stage
from elastic_ep.brain.state import BrainState
from elastic_ep.core.recovery import GroupState, Phase, Transition
from elastic_ep.runtime.faults import Fault, FaultAction, FaultFile, FaultPlan

PHASE_POINTS = {
    Phase.FENCING: ("fencing_begin", "fencing_end"),
    Phase.PLANNING: ("planning_begin", "planning_end"),
    Phase.INSTALLING: ("installing_begin", "installing_end"),
    Phase.RESUMING: ("resuming_begin", "resuming_end"),
    Phase.SERVING: ("serving_begin", "serving_end"),
}
"""phase -> points before and after the commands that its beginning leads to are carried out"""
NO_POINTS = (Phase.BOOTING, Phase.REFUSING, Phase.DOWN)
"""no member serves"""


class Victim(NamedTuple):
    """The process in a rank's seat. `pid` is None until the process exists, `cut` until it has said hello."""

    incarnation: int
    pid: int | None
    cut: Callable[[], None] | None


class ShellFaults(FaultPlan):
    """What a fault file has for the controller.

    Args:
        victim: rank -> who is in its seat; None if it has failed, or is to stay empty.
    """

    def __init__(self, file: FaultFile, victim: Callable[[int], Victim | None]) -> None:
        super().__init__(file=file)
        self._victim = victim
        self._waiting: dict[int, Fault] = {}
        """reached before there was a process to do it to"""
        self._latest: Transition | None = None

    def carry_out(self, commands: Sequence[Command], execute: Callable[[Command], None], state: BrainState) -> None:
        """Execute commands with the points around them."""
        entered = [PHASE_POINTS[phase] for phase in self._entered(state.group) if phase not in NO_POINTS]
        for begin, _ in entered:
            self.reach(begin)
        for command in commands:
            self._before(command, state)
            execute(command)
            self._after(command)
        for _, end in entered:
            self.reach(end)

    def _entered(self, group: GroupState) -> list[Phase]:
        """The phases that began since this was last asked."""
        new: list[Phase] = []
        for transition in reversed(group.history):
            if transition is self._latest:
                break
            new.insert(0, transition.after)
        self._latest = group.history[-1] if group.history else None
        return new

    def _before(self, command: Command, state: BrainState) -> None:
        match command:
            case Send(message=RunStep()):
                self.reach("send_step")
            case Send(message=Install()):
                self.reach("send_install")
            case Send(message=Stage()):
                self.reach("send_stage")
            case StartRank():
                if state.operation is not None and command.rank in state.operation.joiners:
                    self.reach("operation_grow")
                self.reach("rank_start")
            case StepCommitted():
                self.reach("commit")
            case MakePlan() if command.change is not None:
                self.reach("change_begin")
            case Publish(kind="operation_started"):
                self.reach("operation_begin")
            case Publish(kind="rank_retired"):
                self.reach("operation_retire")
            case Publish(kind="operation_finished"):
                self.reach("operation_end")

    def _after(self, command: Command) -> None:
        match command:
            case Send(message=RunStep()):
                self.reach("step_sent")
            case Send(message=Install()):
                self.reach("install_sent")
            case Send(message=Stage()):
                self.reach("stage_sent")
            case StartRank():
                self.reach("rank_asked")
            case Emit():
                self.reach("emitted")

    def settle(self) -> None:
        """Do what was reached, to those that there are now."""
        assert self._file is not None
        for place, fault in list(self._waiting.items()):
            victim = self._victim(fault.rank)
            if victim is None or victim.incarnation < fault.incarnation:
                continue
            if victim.pid is None or (fault.action is FaultAction.CLOSE and victim.cut is None):
                continue
            del self._waiting[place]
            if self._file.claim(place, victim.pid):
                _do(fault.action, victim, victim.pid)

    def _reach_in_file(self, point: str, file: FaultFile) -> None:
        for place, fault in enumerate(file.faults):
            if fault.point != point or place in self._waiting:
                continue
            victim = self._victim(fault.rank)
            if victim is None or victim.incarnation < fault.incarnation:
                continue  # nobody is meant yet
            if self._is_due(place, fault, file) and not file.has_happened(place):
                self._waiting[place] = fault
                self.settle()

    def _look(self) -> None:
        if self._file is not None and self._file.has_changed():
            self._reached_in_file.clear()
            self._waiting.clear()


def _do(action: FaultAction, victim: Victim, pid: int) -> None:
    match action:
        case FaultAction.KILL | FaultAction.STOP:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself, which nobody has been told yet
                os.kill(pid, signal.SIGKILL if action is FaultAction.KILL else signal.SIGSTOP)
        case FaultAction.CLOSE:
            assert victim.cut is not None
            victim.cut()
        case FaultAction.WEDGE:
            pass  # the rank sees that it is meant
