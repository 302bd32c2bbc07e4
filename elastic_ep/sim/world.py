"""The controller's shell in virtual time: what `serving/controller.py` does with sockets, processes and timers, done to simulated ones.

The brain is the one that serves. Processes, wires and disks are made of a few lines each; faults are done to them by name.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from elastic_ep.brain import events as ev
from elastic_ep.brain.brain import Brain
from elastic_ep.brain.messages import Heartbeat, Hello, Install, LoadOrder, SamplingParams, StartOver
from elastic_ep.core.recovery import Phase
from elastic_ep.sim import faults, machines, planning
from elastic_ep.sim.agents import WAIT_S, hosts_of
from elastic_ep.sim.machines import HERE, Machine
from elastic_ep.sim.mesh import EOF, Call
from elastic_ep.sim.network import CONTROLLER, Channel, Network
from elastic_ep.sim.process import Process
from elastic_ep.sim.records import NOTHING, Client, Heard
from elastic_ep.sim.routing import Routing
from elastic_ep.sim.schedule import MAX_WAIT, Fault, Order, Request, Schedule
from elastic_ep.sim.settling import unsettled
from elastic_ep.sim.timeline import Timeline

LATENCY_S = 0.0002
MAX_AT_ONCE = 2000
NEVER = 1 << 60


class LivelockError(Exception):
    """The brain keeps itself busy without any time passing."""


class World:
    """A brain, its ranks and its clients.

    Attributes:
        heard, facts: what has just happened; `check` is called with it after every event, and after every event of the brain.
        harmed: (rank, incarnation) -> when it was made unable to serve, how.
    """

    heartbeat_s = 0.3
    exchange_timeout_s = 0.5
    bytes_per_expert = 1000

    def __init__(self, schedule: Schedule, check: Callable[[World], None] = lambda world: None, *, with_notes: bool = True) -> None:
        self.schedule = schedule
        self._check = check
        self.rng = random.Random(schedule.seed ^ 0x51AB)
        self.timeline = Timeline(with_notes=with_notes)
        self.net = Network(self.timeline, self.rng, LATENCY_S, schedule.loss)
        self.settings = schedule.settings()
        self.brain = Brain(self.settings, 0.0)
        self.clients: dict[str, Client] = {}
        self.heard: list[Heard] = []
        self.facts: list[tuple[Any, ...]] = []
        self.processes: dict[tuple[int, int], Process] = {}
        self.down: dict[tuple[int, int], Channel] = {}
        self.by_address: dict[str, Process] = {}
        self.harmed: dict[tuple[int, int], tuple[float, str]] = {}
        self.greeted: dict[tuple[int, int], float] = {}
        """when the hello of each process came"""
        self.unkillable: set[int] = set()
        self.flips: dict[int, int] = {}
        """seat -> reads to come, in whichever process, whose bytes will have one bit wrong"""
        self.doomed: dict[int, float] = {}
        """seats whose next process dies, and how long after its start"""
        self.answered: dict[tuple[int, int], set[tuple[int, int]]] = {}
        self.fenced_at = 0.0
        self.committed: set[int] = set()
        self.last_epoch = 0
        self.judged: Any = None
        """membership and phase of the brain when all predicates were asked last"""
        self.looked_at: dict[Process, tuple[Routing, Any]] = {}
        """tables and contents of each process when they were last compared"""
        self.saw_down = False
        self.ordered: dict[tuple[int, int], set[tuple[int, int]]] = {}
        """(epoch, step) -> processes that were told to run it"""
        self.declared = NOTHING
        self.change_failed_at: float | None = None
        """when a change was put off, until another is begun"""
        self.plans_due = 0
        self.stopped: str | None = None
        self.timer_at: float | None = None
        self._queue: deque[ev.Event] = deque()
        self._busy = False
        self._requests = deque(sorted(schedule.requests, key=lambda r: r.after))
        self._faults = deque(sorted(schedule.faults, key=lambda f: f.after))
        self._orders = deque(sorted(schedule.orders, key=lambda o: o.after))
        self._cancels: list[tuple[int, str]] = []
        self._find_next()
        self.machines = {name: Machine(name, schedule.has_backup) for name in (HERE, *schedule.remote)}
        self.hosts = hosts_of(self, self.machines)
        """rank -> its host, for seats of other hosts"""
        for host in dict.fromkeys(self.hosts.values()):
            self.timeline.after(schedule.late_s * self.rng.random(), host.arrive)
            self.timeline.after(WAIT_S, host.stop_waiting)
        for rank in range(schedule.ep_size):
            if rank in self.hosts:
                self.hosts[rank].start(rank, 0)
            else:
                self.timeline.after(0.001 * self.rng.random(), self.spawn, rank, 0)
        self._set_timer()

    # ---- the run

    @property
    def members(self) -> set[tuple[int, int]]:
        """(rank, incarnation) of each member of the newest epoch."""
        state = self.brain.state
        return {(rank, state.seats[rank].incarnation) for rank in state.membership.ranks}

    @property
    def is_planning(self) -> bool:
        """A plan was asked for and has not been taken in."""
        return self.plans_due > 0 or any(isinstance(event, ev.Planned) for event in self._queue)

    @property
    def is_over(self) -> bool:
        """Every fault and request has been, and nothing is left to wait for."""
        if not self.is_past_schedule or self.operation_runs:
            return False
        return all(c.finish or c.is_cancelled for c in self.clients.values()) and unsettled(self) == ""

    @property
    def operation_runs(self) -> bool:
        """Whether what an operator asked for is still to be ended, and the group is in a state to end it."""
        state = self.brain.state
        return state.operation is not None and self.stopped is None and state.group.phase not in (Phase.REFUSING, Phase.DOWN)

    @property
    def is_past_schedule(self) -> bool:
        """Everything that the schedule names has begun."""
        return self._next_at == NEVER

    def close(self) -> None:
        """Break the references that run in circles, so that all of it is freed at once and not by the collector. No use afterwards."""
        for process in self.processes.values():
            process.close()
        vars(self).clear()

    def step(self) -> bool:
        """One event. False when there is none, which no world with a living process reaches."""
        is_due = self.timeline.happened >= self._next_at and self._take_scheduled(self.timeline.happened)
        if not is_due and not self.timeline.step():
            if self.is_past_schedule:
                return False
            self.timeline.happened += 1
        if self.heard or self.facts:
            self.checked()
        return True

    def _take_scheduled(self, moment: int) -> bool:
        """Do the first thing of the schedule that is due after so many events. False when none is."""
        if self._requests and self._requests[0].after <= moment:
            self.submit(self._requests.popleft())
        elif self._faults and self._is_due(self._faults[0], moment):
            self.harm(self._faults.popleft())
        elif self._orders and self._orders[0].after <= moment:
            self.order(self._orders.popleft())
        elif self._cancels and self._cancels[0][0] <= moment:
            self.cancel(self._cancels.pop(0)[1])
        else:
            return False
        self._find_next()
        return True

    def _find_next(self) -> None:
        """After how many events something of the schedule may be due."""
        waiting = [queue[0].after for queue in (self._requests, self._faults, self._orders) if queue]
        waiting += [self._cancels[0][0]] if self._cancels else []
        self._next_at = min(waiting, default=NEVER)

    def checked(self) -> None:
        """Ask the predicates about what has just happened."""
        self._check(self)
        self.heard.clear()
        self.facts.clear()

    def _is_due(self, fault: Fault, moment: int) -> bool:
        if fault.after > moment:
            return False
        return not fault.phase or self.brain.state.group.phase.value == fault.phase or moment > fault.after + MAX_WAIT

    def harm(self, fault: Fault) -> None:
        self.timeline.note(f"fault {fault.kind.value} rank {fault.rank} peer {fault.peer} {fault.seconds:g} s")
        faults.do(self, fault)

    def submit(self, request: Request) -> None:
        request_id = f"q{len(self.clients)}"
        client = self.clients[request_id] = Client(request)
        refusal = self.brain.refusal()
        if self.stopped is not None or refusal is not None:
            client.finish, client.error = "refused", refusal[1] if refusal else "stopped"
            return
        self.feed(ev.Submitted(ev.GenerationRequest(request_id, request.prompt, request.max_tokens, SamplingParams(temperature=0.0))))
        if request.cancel_after:
            self._cancels.append((self.timeline.happened + request.cancel_after, request_id))
            self._cancels.sort()

    def order(self, order: Order) -> None:
        name = f"o{self.timeline.happened}"
        if order.is_drain:
            self.feed(ev.DrainRequested(name, order.target, order.drain))
        else:
            self.feed(ev.ScaleRequested(name, order.target, order.drain))

    def cancel(self, request_id: str) -> None:
        client = self.clients[request_id]
        if not client.finish:
            client.is_cancelled = True
            self.feed(ev.Cancelled(request_id))

    # ---- the brain's loop

    def feed(self, event: ev.Event) -> None:
        self._queue.append(event)
        if self._busy or self.stopped is not None:
            return
        self._busy = True
        rounds = 0
        while self._queue and self.stopped is None:
            rounds += 1
            if rounds > MAX_AT_ONCE:
                raise LivelockError(f"{rounds} events in one moment, the last: {planning.describe(self._queue[0], [])}")
            event = self._queue.popleft()
            before = planning.fingerprint_of_the_dead(self.brain, event)
            commands = self.brain.handle(event, self.timeline.now)
            after = planning.fingerprint(self.brain) if before is not None else None
            is_beat = not commands and before is None and isinstance(event, ev.RankSaid) and isinstance(event.message, Heartbeat)
            self.heard.append(Heard(event, commands, before, after, is_beat))
            if not is_beat and self.timeline.with_notes:
                self.timeline.note((planning.describe, event, commands))
            for command in commands:
                self.execute(command)
            self.checked()
        self._busy = False
        self._set_timer()

    def execute(self, command: ev.Command) -> None:
        match command:
            case ev.Send():
                channel = self.down.get((command.rank, self.brain.state.seats[command.rank].incarnation))
                if channel is not None:
                    channel.send(command.message)
            case ev.Emit():
                self.emit(command.request_id, command.event)
            case ev.Fence():
                self.fence(command.rank, command.incarnation)
            case ev.StartRank() if command.rank in self.hosts:
                self.hosts[command.rank].start(command.rank, command.incarnation)
            case ev.StartRank():
                self.timeline.after(0.01 + 0.02 * self.rng.random(), self.spawn, command.rank, command.incarnation)
            case ev.MakePlan():
                self.plans_due += 1
                answer = planning.answer(self.brain, command, machines.backups(self))
                if self.schedule.plan_s:
                    self.timeline.after(self.schedule.plan_s * (0.5 + self.rng.random()), self.planned, answer)
                else:
                    self.planned(answer)
            case ev.Probe():
                self.timeline.after(LATENCY_S, self.probe, command.rank, command.incarnation)
            case ev.Publish():
                self.heard[-1].has_installed |= command.kind == "installed"
            case ev.Stopped():
                self.stopped = command.error

    def planned(self, answer: ev.Planned) -> None:
        self.plans_due -= 1
        self.feed(answer)

    def emit(self, request_id: str, event: ev.TokenEvent) -> None:
        client = self.clients[request_id]
        self.note_fact("emitted", client, event)
        if event.token is not None:
            client.tokens.append(event.token.token)
        if event.finish:
            client.finish, client.error = event.finish, event.error

    def _set_timer(self) -> None:
        due = self.brain.next_deadline()
        if due is not None and self.stopped is None and (self.timer_at is None or due < self.timer_at):
            self.timer_at = due
            self.timeline.at(due, self._on_timer, due)

    def _on_timer(self, at: float) -> None:
        if self.timer_at != at:
            return
        self.timer_at = None
        due = self.brain.next_deadline()
        if due is not None and due <= self.timeline.now:
            self.feed(ev.TimePassed())
        else:
            self._set_timer()

    # ---- processes

    def spawn(self, rank: int, incarnation: int) -> None:
        if self.brain.expects(rank, incarnation):
            self.begin(rank, incarnation)

    def begin(self, rank: int, incarnation: int) -> None:
        process = Process(self, rank, incarnation, 1.0 + 0.1 * (self.rng.random() - 0.5))
        self.processes[rank, incarnation] = process
        self.by_address[process.address] = process
        self.down[rank, incarnation] = Channel(self.net, CONTROLLER, rank, partial(self.on_word, process))
        process.start()
        if rank in self.doomed:
            self.timeline.after(self.doomed.pop(rank), faults.crash, self, process)

    def feed_failure(self, process: Process, cause: ev.FailureCause) -> None:
        self.feed(ev.RankFailed(process.rank, process.incarnation, cause))

    def open_channel(self, process: Process) -> Channel:
        return Channel(self.net, process.rank, CONTROLLER, partial(self.on_message, process))

    def on_word(self, process: Process, message: Any) -> None:
        """Something that the controller said arrives."""
        if message is EOF or isinstance(message, StartOver):
            process.shut_out()
        else:
            process.guarded(process.hear, message)

    def on_message(self, process: Process, message: Any) -> None:
        """Something a process said arrives; also of one given up, as it may have been on its way."""
        key = (process.rank, process.incarnation)
        if message is EOF:
            self.feed(ev.RankFailed(*key, ev.FailureCause.CHANNEL_CLOSED))
        elif isinstance(message, Hello):
            self.greeted[key] = self.timeline.now
            if process.rank in self.hosts and not self.brain.expects(*key):
                self.down[key].send(StartOver("it was given up before it spoke"))
            self.feed(ev.RankConnected(message))
        else:
            self.feed(ev.RankSaid(*key, message))

    def seen(self, process: Process, cause: ev.FailureCause) -> None:
        """The controller's host, or its agent, tells how a process fares, some moments after it happened."""
        host = self.hosts.get(process.rank)
        if host is not None:
            host.report((process.rank, process.incarnation), cause)
        elif self.schedule.is_local:
            self.timeline.after(0.003 * self.rng.random(), self.feed, ev.RankFailed(process.rank, process.incarnation, cause))

    def ended(self, process: Process) -> None:
        """A process has just ended, one way or another."""
        if process.rank in self.hosts or (process.rank, process.incarnation) in self.harmed:
            self.seen(process, ev.FailureCause.EXITED)

    def end(self, process: Process, silently: bool = False) -> None:
        """What befalls a process with its host."""
        if process.is_alive:
            faults.harm(self, process, "its host" if silently else "its agent")
            process.die(silently)

    def probe(self, rank: int, incarnation: int) -> None:
        process = self.processes.get((rank, incarnation))
        if rank in self.hosts:
            letter = self.hosts[rank].state_of((rank, incarnation))
            cause = {"": ev.FailureCause.HEARTBEAT, "X": ev.FailureCause.EXITED, "T": ev.FailureCause.STOPPED}.get(letter)
            self.feed(ev.RankRuns(rank, incarnation) if cause is None else ev.RankFailed(rank, incarnation, cause))
        elif process is None or not self.schedule.is_local or self.net.wire(CONTROLLER, rank).is_cut:
            self.feed(ev.RankFailed(rank, incarnation, ev.FailureCause.HEARTBEAT))
        elif not process.is_alive:
            self.feed(ev.RankFailed(rank, incarnation, ev.FailureCause.EXITED))
        elif process.is_stopped:
            self.feed(ev.RankFailed(rank, incarnation, ev.FailureCause.STOPPED))
        else:
            self.feed(ev.RankRuns(rank, incarnation))

    def fence(self, rank: int, incarnation: int) -> None:
        """Kill it, or where it can't be reached close its channel: it ends itself once it sees that, if it ever does."""
        channel = self.down.get((rank, incarnation))
        process = self.processes.get((rank, incarnation))
        if rank in self.hosts:
            if channel is not None:
                channel.send(EOF)
                channel.is_closed = True
            if rank not in self.unkillable:
                self.hosts[rank].kill(rank, incarnation)
            self.unkillable.discard(rank)
            self.feed(ev.RankFenced(rank, incarnation))
            return
        reachable = self.schedule.is_local or not self.net.wire(CONTROLLER, rank).is_cut
        if process is not None and (rank in self.unkillable or not reachable):
            self.unkillable.discard(rank)
            if channel is not None:
                channel.is_closed = True
            self.timeline.after(0.2 + 2 * self.rng.random(), process.die)
            return
        if process is not None:
            process.die()
        if channel is not None:
            channel.is_closed = True
        fenced = ev.RankFenced(rank, incarnation)
        if self.rng.random() < 0.5:
            self.feed(fenced)
        else:
            self.timeline.after(0.05 * self.rng.random(), self.feed, fenced)

    # ---- what processes ask of it

    def send_between(self, source: int, target: int, call: Any, *args: Any) -> None:
        """One datagram between two ranks, held while their wire is cut."""
        wire = self.net.wire(source, target)
        if wire.is_cut:
            wire.held.append(lambda: self.send_between(source, target, call, *args))
        else:
            self.timeline.after(self.net.delay(wire), call, *args)

    def deliver_call(self, call: Call) -> None:
        process = self.by_address.get(call.address)
        if process is not None and process.is_alive:
            process.guarded(process.mesh.on_call, call)
        else:
            call.caller.guarded(call.caller.mesh.on_refused, call)

    def note_fact(self, kind: str, *data: Any) -> None:
        self.facts.append((kind, *data))

    def routing_of(self, order: Install) -> Routing:
        return planning.routing_of(order)

    def machine_of(self, rank: int) -> Machine:
        """The host under a rank."""
        host = self.hosts.get(rank)
        return self.machines[HERE] if host is None else host.machine

    def dense_load_s(self) -> float:
        return 0.02 + 0.1 * self.rng.random()

    def read_s(self, process: Process, load: LoadOrder) -> float:
        factor = self.machine_of(process.rank).disk_factor if load.source == "checkpoint" else 1.0
        return self.schedule.read_s * (0.5 + self.rng.random()) * factor

    def compute_s(self) -> float:
        return 0.002 * (0.5 + self.rng.random())
