"""The sign of life that a process gives up first of all when it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_ep.runtime.launch.launcher import Launcher, ProcessEvent
from elastic_ep.runtime.launch.lives import Lives

WAIT_S = 20.0


def holder(lives: Lives, cell: int) -> tuple[int, int]:
    """A process that holds the cell until byte or end come through the pipe; its pid and the pipe."""
    ready_r, ready_w = os.pipe()
    go_r, go_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go_w)
        lives.hold(cell)
        os.write(ready_w, b"x")
        os.read(go_r, 1)
        os._exit(0)
    os.close(go_r)
    os.read(ready_r, 1)
    os.close(ready_r)
    os.close(ready_w)
    return pid, go_w


def end_by_kill(pid: int, go: int) -> None:
    os.kill(pid, signal.SIGKILL)


def end_by_itself(pid: int, go: int) -> None:
    os.write(go, b"x")


@pytest.mark.parametrize("end", [end_by_kill, end_by_itself])
def test_the_end_is_told_before_the_process_is_reaped(end: Callable[[int, int], None]) -> None:
    lives = Lives()
    cell, ended = lives.new_cell(), threading.Event()
    pid, go = holder(lives, cell)
    lives.watch(cell, ended.set)
    assert not ended.is_set()
    end(pid, go)
    assert ended.wait(WAIT_S)
    os.waitpid(pid, 0)
    os.close(go)
    lives.close()


def test_a_process_that_has_ended_is_told_at_once() -> None:
    lives = Lives()
    cell, ended = lives.new_cell(), threading.Event()
    pid, go = holder(lives, cell)
    end_by_kill(pid, go)
    os.waitpid(pid, 0)
    os.close(go)
    lives.watch(cell, ended.set)
    assert ended.wait(WAIT_S)
    lives.close()


def test_a_cell_that_nobody_held_tells_nothing() -> None:
    lives = Lives()
    told: list[str] = []
    lives.watch(lives.new_cell(), lambda: told.append("ended"))
    for thread in threading.enumerate():
        if thread.name.startswith("life"):
            thread.join(WAIT_S)
    assert not told
    lives.close()


def wait_for_ever(config: dict[str, object]) -> int:
    signal.pause()
    return 0


def no_preload(argument: str) -> None:
    """Nothing to import."""


def test_the_launcher_tells_of_an_end_before_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    # the launcher does not look into the working folder
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)

    async def scenario() -> list[ProcessEvent]:
        events: list[ProcessEvent] = []
        changed = asyncio.Event()

        def on_event(event: ProcessEvent) -> None:
            events.append(event)
            changed.set()

        async def until(kind: str) -> ProcessEvent:
            while True:
                for event in events:
                    if event.kind == kind:
                        return event
                changed.clear()
                await asyncio.wait_for(changed.wait(), WAIT_S)

        launcher = Launcher(f"{__name__}:no_preload", "", on_event, lambda: None)
        launcher.start(asyncio.get_running_loop())
        launcher.spawn(3, 7, f"{__name__}:wait_for_ever", {})
        os.kill((await until("spawned")).pid, signal.SIGKILL)
        await until("ending")
        await until("exited")
        launcher.close()
        return events

    events = asyncio.run(scenario())
    assert {(event.rank, event.incarnation) for event in events} == {(3, 7)}
    assert sorted(event.kind for event in events) == ["ending", "exited", "spawned"]
    assert next(event.status for event in events if event.kind == "exited") == "signal SIGKILL"


def test_a_cell_is_not_given_away_while_its_process_lives() -> None:
    lives = Lives()
    cell, ended = lives.new_cell(), threading.Event()
    pid, go = holder(lives, cell)
    lives.watch(cell, ended.set)
    assert cell not in [lives.new_cell() for _ in range(3)]
    end_by_kill(pid, go)
    assert ended.wait(WAIT_S)
    os.waitpid(pid, 0)
    os.close(go)
    assert lives.new_cell() == cell
    lives.close()
