"""Ranks of other hosts as `serving/agents.py` and `runtime/launch/agent.py` deal with them: who starts and kills their processes, what
the controller hears of them, and what becomes of both sides when the wire between them is cut or a host goes down.

Beats are not sent one by one: silence is a wire that has been cut, or a host that has been down, for as long.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from elastic_ep.brain import events as ev
from elastic_ep.sim.machines import Machine
from elastic_ep.sim.network import CONTROLLER, Channel

if TYPE_CHECKING:
    from elastic_ep.sim.process import Process
    from elastic_ep.sim.world import World

SILENCE_FACTOR = 3.0
RETRY_S = 0.2
WAIT_S = 1.0
"""how long the start waits for agents"""
PLACES = 1000
"""where the places of hosts begin on the network, beside those of ranks"""

Key = tuple[int, int]


class Host:
    """One other host: its agent, and what the controller knows of that.

    Attributes:
        agent: which agent process runs there, 0 none; each gets a new number.
        holder: the agent that the controller takes for the holder of the seats, 0 none.
        session: number of the newest connection; `is_connected` is the agent's side of it.
        wanted: rank -> incarnation that its seat is to run.
    """

    def __init__(self, world: World, machine: Machine, index: int, ranks: tuple[int, ...]) -> None:
        self.world, self.machine, self.ranks = world, machine, ranks
        self.place = PLACES + index
        self.agents = self.agent = self.holder = self.session = 0
        self.is_up = True
        self.is_connected = False
        self.cuts = 0
        self.wanted: dict[int, int] = {}
        self.doomed: set[Key] = set()
        self.orders: Channel | None = None
        self.reports: Channel | None = None

    @property
    def wire_is_cut(self) -> bool:
        return self.world.net.wire(CONTROLLER, self.place).is_cut

    @property
    def silence_s(self) -> float:
        return SILENCE_FACTOR * self.world.settings.heartbeat_timeout_s * (1 + 0.1 * self.world.rng.random())

    # ---- the controller's side

    def start(self, rank: int, incarnation: int) -> None:
        """Have a process started, now or when its agent comes."""
        self.wanted[rank] = incarnation
        self._tell("start", rank, incarnation)

    def kill(self, rank: int, incarnation: int) -> None:
        if self.wanted.get(rank) == incarnation:
            del self.wanted[rank]
        self._tell("kill", rank, incarnation)

    def state_of(self, key: Key) -> str:
        """What its agent says of a process; "" where nothing fresh is known."""
        process = self.world.processes.get(key)
        if not self.holder or not self.is_connected or self.wire_is_cut or process is None:
            return ""
        return "X" if not process.is_alive else "T" if process.is_stopped else "S"

    def _tell(self, what: str, rank: int, incarnation: int) -> None:
        if self.orders is not None:
            self.orders.send((what, rank, incarnation))

    def on_offer(self, agent: int, running: tuple[Key, ...]) -> None:
        """An agent offers its host. The one that has the seats may come again; while another has them it is told to try later."""
        if self.holder not in (0, agent):
            self.world.timeline.after(RETRY_S, self.dial, agent)
            return
        self._close()
        self.holder, self.session, self.is_connected = agent, self.session + 1, True
        net = self.world.net
        self.orders = Channel(net, CONTROLLER, self.place, partial(self.obey, agent))
        self.reports = Channel(net, self.place, CONTROLLER, self.on_report)
        for key in running:
            if not self.world.brain.expects(*key):
                self._tell("kill", *key)
        for rank, incarnation in sorted(self.wanted.items()):
            if (rank, incarnation) not in running:
                self._tell("start", rank, incarnation)
        self.world.feed(ev.SeatsPresent(self.ranks))

    def on_report(self, report: tuple[Key, ev.FailureCause]) -> None:
        (rank, incarnation), cause = report
        self.world.feed(ev.RankFailed(rank, incarnation, cause))

    def on_lost(self, session: int, reason: str) -> None:
        """The controller finds that the connection is broken."""
        if session == self.session and self.holder:
            self.holder = 0
            self._close()
            self.world.feed(ev.SeatsAbsent(self.ranks, reason))

    def stop_waiting(self) -> None:
        """The start goes on without an agent that has not come."""
        if not self.holder and self.wanted:
            self.world.feed(ev.SeatsAbsent(self.ranks, "no agent came"))

    def _close(self) -> None:
        for channel in (self.orders, self.reports):
            if channel is not None:
                channel.is_closed = channel.is_broken = True
        self.orders = self.reports = None

    # ---- the agent's side

    def arrive(self) -> None:
        """A new agent process begins."""
        if self.is_up and not self.agent:
            self.agents += 1
            self.agent = self.agents
            self.dial(self.agent)

    def dial(self, agent: int) -> None:
        """Reach the controller and offer what runs here; again and again while it cannot be reached."""
        if agent != self.agent:
            return
        if self.wire_is_cut:
            self.world.timeline.after(RETRY_S, self.dial, agent)
        else:
            running = tuple(sorted((p.rank, p.incarnation) for p in self.running()))
            self.world.send_between(CONTROLLER, self.place, self._offer, agent, running)

    def _offer(self, agent: int, running: tuple[Key, ...]) -> None:
        if agent == self.agent:
            self.on_offer(agent, running)

    def running(self) -> list[Process]:
        return [p for p in self.world.processes.values() if p.rank in self.ranks and p.is_alive]

    def obey(self, agent: int, order: tuple[str, int, int]) -> None:
        if agent != self.agent:
            return
        what, rank, incarnation = order
        if what == "kill":
            self._end(rank, incarnation)
            return
        for other in self.running():
            if other.rank == rank:
                other.die()
        self.world.timeline.after(0.01 + 0.02 * self.world.rng.random(), self._spawn, agent, rank, incarnation)

    def _end(self, rank: int, incarnation: int) -> None:
        process = self.world.processes.get((rank, incarnation))
        if process is None:
            self.doomed.add((rank, incarnation))
        else:
            process.die()

    def _spawn(self, agent: int, rank: int, incarnation: int) -> None:
        if agent == self.agent and (rank, incarnation) not in self.doomed and (rank, incarnation) not in self.world.processes:
            self.world.begin(rank, incarnation)

    def report(self, key: Key, cause: ev.FailureCause) -> None:
        """Tell the controller how a process fares, if it can be reached."""
        if self.agent and self.reports is not None and self.is_connected:
            self.reports.send((key, cause))

    # ---- faults

    def cut(self, seconds: float) -> None:
        """Nothing comes or goes between this host and all others. Each side finds out by itself, if it lasts."""
        world = self.world
        inside = {self.place, *self.ranks}
        outside = [CONTROLLER, *(rank for rank in range(len(world.brain.state.seats)) if rank not in inside)]
        pairs = [(a, b) for a in sorted(inside) for b in outside]
        for a, b in pairs:
            world.net.wire(a, b).is_cut = True
        self.cuts += 1
        for call in (self._find_cut, self._find_cut_here):
            world.timeline.after(self.silence_s, call, self.session, self.cuts)
        world.timeline.after(seconds, self._heal, pairs, self.session)

    def _heal(self, pairs: list[tuple[int, int]], session: int) -> None:
        for a, b in pairs:
            self.world.net.heal(a, b)
        if not self.holder and self.is_connected:  # the controller has closed the connection: the next beat shows it
            self._find_lost_here()

    def _find_cut(self, session: int, cuts: int) -> None:
        if self.wire_is_cut and cuts == self.cuts:
            self.on_lost(session, "its agent is silent")

    def _find_cut_here(self, session: int, cuts: int) -> None:
        if self.wire_is_cut and cuts == self.cuts and session == self.session:
            self._find_lost_here()

    def _find_lost_here(self) -> None:
        """The agent finds that its connection is broken, and dials again."""
        if self.is_connected and self.agent:
            self.is_connected = False
            self.dial(self.agent)

    def agent_dies(self, seconds: float) -> None:
        """Its ranks end with it; the controller sees the connection close. Another agent is started later."""
        if not self.agent:
            return
        self.agent, self.is_connected = 0, False
        for process in self.running():
            self.world.end(process)
        self.world.send_between(CONTROLLER, self.place, self.on_lost, self.session, "its agent has ended")
        self.world.timeline.after(seconds, self.arrive)

    def go_down(self, seconds: float) -> None:
        """The power fails: processes, agent and memory are gone, and nobody is told."""
        if not self.is_up:
            return
        self.is_up, self.agent, self.is_connected = False, 0, False
        self.machine.lose_memory()
        for process in self.running():
            self.world.end(process, silently=True)
        self.world.timeline.after(self.silence_s, self.on_lost, self.session, "its agent is silent")
        self.world.timeline.after(seconds, self._come_up)

    def _come_up(self) -> None:
        self.is_up = True
        self.arrive()


def hosts_of(world: World, machines: dict[str, Machine]) -> dict[int, Host]:
    """rank -> its host, for seats of other hosts."""
    found: dict[int, Host] = {}
    nodes: tuple[Any, ...] = world.schedule.nodes
    for index, label in enumerate(world.schedule.remote):
        ranks = tuple(rank for rank, node in enumerate(nodes) if node == label)
        found |= dict.fromkeys(ranks, Host(world, machines[label], index, ranks))
    return found
