"""A brain with ranks made of a few lines: they answer at once, or not at all when a test says so. Time moves only when a test moves it."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict, deque
from functools import partial

import numpy as np

from elastic_ep.brain import events as ev
from elastic_ep.brain import planner
from elastic_ep.brain.brain import Brain
from elastic_ep.brain.messages import (
    DenseLoaded,
    Heartbeat,
    Hello,
    Install,
    Installed,
    InstallFailed,
    LoadedSlot,
    RunStep,
    SampledToken,
    SamplingParams,
    Stage,
    Staged,
    StepDone,
)
from elastic_ep.brain.planner import PlanSettings
from elastic_ep.brain.scheduler import SchedulerLimits
from elastic_ep.brain.settings import BrainSettings
from elastic_ep.core.errors import InsufficientSlotsError
from elastic_ep.core.topology import Topology


def next_token(prefix: list[int]) -> int:
    """The token a fault-free run gives after `prefix`."""
    return int.from_bytes(hashlib.blake2b(repr(prefix).encode(), digest_size=2).digest(), "little")


class World:
    """Ranks that keep KV as lists of tokens and compute `next_token`. Whoever is in `mute` says nothing; whoever is `wedged` only beats."""

    def __init__(self, ep_size=4, num_experts=8, slots_per_rank=3, num_layers=2, stream=True, staging_slots=1024, **settings):
        limits = settings.pop("limits", SchedulerLimits(kv_tokens=1000, max_sequences=8, max_batch_tokens=16, prefill_chunk=4))
        self.settings = BrainSettings(
            Topology((slots_per_rank,) * ep_size),
            num_layers,
            1000,
            PlanSettings(num_experts, stream, staging_slots=staging_slots),
            limits,
            **settings,
        )
        self.now = 0.0
        self.brain = Brain(self.settings, self.now)
        self.mute: set[int] = set()
        self.wedged: set[int] = set()
        self.unfenceable: set[int] = set()
        self.unstartable: set[int] = set()
        self.incarnation: dict[int, int] = defaultdict(int)
        self.kv: dict[int, dict[int, list[int]]] = defaultdict(dict)
        self.received: dict[int, list[int]] = defaultdict(list)
        self.finished: dict[str, str] = {}
        self.commands: list[ev.Command] = []
        self.inbox: deque[tuple[int, object]] = deque()
        self.outbox: deque[tuple[int, int, object]] = deque()
        self.rng: random.Random | None = None
        self.slots: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
        self.placement_of: dict[int, dict[tuple[int, int], int]] = {}
        self.epoch_of: dict[int, int] = {}
        self.plans: list[ev.GroupPlan] = []

    def feed(self, event: ev.Event) -> None:
        queue = deque([event])
        while queue:
            for command in self.brain.handle(queue.popleft(), self.now):
                self.commands.append(command)
                match command:
                    case ev.Send():
                        if command.rank not in self.mute | self.wedged:
                            self.inbox.append((command.rank, command.message))
                    case ev.Fence():
                        self.mute.add(command.rank)
                        self.inbox = deque(item for item in self.inbox if item[0] != command.rank)
                        self.outbox = deque(item for item in self.outbox if item[0] != command.rank)
                        if command.rank not in self.unfenceable:
                            queue.append(ev.RankFenced(command.rank, command.incarnation))
                    case ev.StartRank():
                        self.restarted(command.rank, command.incarnation)
                    case ev.MakePlan():
                        queue.append(self.make_plan(command))
                    case ev.Emit():
                        event = command.event
                        if event.token is not None:
                            assert event.index == len(self.received[command.request_id]), "a token was lost or came twice"
                            self.received[command.request_id].append(event.token.token)
                        if event.finish:
                            self.finished[command.request_id] = event.finish

    def make_plan(self, command: ev.MakePlan) -> ev.Planned:
        try:
            state = self.brain.state
            solve = planner.plan if command.change is None else partial(planner.plan_change, leaving=command.leaving)
            plans = solve(self.settings.plan, state.topology, command.active, state.contents.experts, state.load.recent())
        except InsufficientSlotsError as error:
            return ev.Planned(command.epoch, None, str(error), command.change)
        plan, *then = plans if isinstance(plans, tuple) else (plans,)
        self.plans += [plan, *then]
        return ev.Planned(command.epoch, plan, change=command.change, then=tuple(then))

    def restarted(self, rank: int, incarnation: int) -> None:
        """A new process sits down: it has nothing, and says so when its turn comes."""
        self.incarnation[rank] = incarnation
        self.mute.discard(rank)
        self.kv[rank], self.slots[rank] = {}, {}
        self.epoch_of.pop(rank, None)
        if rank not in self.unstartable:
            self.inbox.append((rank, "hello"))

    def say(self, rank: int, message: object) -> None:
        self.feed(ev.RankSaid(rank, self.incarnation[rank], message))

    def boot(self) -> World:
        for rank in range(self.settings.topology.ep_size):
            self.feed(ev.RankConnected(Hello(rank, 0, 100 + rank, "h", "t", f"unix:/{rank}")))
            self.say(rank, DenseLoaded(0, 1.0))
        self.settle()
        return self

    def answer(self) -> bool:
        """One rank reads one message, or one of its answers arrives. False when nothing is under way.

        With `rng`, who is next is drawn, and answers take their time: only the order within each channel is kept.
        """
        turns = [("read", rank) for rank in {rank for rank, _ in self.inbox}]
        turns += [("arrive", rank) for rank in {rank for rank, _, _ in self.outbox}]
        if not turns:
            return False
        if self.rng is not None:
            what, rank = self.rng.choice(sorted(turns))
        else:
            what, rank = ("arrive", self.outbox[0][0]) if self.outbox else ("read", self.inbox[0][0])
        if what == "arrive":
            item = next(item for item in self.outbox if item[0] == rank)
            self.outbox.remove(item)
            self.feed(ev.RankSaid(*item))
        else:
            item = next(item for item in self.inbox if item[0] == rank)
            self.inbox.remove(item)
            if rank not in self.mute:
                self.read(rank, item[1])
        return True

    def reply(self, rank: int, message: object) -> None:
        self.outbox.append((rank, self.incarnation[rank], message))

    def read(self, rank: int, message: object) -> None:
        match message:
            case "hello":
                self.feed(ev.RankConnected(Hello(rank, self.incarnation[rank], 100 + rank, "h", "t", f"unix:/{rank}.new")))
                self.reply(rank, DenseLoaded(0, 1.0))
            case Stage():
                self.reply(rank, Staged(message.change, {"checkpoint": 1000 * len(message.loads)}))
            case Install():
                self.install(rank, message)
            case RunStep():
                if self.epoch_of.get(rank) != message.epoch:
                    return  # it never got that far: a newer Install interrupted it
                for seq_id in message.release:
                    self.kv[rank].pop(seq_id, None)  # a release may come twice, or for what never arrived
                placement = self.placement_of[rank]
                for (layer, slot), expert in placement.items():
                    assert self.slots[rank].get((layer, slot)) == expert, "a rank would run another expert's weights"
                self.reply(rank, StepDone(message.epoch, message.step, tuple(self.compute(rank, message)), 1.0))

    def install(self, rank: int, message: Install) -> None:
        loaded: list[LoadedSlot] = []
        for order in message.loads:
            if self.rng is not None and any(r == rank for r, _ in self.inbox) and self.rng.random() < 0.5:
                self.reply(rank, InstallFailed(message.epoch, tuple(loaded), {}, ""))  # interrupted by a newer epoch
                return
            self.slots[rank][order.layer, order.slot] = order.expert
            loaded.append(LoadedSlot(order.layer, order.slot, order.expert, 7))
        shape = (message.num_layers, -1)
        wanted = np.frombuffer(message.physical_to_logical_map, "<i4").reshape(shape)
        mine = self.brain.state.topology.slots_of(rank)
        self.placement_of[rank] = {
            (layer, slot): int(wanted[layer, slot]) for layer in range(len(wanted)) for slot in mine if wanted[layer, slot] >= 0
        }
        self.epoch_of[rank] = message.epoch
        self.reply(rank, Installed(message.epoch, tuple(loaded), {"checkpoint": 1000 * len(loaded)}, 0.1))

    def compute(self, rank: int, message: RunStep) -> list[SampledToken]:
        out = []
        for work in message.work:
            kv = self.kv[rank].setdefault(work.seq_id, [])
            assert work.start <= len(kv), "a hole in the KV"
            kv[work.start :] = work.tokens
            if work.sample is not None:
                out.append(SampledToken(work.seq_id, next_token(kv)))
        return out

    def settle(self, limit: int = 100_000) -> None:
        for _ in range(limit):
            if not self.answer():
                return
        raise AssertionError("the world does not settle")

    def settle_until(self, done) -> None:
        while not done():
            assert self.answer(), "settled before the condition held"

    def pass_time(self, seconds: float, beat: bool = True) -> None:
        """Let time pass in the brain's own deadlines; living ranks beat."""
        end = self.now + seconds
        while True:
            due = self.brain.next_deadline()
            self.now = min(end, max(self.now, due)) if due is not None else end
            if beat:
                for seat in self.brain.state.seats:
                    if seat.is_alive and seat.rank not in self.mute:
                        self.say(seat.rank, Heartbeat(0))
            due = self.brain.next_deadline()
            if due is not None and due <= self.now:
                self.feed(ev.TimePassed())
            if self.now >= end:
                return

    def submit(self, request_id: str, prompt: list[int], max_tokens: int, eos: frozenset[int] = frozenset()) -> None:
        self.feed(ev.Submitted(ev.GenerationRequest(request_id, tuple(prompt), max_tokens, SamplingParams(temperature=0.0), eos)))

    def kill(self, rank: int, cause: ev.FailureCause = ev.FailureCause.EXITED) -> None:
        self.mute.add(rank)
        self.feed(ev.RankFailed(rank, self.incarnation[rank], cause))


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]
