"""A rank's process as `runtime/rank.py` runs it: one message of the controller at a time, a mesh to its peers, slots, KV, a heartbeat.

A step is one exchange: each rank tells each peer what its slots hold, and is done once it has heard from all of them. That stands for the
dispatches and combines of a forward: some ranks may finish while others miss somebody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from elastic_ep.brain.messages import (
    ControllerMessage,
    DenseLoaded,
    Heartbeat,
    Hello,
    Install,
    Installed,
    InstallFailed,
    LoadedSlot,
    RankFatal,
    RunStep,
    SampledToken,
    Shutdown,
    Stage,
    Staged,
    StageFailed,
    StartOver,
    StepDone,
    StepFailed,
)
from elastic_ep.sim import machines, tokens
from elastic_ep.sim.mesh import EOF, End, Mesh
from elastic_ep.sim.routing import Routing

if TYPE_CHECKING:
    from elastic_ep.sim.world import World

Held = dict[tuple[int, int], tuple[int, int]]
"""(layer, slot) -> (expert, its bytes)"""
BEAT = Heartbeat(0)


class Part(NamedTuple):
    """What one rank tells a peer in a step: the tables that it goes by, and what its slots hold."""

    epoch: int
    step: int
    routing: Routing
    held: Held


@dataclass(eq=False)
class InstallJob:
    order: Install
    loaded: list[LoadedSlot] = field(default_factory=list)
    is_loading: bool = False


@dataclass(eq=False)
class StepJob:
    order: RunStep
    is_computing: bool = False


class Process:
    """One process in a rank's seat.

    Attributes:
        is_stopped: nothing happens in it until it is continued; `frozen` is what waits for that.
        is_wedged: it beats, and does nothing else any more.
    """

    def __init__(self, world: World, rank: int, incarnation: int, speed: float) -> None:
        self.world = world
        self.rank, self.incarnation = rank, incarnation
        self.address = f"r{rank}.{incarnation}"
        self.speed = speed
        """of its clock, beside the controller's"""
        self.slowness = 1.0
        self.is_alive, self.is_stopped, self.is_wedged = True, False, False
        self.stopped_at: float | None = None
        self.frozen: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self.mesh = Mesh(self)
        self.inbox: deque[ControllerMessage] = deque()
        self.job: InstallJob | StepJob | None = None
        self.epoch = 0
        self.routing: Routing | None = None
        self.held: Held = {}
        self.staged: Held = {}
        self.staging: Stage | None = None
        self.is_filling = False
        self.kv: dict[int, list[int]] = {}
        self.parts: dict[int, dict[int, Part]] = {}
        self.counts = self.no_counts()
        """[layer][expert] positions sent there since the last report"""
        self.up = world.open_channel(self)

    # ---- life

    def guarded(self, call: Callable[..., None], *args: Any) -> None:
        """Something reaches this process: taken now, when it is continued, or never."""
        if not self.is_alive:
            return
        if self.is_stopped:
            self.frozen.append((call, args))
        elif not self.is_wedged:
            call(*args)

    def later(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        """By its own clock and pace."""
        self.world.timeline.after(seconds * self.slowness / self.speed, self.guarded, call, *args)

    def timer(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        """By its own clock."""
        self.world.timeline.after(seconds / self.speed, self.guarded, call, *args)

    def start(self) -> None:
        """The process runs: it dials the controller, beats, and reads its dense weights."""
        self.say(Hello(self.rank, self.incarnation, 1000 + self.rank, "host", "token", self.address))
        self.beat()
        self.later(self.world.dense_load_s() * self.world.machine_of(self.rank).disk_factor, self.load_dense)

    def load_dense(self) -> None:
        if self.world.machine_of(self.rank).disk_fails:
            self.say(RankFatal("cannot read the checkpoint"))
            self.die()
        else:
            self.say(DenseLoaded(0, 1.0))

    def beat(self) -> None:
        if self.is_alive:
            if not self.is_stopped:
                self.say(BEAT)
            self.world.timeline.after(self.world.heartbeat_s / self.speed, self.beat)

    def say(self, message: Any) -> None:
        self.up.send(message)

    def die(self, silently: bool = False) -> None:
        """The process ends, and its channels are closed; silently: the power of its host failed, and nobody is told."""
        if self.is_alive:
            self.is_alive = False
            if not silently:
                self.mesh.close()
                self.up.send(EOF)
            self.mesh.abandon()
            self.up.is_closed = True
            self.world.ended(self)

    def close(self) -> None:
        """See `World.close`."""
        for end in self.mesh.ends.values():
            vars(end).clear()
        vars(self.mesh).clear()
        vars(self).clear()

    def shut_out(self) -> None:
        """Its control channel is closed, or it is told to start over: the thread that beats ends the process, whatever that is in."""
        if self.is_stopped:
            self.frozen.append((self.die, ()))
        else:
            self.die()

    def stop(self) -> None:
        if self.is_alive and not self.is_stopped:
            self.is_stopped, self.stopped_at = True, self.world.timeline.now

    def go_on(self) -> None:
        self.is_stopped, self.stopped_at = False, None
        while self.frozen and self.is_alive and not self.is_stopped:
            call, args = self.frozen.popleft()
            if call == self.die:
                self.die()  # by its heartbeat thread, whatever hangs
            else:
                self.guarded(call, *args)

    # ---- the loop

    def hear(self, message: ControllerMessage) -> None:
        self.inbox.append(message)
        self.pump()

    def pump(self) -> None:
        """Obey what waits. A message that comes in the middle of a job interrupts it where the job looks for that."""
        while self.inbox and self.is_alive:
            job = self.job
            if isinstance(job, InstallJob):
                if job.is_loading:
                    return
                self.after_connect(job)
                if self.job is job:
                    return
            elif job is not None:
                if job.is_computing:
                    return
                self.void(job)
            else:
                self.obey(self.inbox.popleft())

    def obey(self, message: ControllerMessage) -> None:
        match message:
            case Install():
                self.install(message)
            case RunStep():
                self.run_step(message)
            case Stage():
                self.staging, self.staged = message, {}
                self.stage_next(message, 0)
            case Shutdown() | StartOver():
                self.die()

    def end_job(self, answer: Any) -> None:
        self.job = None
        if answer is not None:
            self.say(answer)
        self.pump()

    # ---- install

    def install(self, order: Install) -> None:
        self.epoch = order.epoch
        self.staging = None
        job = self.job = InstallJob(order)
        self.parts = {}
        self.timer(order.deadline_s, self.connect_deadline, job)
        self.mesh.connect(order.peers)
        self.on_connected()

    def on_connected(self) -> None:
        job = self.job
        if isinstance(job, InstallJob) and not job.is_loading and not self.mesh.missing():
            self.after_connect(job)

    def connect_deadline(self, job: InstallJob) -> None:
        if self.job is job and not job.is_loading:
            missing = dict.fromkeys(self.mesh.missing(), "deadline")
            self.mesh.stop_connecting()
            self.end_job(InstallFailed(job.order.epoch, (), missing, ""))

    def after_connect(self, job: InstallJob) -> None:
        self.mesh.stop_connecting()
        job.is_loading = True
        self.load_next(job, 0)

    def load_next(self, job: InstallJob, index: int) -> None:
        """One load after the other; between two of them a newer message ends the install."""
        order = job.order
        if index == len(order.loads):
            self.installed(job)
        elif self.inbox:
            self.end_job(InstallFailed(order.epoch, tuple(job.loaded), {}, ""))
        else:
            load = order.loads[index]
            key = (load.layer, load.slot)
            has = self.held.get(key, (None,))[0] == load.expert or self.staged.get(key, (None,))[0] == load.expert
            seconds = 0.0 if has else self.world.read_s(self, load)
            self.later(seconds, self.load_done, job, index)

    def load_done(self, job: InstallJob, index: int) -> None:
        load = job.order.loads[index]
        key = (load.layer, load.slot)
        found = self.held.get(key)
        if found is None or found[0] != load.expert:
            staged = self.staged.pop(key, None)
            content = staged[1] if staged is not None and staged[0] == load.expert else machines.read(self.world, self, load)
            if content is None:
                self.end_job(InstallFailed(job.order.epoch, tuple(job.loaded), {}, f"expert {load.expert}: no source has its bytes"))
                return
            found = (load.expert, content)
            self.held = {**self.held, key: found}
        job.loaded.append(LoadedSlot(load.layer, load.slot, load.expert, found[1]))
        self.load_next(job, index + 1)

    def installed(self, job: InstallJob) -> None:
        order = job.order
        self.routing = self.world.routing_of(order)
        self.world.note_fact("installed", self, order, self.epoch)
        num_bytes = self.world.bytes_per_expert * len(job.loaded)
        self.end_job(Installed(order.epoch, tuple(job.loaded), {"checkpoint": num_bytes}, 0.1))
        if self.world.schedule.has_backup and not self.is_filling:
            self.is_filling = True
            self.later(machines.FILL_S, self.upkeep)

    def upkeep(self) -> None:
        """In the background: fill the host's copy, until nothing is missing."""
        self.is_filling = machines.fill(self.world, self)
        if self.is_filling:
            self.later(machines.FILL_S, self.upkeep)

    def stage_next(self, stage: Stage, index: int) -> None:
        if self.staging is not stage:
            return
        if index < len(stage.loads):
            self.later(self.world.read_s(self, stage.loads[index]), self.stage_done, stage, index)
        else:
            self.say(Staged(stage.change, {"checkpoint": self.world.bytes_per_expert * len(stage.loads)}))

    def stage_done(self, stage: Stage, index: int) -> None:
        if self.staging is not stage:
            return
        load = stage.loads[index]
        content = machines.read(self.world, self, load)
        if content is None:
            self.say(StageFailed(stage.change, f"expert {load.expert}: no source has its bytes"))
            return
        self.staged[load.layer, load.slot] = (load.expert, content)
        self.stage_next(stage, index + 1)

    # ---- step

    def run_step(self, order: RunStep) -> None:
        if order.epoch != self.epoch or self.routing is None or self.routing.epoch != order.epoch:
            return
        for seq_id in order.release:
            self.kv.pop(seq_id, None)
        job = self.job = StepJob(order)
        self.world.note_fact("serves", self, order)
        part = Part(order.epoch, order.step, self.routing, self.held)
        self.timer(self.world.exchange_timeout_s, self.step_deadline, job)
        for peer in self.routing.ranks:
            if peer != self.rank:
                end = self.mesh.ends.get(peer)
                if end is None:
                    self.fail_step(job, {peer: "closed"})
                    return
                end.channel.send(part)
        self.check_exchange(job)

    def on_peer(self, end: End, item: Any) -> None:
        """A peer's part, or the end of its channel."""
        if item is EOF:
            self.mesh.drop(end)
            job = self.job
            if isinstance(job, StepJob) and not job.is_computing and end.peer not in self.parts.get(job.order.step, {}):
                self.fail_step(job, {end.peer: "closed"})
        elif self.mesh.ends.get(end.peer) is end and item.epoch >= self.epoch:
            self.parts.setdefault(item.step, {})[end.peer] = item
            if isinstance(self.job, StepJob) and self.job.order.step == item.step:
                self.check_exchange(self.job)

    def check_exchange(self, job: StepJob) -> None:
        assert self.routing is not None
        parts = self.parts.get(job.order.step, {})
        if not job.is_computing and len(parts) == len(self.routing.ranks) - 1:
            job.is_computing = True
            self.later(self.world.compute_s(), self.finish_step, job)

    def step_deadline(self, job: StepJob) -> None:
        if self.job is job and not job.is_computing:
            assert self.routing is not None
            parts = self.parts.get(job.order.step, {})
            self.fail_step(job, {peer: "deadline" for peer in self.routing.ranks if peer != self.rank and peer not in parts})

    def fail_step(self, job: StepJob, peers: dict[int, str]) -> None:
        order = job.order
        self.void(job)
        self.say(StepFailed(order.epoch, order.step, peers))
        self.pump()

    def void(self, job: StepJob) -> None:
        """Nothing of it counts; what it was writing is spoilt."""
        self.job = None
        self.parts.pop(job.order.step, None)
        for work in job.order.work:
            kv = self.kv.setdefault(work.seq_id, [])
            kv[work.start :] = [tokens.JUNK] * len(work.tokens)

    def finish_step(self, job: StepJob) -> None:
        if self.job is not job:
            return
        order = job.order
        assert self.routing is not None
        parts = self.parts.pop(order.step, {})
        parts[self.rank] = Part(order.epoch, order.step, self.routing, self.held)
        self.world.note_fact("finished", self, order, parts)
        found: list[SampledToken] = []
        for work in order.work:
            kv = self.kv.setdefault(work.seq_id, [])
            if work.start > len(kv):
                self.world.note_fact("hole", self, work)
                kv += [tokens.JUNK] * (work.start - len(kv))
            state = kv[work.start - 1] if work.start else 0
            del kv[work.start :]
            for token in work.tokens:
                state = self.forward(tokens.advance(state, token), parts)
                kv.append(state)
            if work.sample is not None:
                found.append(SampledToken(work.seq_id, tokens.sample(state)))
        counts = None
        if self.world.settings.rebalance_interval_s:
            counts, self.counts = np.array(self.counts, "<u4").tobytes(), self.no_counts()
        self.end_job(StepDone(order.epoch, order.step, tuple(found), 1.0, counts))

    def no_counts(self) -> list[list[int]]:
        return [[0] * self.world.settings.plan.num_experts for _ in range(self.world.settings.num_layers)]

    def forward(self, state: int, parts: dict[int, Part]) -> int:
        """Send one position through the experts of all layers. Right bytes leave the state as it is."""
        routing = self.routing
        assert routing is not None
        wrong = 0
        for layer in range(routing.num_layers):
            expert = tokens.chosen_expert(state, layer, routing.num_experts)
            self.counts[layer][expert] += 1
            place = routing.place(layer, expert, state)
            if place is None:
                self.world.note_fact("unrouted", self, layer, expert)
                wrong ^= 1 + layer
            elif place.slot >= 0:
                held = parts[place.rank].held.get((layer, place.slot))
                wrong ^= tokens.expert_bytes(layer, expert) ^ (held[1] if held is not None else 1)
        return state ^ wrong
