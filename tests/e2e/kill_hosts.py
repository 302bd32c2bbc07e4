"""What the kill matrix has around its server: agents of other hosts, each with a spare that waits for its seats, and the host's backup."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from elastic_ep.testing.hosts import AgentProcess, free_port
from tests.e2e.kill_cells import AGENT_RANKS, Cell

NODES = dict(zip(AGENT_RANKS, ("b", "c"), strict=True))
"""rank -> its host"""


class Hosts:
    """Two agents for each node of `NODES`: one has the node's seat, the other is refused and asks again, its imports done."""

    def __init__(self, folder: Path, fault_file: Path) -> None:
        token, controller = folder / "token", f"tcp://127.0.0.1:{free_port()}"
        token.write_text("f0" * 16)
        self.arguments: tuple[str, ...] = ("--control-listen", controller, "--token-file", str(token), "--node", "a")
        for node in NODES.values():
            self.arguments += ("--remote-ranks", f"{node}=1")
        self._command = (controller, "--token-file", str(token), "--wait", "3600", "--fault-file", str(fault_file))
        self._agents: list[tuple[str, AgentProcess]] = []
        self._seated: set[str] = set()
        self._awaited: set[str] = set()
        self._stopped: list[int] = []

    def __enter__(self) -> Hosts:
        for node in [*NODES.values()] * 2:
            self._start(node)
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._stopped:
            os.kill(pid, signal.SIGCONT)
        for _, agent in self._agents:
            agent.kill()
            agent.__exit__(None, None, None)

    def _start(self, node: str) -> None:
        agent = AgentProcess(*self._command, "--node", node).__enter__()
        assert agent.process.stdout is not None
        os.set_blocking(agent.process.stdout.fileno(), False)
        self._agents.append((node, agent))

    def begin(self) -> None:
        """A cell begins: who gets a seat from here on counts."""
        self._look()
        self._seated.clear()

    def _look(self) -> None:
        for node, agent in self._agents:
            assert agent.process.stdout is not None
            with suppress(BlockingIOError):
                if os.read(agent.process.stdout.fileno(), 1 << 16):
                    self._seated.add(node)

    def last_words(self) -> str:
        """What each agent said last, for a cell that failed."""
        return "\n".join(
            f"agent of node {node}, pid {agent.process.pid}, status {agent.process.poll()}: {agent.stderr.strip()[-400:]}"
            for node, agent in self._agents
        )

    def ended(self) -> list[str]:
        """Agents that ended by themselves, which none may, and why. Others are put in their place."""
        found = []
        for node, agent in list(self._agents):
            status = agent.process.poll()
            if status is None or status == -signal.SIGKILL:
                continue
            found.append(f"an agent of node {node} ended by itself, status {status}: {agent.stderr.strip()[-500:]}")
            agent.__exit__(None, None, None)
            self._agents.remove((node, agent))
            self._start(node)
        return found

    def mend(self, cell: Cell, pids: Sequence[int]) -> None:
        """The faults have happened to these agents: put others in the place of those that will not go on, as an operator would."""
        for node, agent in list(self._agents):
            if agent.process.pid not in pids:
                continue
            self._awaited.add(node)
            if cell.action == "stop":
                self._stopped.append(agent.process.pid)
            elif cell.action in ("kill", "wedge"):
                self._look()
                if cell.action == "wedge":
                    agent.process.kill()
                agent.wait(10)
                agent.__exit__(None, None, None)
                self._agents.remove((node, agent))
                self._start(node)

    def is_over(self) -> bool:
        """Whether each seat whose agent failed has been given anew; then those that were stopped go on."""
        self._look()
        if not self._awaited <= self._seated:
            return False
        self._awaited.clear()
        while self._stopped:
            os.kill(self._stopped.pop(), signal.SIGCONT)
        return True


class Backup:
    """The memory of a server's host backup, from outside. `facts` are those of `ServerProcess`."""

    def __init__(self, pid: int, facts: dict[str, Any]) -> None:
        count = facts["layers"] * facts["experts"]
        self._ready = slice(count * 8, count * 9)
        for name in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{name}"
            with suppress(OSError):
                if "memfd:elastic-ep-experts" in os.readlink(path):
                    with open(path, "r+b") as file:
                        self._memory = mmap.mmap(file.fileno(), 0)
                    return
        raise AssertionError(f"process {pid} has no host backup")

    def empty(self) -> None:
        """Let every expert count as missing, so that ranks write them again."""
        self._memory[self._ready] = bytes(self._ready.stop - self._ready.start)
