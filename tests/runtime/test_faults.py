"""Fault points: those in the code are those declared, and a file of faults lets each happen once, in the rank it names."""

from __future__ import annotations

import ast
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import elastic_ep
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.faults import POINTS, Fault, FaultAction, FaultFile, FaultPlan, parse_fault


def points_in_code() -> Iterator[str]:
    """The argument of each call of a method `reach`, in all of the package."""
    for file in Path(elastic_ep.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "reach":
                assert isinstance(node.args[0], ast.Constant), f"{file}:{node.lineno}: a point's name must be a literal"
                yield node.args[0].value


def test_the_points_in_the_code_are_those_declared():
    assert set(points_in_code()) == set(POINTS)


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
    file.claim(0)
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
