"""The agents of other hosts: which seats each has, what is started and killed through them, and what the brain hears of it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from elastic_ep.brain import events as ev
from elastic_ep.brain.events import FailureCause
from elastic_ep.runtime.control.agent_messages import (
    AgentMessage,
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
)
from elastic_ep.runtime.control.agent_stream import AgentStream
from elastic_ep.runtime.control.auth import Role, derive_token
from elastic_ep.serving.gate import Gate
from elastic_ep.serving.remote import RemoteRanks

log = logging.getLogger(__name__)

BEAT_S = 0.1
SILENCE_FACTOR = 3.0
"""an agent is given up after so many heartbeat timeouts: its ranks beat for themselves, nothing hurries"""
REASONS_KEPT = 1024
OFFER_TIMEOUT_S = 60.0
"""an agent may have to read the headers of a large checkpoint before it offers"""


def no_point(point: str) -> None:
    """No fault is wanted anywhere."""


class Hooks(NamedTuple):
    """What the controller does for its agents.

    Attributes:
        feed: hand an event to the brain.
        fail: (rank, incarnation, cause, detail) a rank's process failed.
        expects: (rank, incarnation) -> whether this process is, or may become, a member.
        reach: a fault point is reached.
        spawned: a process is known to exist.
    """

    feed: Callable[[ev.Event], None]
    fail: Callable[[int, int, FailureCause, str], None]
    expects: Callable[[int, int], bool]
    reach: Callable[[str], None] = no_point
    spawned: Callable[[], None] = lambda: None


class Agent:
    """One connected agent.

    Attributes:
        ranks: its seats.
        states: (rank, incarnation) -> state letter, as last told.
    """

    def __init__(self, stream: AgentStream) -> None:
        self.stream = stream
        self.offer: Offer | None = None
        self.ranks: tuple[int, ...] = ()
        self.states: dict[tuple[int, int], str] = {}
        self.pids: dict[tuple[int, int], int] = {}


class Agents:
    """All seats of other hosts. One for a server with remote ranks.

    Attributes:
        run_token: what this run's ranks prove to the controller and to each other.
    """

    def __init__(self, remote: RemoteRanks, ep_size: int, checkpoint: str, fingerprint: str, heartbeat_timeout_s: float, hooks: Hooks):
        self._remote = remote
        self._labels = remote.labels(ep_size)
        self._first = ep_size - remote.num_ranks
        self._hooks = hooks
        self._heartbeat_timeout_s = heartbeat_timeout_s
        run_id = secrets.token_hex(16)
        self.run_token = derive_token(remote.token, run_id)
        silence_s = SILENCE_FACTOR * heartbeat_timeout_s
        self._terms = Terms(run_id, checkpoint, fingerprint, BEAT_S, silence_s)
        self._holders: dict[int, Agent] = {}
        self._all: set[Agent] = set()
        self._wanted: dict[int, tuple[int, dict[str, Any]]] = {}
        """rank -> incarnation and program that its seat is to run"""
        self._given_up: OrderedDict[tuple[int, int], str] = OrderedDict()
        self._refused: OrderedDict[str, str] = OrderedDict()
        """agent -> why it was refused last"""
        self._server: asyncio.Server | None = None
        self._closed = False

    async def listen(self, make_rank_link: Callable[[], asyncio.Protocol]) -> None:
        """Let agents and their ranks in; after a while go on without those that have not come. Raises OSError."""
        loop = asyncio.get_running_loop()
        tokens = {Role.AGENT: self._remote.token, Role.RANK: self.run_token}

        def admit(role: Role) -> asyncio.Protocol:
            return make_rank_link() if role is Role.RANK else self._new_agent()

        host, port = self._remote.listen_address
        self._server = await loop.create_server(lambda: Gate(tokens, admit), host, port, backlog=1024, reuse_address=True)
        self._timer = loop.call_later(self._remote.wait_s, self._stop_waiting)

    def is_remote(self, rank: int) -> bool:
        """Whether the seat belongs to another host."""
        return self._first <= rank < len(self._labels)

    # ---- orders

    def start(self, rank: int, incarnation: int, program: dict[str, Any]) -> None:
        """Have the seat's agent start a process, now or when it comes."""
        self._wanted[rank] = (incarnation, program)
        agent = self._holders.get(rank)
        if agent is not None:
            agent.stream.send(StartProcess(rank, incarnation, program))

    def kill(self, rank: int, incarnation: int, reason: str) -> None:
        """Have the process killed if its agent can be reached. Whoever calls has cut its channel: it is shut out in any case."""
        self._given_up[rank, incarnation] = reason
        if len(self._given_up) > REASONS_KEPT:
            self._given_up.popitem(last=False)
        if self._wanted.get(rank, (-1,))[0] == incarnation:
            del self._wanted[rank]
        agent = self._holders.get(rank)
        if agent is not None:
            agent.stream.send(KillProcess(rank, incarnation))

    def why_given_up(self, rank: int, incarnation: int) -> str:
        """What to tell a process that was."""
        return f"process {incarnation} of rank {rank} was given up ({self._given_up.get((rank, incarnation), 'long ago')})"

    def state_of(self, rank: int, incarnation: int) -> str:
        """State letter of a process as its agent told within half a heartbeat timeout; "" when nothing fresh is known. After a cut the
        agent has been silent for as long as the rank."""
        agent = self._holders.get(rank)
        if agent is None or asyncio.get_running_loop().time() - agent.stream.last_heard > self._heartbeat_timeout_s / 2:
            return ""
        return agent.states.get((rank, incarnation), "")

    async def close(self, reason: str) -> None:
        """Tell the agents that it is over."""
        self._closed = True
        if self._server is not None:
            self._timer.cancel()
            self._server.close()
        for agent in self._all:
            agent.stream.send(Goodbye(reason))
            agent.stream.close()
        await asyncio.sleep(0)

    def status(self) -> list[dict[str, Any]]:
        """One entry per other node, for `/elastic/status`."""
        entries = []
        for label, _ in self._remote.nodes:
            ranks = self._seats(label)
            offers = {id(a): (list(a.ranks), a.offer) for a in (self._holders.get(rank) for rank in ranks) if a is not None}
            agents = [{"host": offer.host, "pid": offer.pid, "ranks": held} for held, offer in offers.values() if offer is not None]
            absent = [rank for rank in ranks if rank not in self._holders]
            entries.append({"node": label, "ranks": ranks, "absent_ranks": absent, "agents": agents})
        return entries

    def pids(self) -> dict[tuple[int, int], int]:
        return {key: pid for agent in self._all for key, pid in agent.pids.items()}

    # ---- agents that come and go

    def _seats(self, label: str) -> list[int]:
        return [rank for rank in range(self._first, len(self._labels)) if self._labels[rank] == label]

    def _new_agent(self) -> AgentStream:
        # The three know each other; the stream is made first.
        stream = AgentStream(lambda m: self._on_message(agent, m), lambda reason: self._on_lost(agent, reason), Beat)
        agent = Agent(stream)
        self._all.add(agent)
        loop = asyncio.get_running_loop()
        loop.call_soon(stream.send, self._terms)
        loop.call_later(OFFER_TIMEOUT_S, self._check_offered, agent)
        return stream

    def _check_offered(self, agent: Agent) -> None:
        if agent.offer is None and agent in self._all:
            self._all.discard(agent)
            agent.stream.close()

    def _on_message(self, agent: Agent, message: AgentMessage) -> None:
        match message:
            case Offer():
                self._on_offer(agent, message)
            case ProcessReport():
                self._on_report(agent, message)
            case Beat():
                agent.states = {(rank, incarnation): letter for rank, incarnation, letter in message.processes}

    def _on_offer(self, agent: Agent, offer: Offer) -> None:
        if self._closed or agent.offer is not None:
            return
        ranks = self._seats_for(agent, offer)
        if not ranks:
            return
        agent.offer, agent.ranks = offer, ranks
        for rank in ranks:
            self._holders[rank] = agent
        given_up = [key for key in offer.running if key[0] not in ranks or not self._hooks.expects(*key)]
        start_over = tuple(StartOver(*key, self.why_given_up(*key)) for key in given_up)
        self._hooks.reach("seats_offered")
        agent.stream.send(Seated(ranks, start_over))
        self._hooks.reach("seats_given")
        agent.stream.start_beating(self._terms.beat_s, self._terms.silence_s)
        for rank in ranks:
            incarnation, program = self._wanted.get(rank, (-1, {}))
            if incarnation >= 0 and (rank, incarnation) not in offer.running:
                agent.stream.send(StartProcess(rank, incarnation, program))
        log.info("agent of node %s on %s has ranks %s", offer.node, offer.host, list(ranks))
        self._hooks.feed(ev.SeatsPresent(ranks))

    def _seats_for(self, agent: Agent, offer: Offer) -> tuple[int, ...]:
        """The seats that it gets; () after it was refused. The same agent on a new connection keeps what it had."""
        seats = self._seats(offer.node)
        before = next((a for a in self._all if a.offer is not None and a.offer.agent_id == offer.agent_id), None)
        if before is not None:
            self._all.discard(before)
            before.stream.close()
            agent.pids = before.pids
            return before.ranks
        free = [rank for rank in seats if rank not in self._holders]
        asked = len(free) if offer.ranks is None else offer.ranks
        if not seats:
            known = ", ".join(label for label, _ in self._remote.nodes)
            self._refuse(agent, offer, f"the server has no ranks for node {offer.node!r}, it has some for: {known}; check --node", True)
        elif asked > len(seats):
            self._refuse(agent, offer, f"node {offer.node!r} has {len(seats)} ranks, --ranks asks for {asked}; ask for fewer", True)
        elif not free or asked > len(free):
            taken = len(seats) - len(free)
            self._refuse(agent, offer, f"{taken} of the {len(seats)} ranks of node {offer.node!r} are taken by another agent", False)
        else:
            self._refused.pop(offer.agent_id, None)
            return tuple(free[:asked])
        return ()

    def _refuse(self, agent: Agent, offer: Offer, reason: str, is_final: bool) -> None:
        if self._refused.get(offer.agent_id) != reason:  # it asks again, several times a second
            log.warning("an agent was refused: %s", reason)
        self._refused[offer.agent_id] = reason
        if len(self._refused) > REASONS_KEPT:
            self._refused.popitem(last=False)
        agent.stream.send(Refused(reason, is_final))
        agent.stream.close()
        self._all.discard(agent)

    def _on_report(self, agent: Agent, report: ProcessReport) -> None:
        key = (report.rank, report.incarnation)
        if report.rank not in agent.ranks:
            return
        if report.kind == "spawned":
            agent.pids[key] = report.pid
            self._hooks.spawned()
        elif report.kind == "stopped":
            self._hooks.fail(*key, FailureCause.STOPPED, report.status)
        else:
            agent.pids.pop(key, None)
            self._hooks.fail(*key, FailureCause.EXITED, report.status)

    def _on_lost(self, agent: Agent, reason: str) -> None:
        self._all.discard(agent)
        if agent.offer is None or self._closed:
            return
        self._hooks.reach("seats_lost")
        log.warning("lost the agent of node %s on %s: %s", agent.offer.node, agent.offer.host, reason)
        self._leave(agent.ranks, f"the agent of node {agent.offer.node} is gone: {reason}")

    def _stop_waiting(self) -> None:
        for label, _ in self._remote.nodes:
            ranks = tuple(rank for rank in self._seats(label) if rank in self._wanted and rank not in self._holders)
            if ranks:
                log.warning("no agent of node %s came within %g s; going on without ranks %s", label, self._remote.wait_s, list(ranks))
                self._leave(ranks, f"no agent of node {label} came within {self._remote.wait_s:g} s")

    def _leave(self, ranks: tuple[int, ...], reason: str) -> None:
        for rank in ranks:
            self._holders.pop(rank, None)
        self._hooks.feed(ev.SeatsAbsent(ranks, reason))
