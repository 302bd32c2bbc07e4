"""Two hosts: ranks that an agent runs for a controller on another one. Links are cut, processes killed, tokens stay the same."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from elastic_ep.brain.messages import Hello, StartOver
from elastic_ep.runtime.control import wire
from elastic_ep.runtime.control.address import dial
from elastic_ep.runtime.control.agent_messages import AgentBuffer
from elastic_ep.runtime.control.auth import Role, derive_token
from elastic_ep.testing.hosts import AgentProcess, NamespaceLink, NotPermitted, ProxyLink, wait_until
from elastic_ep.testing.server import ServerProcess, rank_processes
from tests.e2e.conftest import prompts, reference
from tests.e2e.test_streams import committed, run_streams

TOKEN = "0123456789abcdef0123456789abcdef"
HEARTBEAT_S = 0.9
Link = NamespaceLink | ProxyLink
SHAPE = ("--ep-size", "4", "--num-redundant-experts", "8", "--remote-ranks", "b=2", "--node", "a")


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return str(path)


def pids_of(server: ServerProcess, ranks: list[int]) -> list[int]:
    status = server.status()
    return [status["ranks"][rank]["pid"] for rank in ranks]


def all_active(status: dict[str, Any]) -> bool:
    return sum(status["active_ranks"]) == 4 and status["survives"]["any_node"]


def check_streams(server: ServerProcess, checkpoint, count: int = 4) -> None:
    assert asyncio.run(run_streams(server, prompts(count))) == reference(checkpoint("qwen3_moe"), 8)[:count]


def cut_and_heal(server: ServerProcess, agent: AgentProcess, link: Link, checkpoint) -> None:
    """The link goes down under load: found within the heartbeat bound, served on by the controller's side with the same tokens; when it is
    up, the ranks that were cut off start over and rejoin, and all four serve."""

    async def cut() -> None:
        await committed(server, server.status()["tokens_committed"] + 100)
        link.cut()

    before = server.status()
    assert asyncio.run(run_streams(server, prompts(8), cut())) == reference(checkpoint("qwen3_moe"), 8)
    status = server.status()
    assert status["active_ranks"] == [1, 1, 0, 0]
    recovery = status["recoveries"][len(before["recoveries"])]
    print({key: recovery[key] for key in ("ranks", "kind", "tier", "detect_ms", "stall_ms", "experts_lost")})
    assert sorted(recovery["ranks"]) == [2, 3]
    assert recovery["kind"] == "heartbeat"
    assert recovery["experts_lost"] == 0
    assert recovery["detect_ms"] <= (HEARTBEAT_S + 0.5) * 1e3
    # By the time the link is up again the agent, too, has been given up for its silence.
    server.wait_status(lambda status: status["nodes"][0]["absent_ranks"] == [2, 3])
    link.heal()
    assert agent.wait_seated() == [2, 3]
    status = server.wait_status(all_active)
    assert all(status["ranks"][rank]["incarnation"] > before["ranks"][rank]["incarnation"] for rank in (2, 3))
    assert all(status["ranks"][rank]["pid"] == before["ranks"][rank]["pid"] for rank in (0, 1))
    check_streams(server, checkpoint)


@pytest.mark.timeout(300)  # three model libraries to import, on a busy machine
def test_an_interface_goes_down_and_comes_up(checkpoint, token_file):
    """The other host is a network namespace; a cable is pulled."""
    with ExitStack() as stack:
        try:
            link = stack.enter_context(NamespaceLink())
        except NotPermitted as error:
            pytest.skip(f"{error}; the same with a TCP proxy in between runs in test_the_life_of_remote_ranks")
        agent = stack.enter_context(AgentProcess(link.dial, "--token-file", token_file, "--node", "b", prefix=link.prefix))
        arguments = (*SHAPE, "--control-listen", link.listen, "--token-file", token_file)
        server = stack.enter_context(ServerProcess(checkpoint("qwen3_moe"), *arguments))
        assert agent.wait_seated() == [2, 3]
        status = server.status()
        assert all_active(status)
        assert [rank["node"] for rank in status["ranks"]] == ["a", "a", "b", "b"]
        cut_and_heal(server, agent, link, checkpoint)
        assert server.status()["requests"]["failed"] == 0
        assert server.stop() == 0
        assert agent.wait(5) == 0


def check_refusals(controller: str, refusals: dict[str, tuple[str, ...]]) -> None:
    """Each agent is turned away with one line that says this."""
    with ExitStack() as stack:
        agents = {words: stack.enter_context(AgentProcess(controller, *arguments)) for words, arguments in refusals.items()}
        for words, agent in agents.items():
            assert agent.wait(60) == 2
            (line,) = agent.stderr.strip().splitlines()
            assert line.startswith("elastic-ep rank: error: ")
            assert words in line


def say_hello(controller: str, rank: int, incarnation: int) -> Any:
    """What the controller answers a rank's process of this run that says hello."""
    with dial(controller, 5.0, TOKEN, Role.AGENT) as sock:
        (terms,) = AgentBuffer().feed(sock.recv(1 << 16))
    with dial(controller, 5.0, derive_token(TOKEN, terms.run_id), Role.RANK) as sock:
        sock.settimeout(5.0)
        sock.sendall(wire.encode(Hello(rank, incarnation, os.getpid(), "h", "", "tcp:127.0.0.1:1")))
        return wire.receive(sock)


@pytest.mark.timeout(300)  # three model libraries to import, on a busy machine
def test_the_life_of_remote_ranks(checkpoint, token_file, tmp_path):
    """A server begins without its other host, which comes late; strangers are turned away; a rank, the agent and the controller are
    killed."""
    other_token = tmp_path / "other"
    other_token.write_text("f" * 32)
    with ExitStack() as stack:
        link = stack.enter_context(ProxyLink())
        arguments = (*SHAPE, "--control-listen", link.listen, "--token-file", token_file, "--remote-wait", "0.1")
        server = stack.enter_context(ServerProcess(checkpoint("qwen3_moe"), *arguments))
        status = server.status()
        assert status["active_ranks"] == [1, 1, 0, 0]
        assert status["nodes"] == [{"node": "b", "ranks": [2, 3], "absent_ranks": [2, 3], "agents": []}]

        right = ("--token-file", token_file, "--node", "b")
        refusals = {
            "refused this token": ("--token-file", str(other_token), "--node", "b"),
            "no ranks for node 'c'": ("--token-file", token_file, "--node", "c"),
            "has 2 ranks, --ranks asks for 3": (*right, "--ranks", "3"),
            "is not the one that the server has": (*right, "--checkpoint", str(checkpoint("mixtral"))),
        }
        check_refusals(link.dial, refusals)

        agent = stack.enter_context(AgentProcess(link.dial, *right))
        assert agent.wait_seated() == [2, 3]
        server.wait_status(all_active, 60)
        cut_and_heal(server, agent, link, checkpoint)
        # Their channels were never closed: it was the controller's word that ended them.
        assert agent.stderr.count("told to start over: process 1 of rank") == 2
        assert "was given up (heartbeat: silent for 0.9 s)" in agent.stderr

        # A rank is killed: its agent says so, and starts another.
        killed_at = server.status()["ranks"][3]["incarnation"]
        server.signal_rank(3, signal.SIGKILL)
        status = server.wait_status(lambda status: status["ranks"][3]["incarnation"] > killed_at and all_active(status))
        killed = next(r for r in status["recoveries"] if r["ranks"] == [3] and r["tier"] < 2)
        assert killed["kind"] == "exited"

        # A process of before that says hello is told to start over.
        answer = say_hello(link.dial, 3, killed_at)
        assert answer == StartOver(f"process {killed_at} of rank 3 was given up (exited: signal SIGKILL)")
        assert all_active(server.status())

        # The agent is killed: its ranks end, the server goes on, and another agent takes the seats.
        remote = pids_of(server, [2, 3])
        agent.kill()
        wait_until(lambda: not rank_processes(remote), 5, "the ranks of the killed agent have ended")
        server.wait_status(lambda status: status["active_ranks"] == [1, 1, 0, 0])
        check_streams(server, checkpoint)
        agent = stack.enter_context(AgentProcess(link.dial, *right))
        server.wait_status(all_active, 60)
        check_streams(server, checkpoint)
        assert server.status()["requests"]["failed"] == 0

        # The controller is killed: everything ends.
        everything = [*pids_of(server, [0, 1, 2, 3]), agent.process.pid]
        began = time.monotonic()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        assert agent.wait(5) == 2
        wait_until(lambda: not rank_processes(everything), 5, "all processes have ended")
        print(f"everything had ended {time.monotonic() - began:.1f} s after the controller")
        assert time.monotonic() - began < 5
        assert "has ended" in agent.stderr.splitlines()[-1]
