"""Agents at the controller's door: who gets which seats, what is started when, and what the brain hears. Real sockets, no ranks."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from elastic_ep.brain import events as ev
from elastic_ep.brain.events import FailureCause
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.control.address import dial
from elastic_ep.runtime.control.agent_messages import (
    AgentBuffer,
    Beat,
    Goodbye,
    KillProcess,
    Offer,
    ProcessReport,
    Refused,
    Seated,
    StartOver,
    StartProcess,
    Terms,
    encode,
)
from elastic_ep.runtime.control.auth import AuthError, Role
from elastic_ep.serving.agents import Agents, Hooks
from elastic_ep.serving.remote import RemoteRanks, parse_nodes
from elastic_ep.testing.hosts import free_port

TOKEN = "a token of some length"
WAIT_S = 5.0


class Door:
    """An `Agents` with two local ranks, three of node b and one of node c, and a record of what it says to the brain."""

    def __init__(self, wait_s: float = 60.0) -> None:
        self.port = free_port()
        remote = RemoteRanks((("b", 3), ("c", 1)), f"tcp:127.0.0.1:{self.port}", TOKEN, "a", wait_s=wait_s)
        self.heard: list[Any] = []
        self.callers: list[Caller] = []
        self.dead: set[tuple[int, int]] = set()
        hooks = Hooks(self.heard.append, lambda *failure: self.heard.append(failure), lambda *key: key not in self.dead)
        self.agents = Agents(remote, 6, "/models/x", "mark", 0.2, hooks)

    async def __aenter__(self) -> Door:
        await self.agents.listen(lambda: asyncio.Protocol())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.agents.close("the test is over")
        for caller in self.callers:
            caller.writer.close()
            with suppress(OSError):
                await caller.writer.wait_closed()

    async def call(self, token: str = TOKEN) -> Caller:
        caller = Caller()
        await caller.dial(self.port, token)
        self.callers.append(caller)
        return caller

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.001)


class Caller:
    """An agent's connection, by hand."""

    async def dial(self, port: int, token: str) -> None:
        sock = await asyncio.to_thread(dial, f"tcp:127.0.0.1:{port}", WAIT_S, token, Role.AGENT)
        self.reader, self.writer = await asyncio.open_connection(sock=sock)
        self._buffer, self._messages = AgentBuffer(), []

    async def next(self) -> Any:
        """The next message that is no beat."""
        async with asyncio.timeout(WAIT_S):
            while not self._messages:
                data = await self.reader.read(1 << 16)
                assert data, "the controller closed the connection"
                self._messages += [m for m in self._buffer.feed(data) if not isinstance(m, Beat)]
        return self._messages.pop(0)

    def say(self, message: Any) -> None:
        self.writer.write(encode(message))

    async def offer(self, node: str = "b", ranks: int | None = None, agent_id: str = "one", running: Any = ()) -> Any:
        """What comes of an offer."""
        assert isinstance(await self.next(), Terms)
        self.say(Offer(agent_id, node, "host-b", 17, ranks, running))
        return await self.next()


def run(scenario: Any, **door: Any) -> None:
    async def main() -> None:
        async with Door(**door) as place:
            await scenario(place)

    asyncio.run(main())


def test_an_agent_gets_its_nodes_seats_and_what_was_wanted_for_them():
    async def scenario(door: Door) -> None:
        door.agents.start(3, 0, {"rank": {"n": 3}})
        caller = await door.call()
        assert await caller.offer() == Seated((2, 3, 4))
        assert await caller.next() == StartProcess(3, 0, {"rank": {"n": 3}})
        door.agents.start(4, 0, {})
        assert await caller.next() == StartProcess(4, 0, {})
        door.agents.kill(4, 0, "heartbeat")
        assert await caller.next() == KillProcess(4, 0)
        assert door.heard == [ev.SeatsPresent((2, 3, 4))]

    run(scenario)


def test_two_agents_share_a_node():
    async def scenario(door: Door) -> None:
        first = await door.call()
        assert await first.offer(ranks=2) == Seated((2, 3))
        second = await door.call()
        refused = await second.offer(agent_id="two", ranks=2)
        assert refused == Refused("2 of the 3 ranks of node 'b' are taken by another agent", is_final=False)
        third = await door.call()
        assert await third.offer(agent_id="three") == Seated((4,))
        fourth = await door.call()
        assert (await fourth.offer(agent_id="four", node="x")).is_final
        here, away = door.agents.status()
        assert (here["absent_ranks"], away["absent_ranks"]) == ([], [5])
        assert [agent["ranks"] for agent in here["agents"]] == [[2, 3], [4]]
        assert away["agents"] == []

    run(scenario)


def test_an_agent_that_asks_again_and_again_is_logged_once(caplog):
    """Spare agents ask several times a second: a controller that says so each time fills its disk, or hangs once nobody reads its log."""

    async def scenario(door: Door) -> None:
        first = await door.call()
        await first.offer()
        for _ in range(3):
            spare = await door.call()
            assert isinstance(await spare.offer(agent_id="spare"), Refused)
        other = await door.call()
        assert isinstance(await other.offer(agent_id="other"), Refused)

    run(scenario)
    assert [r.getMessage().partition(":")[0] for r in caplog.records if "refused" in r.getMessage()] == ["an agent was refused"] * 2


def test_what_an_agent_reports_reaches_the_brain_for_its_seats_only():
    async def scenario(door: Door) -> None:
        caller = await door.call()
        await caller.offer()
        caller.say(ProcessReport("spawned", 2, 0, 99))
        caller.say(ProcessReport("exited", 5, 0, 98, "signal SIGKILL"))
        caller.say(ProcessReport("exited", 0, 0, 98, "signal SIGKILL"))
        caller.say(ProcessReport("stopped", 3, 0, 97, "signal SIGSTOP"))
        caller.say(ProcessReport("exited", 2, 0, 99, "signal SIGKILL"))
        await door.until(lambda: len(door.heard) == 3)
        assert door.heard[1:] == [(3, 0, FailureCause.STOPPED, "signal SIGSTOP"), (2, 0, FailureCause.EXITED, "signal SIGKILL")]

    run(scenario)


def test_a_lost_agents_seats_are_absent():
    async def scenario(door: Door) -> None:
        caller = await door.call()
        await caller.offer()
        caller.writer.close()
        await door.until(lambda: len(door.heard) == 2)
        assert isinstance(door.heard[1], ev.SeatsAbsent)
        assert door.heard[1].ranks == (2, 3, 4)
        assert "node b is gone" in door.heard[1].reason

    run(scenario)


def test_a_silent_agent_is_lost_and_a_beating_one_is_not():
    async def scenario(door: Door) -> None:
        silent, beating = await door.call(), await door.call()
        await silent.offer()
        await beating.offer(node="c", agent_id="two")

        async def beat() -> None:
            while True:
                beating.say(Beat(((5, 0, "S"),)))
                await asyncio.sleep(0.02)

        beats = asyncio.create_task(beat())
        await door.until(lambda: any(isinstance(event, ev.SeatsAbsent) for event in door.heard))
        assert [event.ranks for event in door.heard if isinstance(event, ev.SeatsAbsent)] == [(2, 3, 4)]
        assert door.agents.state_of(5, 0) == "S"
        assert door.agents.state_of(2, 0) == ""
        beats.cancel()

    run(scenario)


def test_the_same_agent_comes_back_and_is_told_who_must_start_over():
    async def scenario(door: Door) -> None:
        for rank in (2, 3, 4):
            door.agents.start(rank, 0, {})
        caller = await door.call()
        await caller.offer()
        door.dead.add((3, 0))
        door.agents.kill(3, 0, "heartbeat: silent for 0.9 s")
        door.agents.start(3, 1, {"new": True})
        again = await door.call()
        seated = await again.offer(running=((2, 0), (3, 0), (4, 0)))
        reason = "process 0 of rank 3 was given up (heartbeat: silent for 0.9 s)"
        assert seated == Seated((2, 3, 4), (StartOver(3, 0, reason),))
        assert await again.next() == StartProcess(3, 1, {"new": True})
        assert not any(isinstance(event, ev.SeatsAbsent) for event in door.heard)

    run(scenario)


def test_agents_that_do_not_come_are_not_waited_for_and_goodbye_is_said():
    async def scenario(door: Door) -> None:
        for rank in (2, 3, 4, 5):
            door.agents.start(rank, 0, {})
        caller = await door.call()
        await caller.offer(node="c")
        await door.until(lambda: any(isinstance(event, ev.SeatsAbsent) for event in door.heard))
        absent = next(event for event in door.heard if isinstance(event, ev.SeatsAbsent))
        assert absent == ev.SeatsAbsent((2, 3, 4), "no agent of node b came within 0.3 s")
        await door.agents.close("the server stopped")
        assert await caller.next() == StartProcess(5, 0, {})
        assert await caller.next() == Goodbye("the server stopped")

    run(scenario, wait_s=0.3)


def test_a_stranger_is_refused():
    async def scenario(door: Door) -> None:
        with pytest.raises(AuthError, match="refused this token"):
            await door.call("another token of some length")
        assert door.heard == []

    run(scenario)


def remote(**changes: Any) -> RemoteRanks:
    values = {"nodes": (("b", 2),), "control_listen": "tcp://10.0.0.1:7000", "token": TOKEN, "node": "a"} | changes
    return RemoteRanks(**values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nodes": (("a", 2),)}, "'a' is named twice"),
        ({"nodes": (("b", 1), ("b", 1))}, "'b' is named twice"),
        ({"nodes": (("b", 0),)}, "b=0: give at least 1"),
        ({"control_listen": "unix:/x"}, "give tcp://HOST:PORT"),
        ({"control_listen": "10.0.0.1:7000"}, "bad address"),
        ({"control_listen": "tcp://10.0.0.1:0"}, "1 to 65535"),
        ({"control_listen": "tcp://0.0.0.0:7000"}, "--mesh-host"),
        ({"wait_s": -1.0}, "--remote-wait is -1"),
    ],
)
def test_bad_settings_are_refused(changes, words):
    with pytest.raises(InvalidInputError, match=words.replace("(", r"\(")):
        remote(**changes)


def test_remote_seats_are_the_last_ones():
    assert remote(nodes=parse_nodes(["b=2,c=1"])).labels(5) == ("a", "a", "b", "b", "c")
    assert TOKEN not in repr(remote())
    with pytest.raises(InvalidInputError, match="--ep-size is 1"):
        remote().labels(1)
    with pytest.raises(InvalidInputError, match="give NODE=COUNT"):
        parse_nodes(["b"])
