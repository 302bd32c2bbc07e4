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


def inodes(process: Path) -> set[int]:
    """Of the backups that a process has open or mapped."""
    try:
        found = {os.stat(fd).st_ino for fd in (process / "fd").iterdir() if NAME in os.readlink(fd)}
        return found | {int(line.split()[4]) for line in (process / "maps").read_text().splitlines() if NAME in line}
    except OSError:
        return set()


def holders(inode: int) -> set[int]:
    """Processes that have this backup."""
    return {int(process.name) for process in Path("/proc").iterdir() if process.name.isdigit() and inode in inodes(process)}


def test_lost_experts_come_from_the_hosts_memory(checkpoint):
    asked = prompts(16)
    arguments = ("--ep-size", "4", "--host-backup", "experts", "--restart", "never")
    with ServerProcess(checkpoint("mixtral"), *arguments) as server:
        backup = server.wait_status(lambda s: s["host_backup"]["experts"] == s["host_backup"]["of"])["host_backup"]
        layers, experts = server.facts["layers"], server.facts["experts"]
        assert backup["of"] == layers * experts
        (inode,) = inodes(Path(f"/proc/{server.process.pid}"))
        assert len(holders(inode)) >= 5, "the controller and every rank have it"

        async def kill() -> None:
            await committed(server, 200)
            server.signal_rank(1)

        disturbed = asyncio.run(run_streams(server, asked, kill()))
        recovery = server.status()["recoveries"][0]
        assert recovery["experts_lost"] > 0
        assert recovery["bytes_moved"]["checkpoint"] == 0
        server.process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while holders(inode):
            assert time.monotonic() < deadline, holders(inode)
            time.sleep(0.05)
    assert disturbed[:8] == reference(checkpoint("mixtral"), 8)
