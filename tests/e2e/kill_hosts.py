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
        self._gone: set[int] = set()
        """agents that will not go on, or are stopped: others must have their seats"""
        self._stopped: list[AgentProcess] = []
        self._resumed: list[tuple[AgentProcess, int]] = []
        """agents that go on, and how much each had said by then"""

    def __enter__(self) -> Hosts:
        for node in [*NODES.values()] * 2:
            self._start(node)
        return self

    def __exit__(self, *_: object) -> None:
        for _, agent in self._agents:
            agent.kill()
            agent.__exit__(None, None, None)

    def _start(self, node: str) -> None:
        self._agents.append((node, AgentProcess(*self._command, "--node", node).__enter__()))

    def last_words(self) -> str:
        """What each agent said last, and where its threads are, for a cell that failed; they end."""
        states: dict[AgentProcess, str] = {}
        for _, agent in self._agents:
            with suppress(OSError):
                states[agent] = Path(f"/proc/{agent.process.pid}/stat").read_text().split()[2]
        for _, agent in self._agents:
            agent.process.send_signal(signal.SIGABRT)  # PYTHONFAULTHANDLER is set
            agent.process.send_signal(signal.SIGCONT)
            agent.process.wait()
        return "\n".join(
            f"agent of node {node}, pid {agent.process.pid}, was {states.get(agent, 'gone')}: {agent.stderr.strip()[-2000:]}"
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
            if agent.process.pid not in pids or cell.action == "close":
                continue
            self._gone.add(agent.process.pid)
            if cell.action == "stop":
                self._stopped.append(agent)
            else:
                if cell.action == "wedge":
                    agent.process.kill()
                agent.wait(10)
                agent.__exit__(None, None, None)
                self._agents.remove((node, agent))
                self._start(node)

    def is_over(self, status: dict[str, Any]) -> bool:
        """Whether each seat whose agent failed has been given anew. Then those that were stopped go on, and are waited for until they know
        that they have none: an agent that still takes itself for the old one would let the next cell's faults happen to it."""
        if self._gone & {agent["pid"] for node in status["nodes"] for agent in node["agents"]}:
            return False
        self._gone.clear()
        while self._stopped:
            agent = self._stopped.pop()
            self._resumed.append((agent, len(agent.stderr)))
            agent.process.send_signal(signal.SIGCONT)
        self._resumed = [(agent, said) for agent, said in self._resumed if "waiting for ranks" not in agent.stderr[said:]]
        return not self._resumed


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
