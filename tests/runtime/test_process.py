"""A process of this host where the system has no descriptor left."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from elastic_ep.runtime.launch import process
from elastic_ep.runtime.launch.process import LocalProcess

WAIT_S = 20.0


@contextmanager
def no_descriptors() -> Iterator[None]:
    """All are taken; those that are open stay so."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def sleeping() -> tuple[subprocess.Popen[bytes], LocalProcess, asyncio.Event]:
    """A process, what holds it, and the event of its end."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ended = asyncio.Event()
    return child, LocalProcess(child.pid, asyncio.get_running_loop(), ended.set), ended


def test_it_is_neither_lost_nor_taken_for_dead(monkeypatch, caplog):
    monkeypatch.setattr(process, "RETRY_S", 0.01)

    async def scenario() -> None:
        child, local, ended = sleeping()
        with no_descriptors():
            local.watch()
            assert local.state().letter == "?"
            assert not local.state().is_ending
        await asyncio.sleep(0.05)
        assert local.state().letter in ("R", "S")
        local.kill()
        await asyncio.wait_for(ended.wait(), WAIT_S)
        assert child.wait() < 0
        assert local.state().is_ending

    asyncio.run(scenario())
    assert "raise the limit of open files" in caplog.text


def test_it_is_killed_though_it_could_not_be_watched(monkeypatch):
    monkeypatch.setattr(process, "RETRY_S", 1000.0)

    async def scenario() -> None:
        child, local, ended = sleeping()
        with no_descriptors():
            local.watch()
        local.kill()
        await asyncio.wait_for(ended.wait(), WAIT_S)
        assert child.wait() < 0

    asyncio.run(scenario())
