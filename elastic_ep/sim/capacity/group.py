"""A group that serves for months: the brain at the grain of failures. Membership, plans, installs and rejoins are the real ones; steps and
requests are left out, and time is priced from bytes over links.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elastic_ep.brain import events as ev
from elastic_ep.brain import planner
from elastic_ep.brain.brain import Brain
from elastic_ep.brain.messages import DenseLoaded, Hello, Install, Installed, LoadedSlot, LoadOrder, Stage, Staged
from elastic_ep.core.errors import InsufficientSlotsError
from elastic_ep.core.links import LinkLoads, Source, SourceKind
from elastic_ep.core.quotas import balance_of, rank_loads
from elastic_ep.core.recovery import Phase
from elastic_ep.sim.capacity.setup import Setup
from elastic_ep.sim.timeline import Timeline

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Pause:
    """A time in which nobody got a token. `kind` is that of the brain's record."""

    start_s: float
    seconds: float
    kind: str
    tier: int
    ranks: tuple[int, ...]
    experts_lost: int


@dataclass
class History:
    """What happened.

    Attributes:
        capacity: (seconds, share of the full group's throughput) after each change.
        moved: bytes by source, all layers.
        solve_s: how long each plan took to solve on this machine.
    """

    failures: list[float] = field(default_factory=list)
    rejoins: list[float] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    capacity: list[tuple[float, float]] = field(default_factory=list)
    moved: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    solve_s: list[float] = field(default_factory=list)
    lost_experts: int = 0


_KIND_OF = {SourceKind.LOCAL: "local", SourceKind.SAME_NODE: "peer", SourceKind.OTHER_NODE: "peer"}


class Group:
    """One brain and ranks without contents of their own. `run` simulates so many hours."""

    def __init__(self, setup: Setup, failures_per_gpu_hour: float, seed: int) -> None:
        self.setup = setup
        self.rng = random.Random(seed)
        self.rate_per_s = failures_per_gpu_hour * setup.ep_size / HOUR_S
        self.timeline = Timeline()
        self.settings = setup.brain_settings()
        self.topology = self.settings.topology
        self.brain = Brain(self.settings, 0.0)
        self.history = History()
        self.staged: dict[int, set[tuple[int, int, int]]] = defaultdict(set)
        self.failed_at: float | None = None
        self.best_balance = 0.0
        """of the first placement, by which later ones are measured"""
        self._queue: deque[ev.Event] = deque()
        self._busy = False
        self._timer_at: float | None = None
        self._boot()

    def _boot(self) -> None:
        for rank in range(self.setup.ep_size):
            self._join(rank, 0)
        while self.brain.state.group.phase is not Phase.SERVING:
            assert self.timeline.step(), "the group does not boot"
        self.history = History()
        self._note_capacity()

    def run(self, hours: float) -> History:
        """So many hours from here on; times in the history count from now."""
        start = self.timeline.now
        end = start + hours * HOUR_S
        if self.rate_per_s > 0:
            self.timeline.after(self.rng.expovariate(self.rate_per_s), self._fail)
        while (due := self.timeline.next_at) is not None and due < end:
            self.timeline.step()
        found = self.history
        found.failures = [t - start for t in found.failures]
        found.rejoins = [t - start for t in found.rejoins]
        found.capacity = [(t - start, share) for t, share in found.capacity]
        return found

    # ---- faults

    def _fail(self) -> None:
        """A GPU fails; if its seat is empty already, nothing is lost."""
        self.timeline.after(self.rng.expovariate(self.rate_per_s), self._fail)
        rank = self.rng.randrange(self.setup.ep_size)
        if not self.brain.state.membership.is_active(rank) or not self.brain.state.seats[rank].is_alive:
            return
        now = self.timeline.now
        self.history.failures.append(now)
        self.failed_at = now if self.failed_at is None else self.failed_at
        self.history.capacity.append((now, 0.0))
        event = ev.RankFailed(rank, self.brain.state.seats[rank].incarnation, ev.FailureCause.HEARTBEAT)
        self.timeline.after(self.setup.prices.detect_s, self._feed, event)

    def _join(self, rank: int, incarnation: int) -> None:
        self._feed(ev.RankConnected(Hello(rank, incarnation, 1, "", "", f"r{rank}.{incarnation}")))
        self.timeline.after(self.setup.prices.dense_s, self._say, [(rank, incarnation, DenseLoaded(0, 0.0))])

    # ---- the brain's loop

    def _say(self, messages: Iterable[tuple[int, int, Any]]) -> None:
        for rank, incarnation, message in messages:
            self._feed(ev.RankSaid(rank, incarnation, message))

    def _feed(self, event: ev.Event) -> None:
        self._queue.append(event)
        if self._busy:
            return
        self._busy = True
        while self._queue:
            commands = self.brain.handle(self._queue.popleft(), self.timeline.now)
            self._execute(commands)
        self._busy = False
        due = self.brain.next_deadline()
        if due is not None and (self._timer_at is None or due < self._timer_at):
            self._timer_at = due
            self.timeline.at(due, self._on_timer, due)

    def _on_timer(self, due: float) -> None:
        if due == self._timer_at:
            self._timer_at = None
            self._feed(ev.TimePassed())

    def _execute(self, commands: list[ev.Command]) -> None:
        installs: list[tuple[int, Install]] = []
        prices = self.setup.prices
        for command in commands:
            match command:
                case ev.Fence():
                    self.timeline.after(prices.fence_s, self._feed, ev.RankFenced(command.rank, command.incarnation))
                case ev.StartRank():
                    self.timeline.after(prices.replace_s, self._join, command.rank, command.incarnation)
                case ev.MakePlan():
                    wait = prices.plan_s if command.change is None else 0.0
                    self.timeline.after(wait, self._feed, self._plan(command))
                case ev.Send() if isinstance(command.message, Install):
                    installs.append((command.rank, command.message))
                case ev.Send() if isinstance(command.message, Stage):
                    self._stage(command.rank, command.message)
                case ev.Publish():
                    self._on_publish(command)
        if installs:
            self._install(installs)

    def _plan(self, command: ev.MakePlan) -> ev.Planned:
        arguments = (self.settings.plan, self.topology, command.active, self.brain.state.contents.experts, self.setup.load)
        started = time.perf_counter()
        try:
            plans = (planner.plan(*arguments),) if command.change is None else planner.plan_change(*arguments, leaving=command.leaving)
        except InsufficientSlotsError as error:
            return ev.Planned(command.epoch, None, str(error), command.change)
        self.history.solve_s.append(time.perf_counter() - started)
        return ev.Planned(command.epoch, plans[0], change=command.change, then=plans[1:])

    # ---- what ranks do, priced

    def _seconds(self, rank: int, loads: Iterable[LoadOrder], links: LinkLoads) -> None:
        """Add what these loads put on the links, and count their bytes."""
        for load in loads:
            source = Source(SourceKind(load.source), load.peer)
            for link, _ in links.links_of(source, rank):
                links.num_bytes[link] += self.setup.bytes_of_load
            self.history.moved[_KIND_OF.get(source.kind, source.kind.value)] += self.setup.bytes_of_load

    def _links(self) -> LinkLoads:
        return LinkLoads(self.setup.speeds, self.topology.labels("node"))

    def _busiest(self, links: LinkLoads) -> float:
        return next(iter(links.seconds().values()), 0.0)

    def _stage(self, rank: int, stage: Stage) -> None:
        links = self._links()
        self._seconds(rank, stage.loads, links)
        self.staged[rank] = {(load.layer, load.slot, load.expert) for load in stage.loads}
        message = Staged(stage.change, {"checkpoint": 0})
        incarnation = self.brain.state.seats[rank].incarnation
        self.timeline.after(self._busiest(links), self._say, [(rank, incarnation, message)])

    def _install(self, installs: list[tuple[int, Install]]) -> None:
        links, answers = self._links(), []
        for rank, order in installs:
            staged = self.staged.pop(rank, set())
            self._seconds(rank, [load for load in order.loads if (load.layer, load.slot, load.expert) not in staged], links)
            loaded = tuple(LoadedSlot(load.layer, load.slot, load.expert, load.expert + 1) for load in order.loads)
            message = Installed(order.epoch, loaded, {"checkpoint": 0}, 0.0)
            answers.append((rank, self.brain.state.seats[rank].incarnation, message))
        self.timeline.after(self.setup.prices.install_s + self._busiest(links), self._say, answers)

    # ---- what is noted

    def _on_publish(self, command: ev.Publish) -> None:
        if command.kind != "recovery":
            return
        now, record = self.timeline.now, self.brain.state.recoveries[-1]
        tier, kind = int(record.tier), record.kind
        if self.failed_at is not None:
            start, self.failed_at = self.failed_at, None
        else:
            start = record.agreed if record.agreed is not None else now
        resume_s = self.setup.prices.resume_s if tier < 2 else 0.0
        self.history.pauses.append(Pause(start, now - start + resume_s, kind, tier, tuple(record.ranks), record.experts_lost))
        self.history.lost_experts += record.experts_lost
        if kind in ("rejoin", "join"):
            self.history.rejoins.append(now)
        self._note_capacity(resume_s)

    def _note_capacity(self, later_s: float = 0.0) -> None:
        """Share of the full group's throughput: members, times how evenly they are loaded beside the first placement."""
        state = self.brain.state
        assert state.plan is not None
        ranks = np.array(state.membership.ranks)
        load = self.setup.load if self.setup.load is not None else np.ones((self.setup.placed_layers, self.setup.num_experts))
        balance = balance_of(rank_loads(load, state.plan.placement, self.topology, state.plan.quotas), ranks)
        self.best_balance = self.best_balance or float(balance)
        share = len(ranks) / self.setup.ep_size * min(1.0, float(balance) / self.best_balance)
        self.history.capacity.append((self.timeline.now + later_s, share))
