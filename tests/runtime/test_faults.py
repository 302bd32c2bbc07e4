"""Fault points: those in the code are those declared, each where it belongs; a file's faults happen once each, where the file says."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

import elastic_ep
from elastic_ep.brain.events import Command, Emit, Publish, Send, StartRank, TokenEvent
from elastic_ep.brain.messages import ControllerMessage, RunStep
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.recovery import GroupState, Phase, Trigger
from elastic_ep.runtime.control.agent_messages import OrderMessage
from elastic_ep.runtime.faults import (
    AGENT_POINTS,
    RANK_POINTS,
    SHELL_POINTS,
    Fault,
    FaultAction,
    FaultFile,
    FaultPlan,
    parse_fault,
)
from elastic_ep.serving.config import ServeConfig
from elastic_ep.serving.shell_faults import NO_POINTS, PHASE_POINTS, ShellFaults, Victim

PACKAGE = Path(elastic_ep.__file__).parent
SHELL_FILES = {"serving/controller.py", "serving/agents.py", "serving/shell_faults.py"}
AGENT_FILES = {"runtime/launch/agent.py"}


def points_in(file: Path) -> Iterator[str]:
    """The argument of each call of a method `reach`, and the points of phases."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "reach":
            if isinstance(node.args[0], ast.Name) and file.name == "shell_faults.py":
                assert node.args[0].id in ("begin", "end"), f"{file}:{node.lineno}: only the points of a phase have no name here"
                yield from (point for pair in PHASE_POINTS.values() for point in pair)
                continue
            assert isinstance(node.args[0], ast.Constant), f"{file}:{node.lineno}: a point's name must be a literal"
            yield node.args[0].value


def test_the_points_in_the_code_are_those_declared():
    found: dict[str, set[str]] = {"rank": set(), "shell": set(), "agent": set()}
    for file in PACKAGE.rglob("*.py"):
        name = str(file.relative_to(PACKAGE))
        place = "shell" if name in SHELL_FILES else "agent" if name in AGENT_FILES else "rank"
        found[place] |= set(points_in(file))
    assert found == {"rank": set(RANK_POINTS), "shell": set(SHELL_POINTS), "agent": set(AGENT_POINTS)}


def test_each_phase_of_the_group_has_its_points():
    """A new phase needs points, or a reason why there is nobody to whom anything could be done in it."""
    assert sorted([*PHASE_POINTS, *NO_POINTS], key=str) == sorted(Phase, key=str)


def names_in(function: str) -> set[str]:
    """What a function of the shell's faults speaks of."""
    tree = ast.parse((PACKAGE / "serving/shell_faults.py").read_text())
    body = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    return {node.id for node in ast.walk(body) if isinstance(node, ast.Name)}


def test_each_message_to_a_rank_has_its_points():
    """A new message needs points before and after it, or a reason here."""
    without = {"Shutdown", "StartOver"}  # the process is to end, and nothing is expected of it any more
    messages = {cls.__name__ for cls in get_args(ControllerMessage)}
    for function in ("_before", "_after"):
        assert names_in(function) & messages == messages - without, function


def test_each_command_of_the_brain_has_its_points():
    """A new command needs points around its execution, or a reason here."""
    without = {
        "Fence": "fencing_begin and fencing_end are around it",
        "Probe": "a look at a silent process",
        "Stopped": "the server ends",
    }
    assert {cls.__name__ for cls in get_args(Command)} - names_in("_before") - names_in("_after") == set(without)


def test_each_event_that_the_brain_publishes_has_its_points():
    """What has a name for operators is a phase of something: a new one needs a point, or a reason here."""
    without = {
        "rank_starting": "rank_start",
        "rank_failed": "fencing_begin, for a member; nothing else waits for anybody else",
        "rank_fenced": "fencing_end",
        "step_void": "fencing_begin",
        "installed": "resuming_begin",
        "recovery": "serving_begin",
        "change_started": "send_stage",
        "change_failed": "nothing has changed",
        "rebalance_skipped": "nothing has changed",
        "rank_left_out": "nothing has changed",
        "source_failed": "said of what a rank has done",
        "slow": "a wait goes on",
    }
    kinds = set()
    for file in (PACKAGE / "brain").glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        kinds |= {call.args[0].value for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "publish"}
    tree = ast.parse((PACKAGE / "serving/shell_faults.py").read_text())
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert kinds - words == set(without)


def test_each_order_to_an_agent_has_its_points():
    """A new message from the controller needs points in `Agent._obey`, or a reason here."""
    without = {"Refused", "Goodbye", "Beat"}  # the agent has no seats, or no controller, any more; a beat changes nothing
    tree = ast.parse((PACKAGE / "runtime/launch/agent.py").read_text())
    obey = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "_obey")
    cases = [node for node in ast.walk(obey) if isinstance(node, ast.match_case)]
    with_points = {case.pattern.cls.id for case in cases if "self._faults.reach" in ast.unparse(case)}
    assert with_points == {cls.__name__ for cls in get_args(OrderMessage)} - without


def arm(path: Path, name: str, *faults: dict) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"id": name, "faults": list(faults)}))
    new.rename(path)


@pytest.fixture
def control() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(0)
    with ours, theirs:
        yield ours, theirs


def is_cut(theirs: socket.socket) -> bool:
    try:
        return theirs.recv(1) == b""
    except BlockingIOError:
        return False


def test_the_nth_time(control):
    plan = FaultPlan([Fault("step_begin", FaultAction.CLOSE, 3)], control[0])
    for count in (1, 2, 3):
        plan.reach("step_end")
        plan.reach("step_begin")
        assert is_cut(control[1]) == (count == 3)


def test_a_file_is_read_again_and_counts_from_there(control, tmp_path):
    path = tmp_path / "faults"
    plan = FaultPlan((), control[0], rank=1, file=FaultFile(str(path)))
    plan.reach("step_begin")
    arm(path, "a", {"rank": 1, "point": "step_begin", "action": "close", "nth": 2})
    plan.reach("step_begin")
    assert not is_cut(control[1])
    plan.reach("step_begin")
    assert is_cut(control[1])


def test_only_the_named_rank_and_only_once(control, tmp_path):
    path = tmp_path / "faults"
    arm(path, "a", {"rank": 1, "point": "step_begin", "action": "close"})
    FaultPlan((), control[0], rank=0, file=FaultFile(str(path))).reach("step_begin")
    assert not is_cut(control[1])
    FaultPlan((), control[0], rank=1, file=FaultFile(str(path))).reach("step_begin")
    assert is_cut(control[1])
    assert FaultFile(str(path)).has_changed()
    ours, theirs = socket.socketpair()
    theirs.settimeout(0)
    with ours, theirs:  # the next incarnation
        FaultPlan((), ours, rank=1, file=FaultFile(str(path))).reach("step_begin")
        assert not is_cut(theirs)


def test_after_another(control, tmp_path):
    path = tmp_path / "faults"
    first = {"rank": 0, "point": "install_begin", "action": "close"}
    arm(path, "a", first, {"rank": -1, "point": "step_begin", "action": "close", "after": 0})
    plan = FaultPlan((), control[0], rank=1, file=FaultFile(str(path)))
    plan.reach("step_begin")
    assert not is_cut(control[1])
    file = FaultFile(str(path))
    file.has_changed()
    file.claim(0, 1)
    plan.reach("step_begin")
    assert is_cut(control[1])


def test_frames_are_watched_only_while_a_fault_waits_there(tmp_path):
    path = tmp_path / "faults"
    plan = FaultPlan((), None, rank=1, file=FaultFile(str(path)))
    assert plan
    assert not FaultPlan()
    assert not plan.watches_frames
    arm(path, "a", {"rank": 1, "point": "frame_in", "action": "kill"})
    assert plan.watches_frames
    arm(path, "b", {"rank": 1, "point": "step_end", "action": "kill"})
    assert not plan.watches_frames


@pytest.mark.parametrize(("point", "action", "nth"), [("nowhere", "kill", 1), ("step_begin", "explode", 1), ("step_begin", "kill", 0)])
def test_a_fault_that_cannot_be(point, action, nth):
    with pytest.raises(InvalidInputError):
        parse_fault(point, action, nth)


# ---- what the controller does to a rank


class Ranks:
    """Processes that may be harmed, and who of them is in its seat."""

    def __init__(self, path: Path, count: int) -> None:
        self.processes = [subprocess.Popen(["sleep", "60"]) for _ in range(count)]
        self.cuts: list[int] = []
        self.seats: dict[int, Victim | None] = {r: Victim(0, p.pid, partial(self.cuts.append, r)) for r, p in enumerate(self.processes)}
        self.path = path
        self.file = FaultFile(str(path))
        self.faults = ShellFaults(FaultFile(str(path)), lambda rank: self.seats.get(rank))

    def letter(self, rank: int) -> str:
        """Its state letter, "Z" once it has ended."""
        return Path(f"/proc/{self.processes[rank].pid}/stat").read_text().rpartition(")")[2].split()[0]

    def wait(self, rank: int, letter: str) -> None:
        deadline = time.monotonic() + 5
        while self.letter(rank) != letter:
            assert time.monotonic() < deadline

    def arm(self, **fault: Any) -> None:
        arm(self.path, "-".join(map(str, fault.values())), fault)
        self.file.has_changed()


@pytest.fixture
def ranks(tmp_path) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path / "faults", 2)
    yield ranks
    for process in ranks.processes:
        process.kill()
        process.wait()


def test_the_named_rank_is_killed_or_stopped(ranks):
    ranks.arm(rank=1, point="send_step", action="stop", nth=2)
    ranks.faults.reach("send_step")
    assert ranks.file.victim(0) is None
    ranks.faults.reach("send_step")
    ranks.wait(1, "T")
    assert ranks.file.victim(0) == ranks.processes[1].pid
    ranks.arm(rank=0, point="send_step", action="kill")
    ranks.faults.reach("send_step")
    ranks.wait(0, "Z")


def test_a_rank_is_cut_off_once_it_can_be(ranks):
    """Reached before the process has said hello: done when it does, and once."""
    whole = ranks.seats[1]
    ranks.seats[1] = whole._replace(cut=None)
    ranks.arm(rank=1, point="rank_start", action="close")
    ranks.faults.reach("rank_start")
    assert ranks.cuts == []
    assert not ranks.file.has_happened(0)
    ranks.seats[1] = whole
    ranks.faults.settle()
    ranks.faults.settle()
    ranks.faults.reach("rank_start")
    assert ranks.cuts == [1]
    assert ranks.file.has_happened(0)


def test_only_the_process_that_is_meant(ranks):
    """Reaching a point does not count while the seat has failed, or holds an earlier process."""
    whole = ranks.seats[1]
    ranks.arm(rank=1, point="send_step", action="close", incarnation=1)
    ranks.faults.reach("send_step")
    ranks.seats[1] = None
    ranks.faults.reach("send_step")
    assert ranks.cuts == []
    ranks.seats[1] = whole._replace(incarnation=1)
    ranks.faults.reach("send_step")
    assert ranks.cuts == [1]


def test_a_wedge_is_obeyed_by_that_process_alone(ranks, monkeypatch):
    hung = []
    plan = FaultPlan((), None, rank=1, file=FaultFile(str(ranks.path)))
    monkeypatch.setattr(plan, "_act", hung.append)
    ranks.arm(rank=1, point="send_step", action="wedge")
    ranks.faults.reach("send_step")
    plan.reach("step_begin")
    assert hung == []  # another process of rank 1 is meant
    ranks.seats[1] = ranks.seats[1]._replace(pid=os.getpid())
    arm(ranks.path, "b", {"rank": 1, "point": "send_step", "action": "wedge"})
    ranks.faults.reach("send_step")
    thread = threading.Thread(target=plan.reach, args=("stage_begin",))
    thread.start()
    thread.join()
    assert hung == []  # only the main thread hangs
    plan.reach("step_begin")
    assert hung == [FaultAction.WEDGE]


def test_commands_are_carried_out_between_their_points(ranks, monkeypatch):
    """In order, with the phase's points around all of them; a phase is entered once."""
    log: list[str] = []
    monkeypatch.setattr(ranks.faults, "reach", log.append)
    state = SimpleNamespace(group=GroupState(), operation=None)

    def carry_out(*commands: Any) -> list[str]:
        log.clear()
        ranks.faults.carry_out(commands, lambda command: log.append(type(command).__name__), state)
        return log

    state.group.apply(Trigger.RANKS_READY, now=0.0, epoch=0, reason="")
    emit = Emit("r", TokenEvent(None, 0))
    assert carry_out(Send(0, RunStep(1, 1, ())), emit) == [
        "planning_begin",
        "send_step",
        "Send",
        "step_sent",
        "Emit",
        "emitted",
        "planning_end",
    ]
    assert carry_out(Publish("rank_retired", {}), StartRank(0, 1)) == [
        "operation_retire",
        "Publish",
        "rank_start",
        "StartRank",
        "rank_asked",
    ]
    state.operation = SimpleNamespace(joiners=(2,))
    assert carry_out(StartRank(2, 0)) == ["operation_grow", "rank_start", "StartRank", "rank_asked"]
    state.group.apply(Trigger.PLANNED, now=0.0, epoch=1, reason="")
    state.group.apply(Trigger.INSTALLED, now=0.0, epoch=1, reason="")
    assert carry_out() == ["installing_begin", "resuming_begin", "installing_end", "resuming_end"]


def test_a_point_of_the_controller_belongs_into_a_file():
    with pytest.raises(InvalidInputError, match="give it in a --fault-file"):
        ServeConfig("/models/x", 2, faults={0: [{"point": "send_step", "action": "kill"}]})
