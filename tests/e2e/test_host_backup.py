"""Experts in the host's memory: they bring lost ones back, and the memory goes with the processes, however those end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from elastic_ep.testing.server import ServerProcess
from tests.e2e.conftest import prompts, reference
from tests.e2e.test_streams import committed, run_streams

NAME = "memfd:elastic-ep-experts"


def holders() -> set[int]:
    """Processes that have a backup open or mapped."""
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                open_files = [os.readlink(fd) for fd in (process / "fd").iterdir()]
                if any(NAME in file for file in open_files) or NAME in (process / "maps").read_text():
                    found.add(int(process.name))
            except OSError:
                continue
    return found


def test_lost_experts_come_from_the_hosts_memory(checkpoint):
    asked, before = prompts(16), holders()
    arguments = ("--ep-size", "4", "--host-backup", "experts", "--restart", "never")
    with ServerProcess(checkpoint("mixtral"), *arguments) as server:
        backup = server.wait_status(lambda s: s["host_backup"]["experts"] == s["host_backup"]["of"])["host_backup"]
        layers, experts = server.facts["layers"], server.facts["experts"]
        assert backup["of"] == layers * experts
        assert len(holders() - before) >= 5, "the controller and every rank have it"

        async def kill() -> None:
            await committed(server, 200)
            server.signal_rank(1)

        disturbed = asyncio.run(run_streams(server, asked, kill()))
        recovery = server.status()["recoveries"][0]
        assert recovery["experts_lost"] > 0
        assert recovery["bytes_moved"]["checkpoint"] == 0
        server.process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while holders() - before:
            assert time.monotonic() < deadline, holders() - before
            time.sleep(0.05)
    assert disturbed[:8] == reference(checkpoint("mixtral"), 8)
