"""What one run is made of: a group, its requests and its faults, all drawn from one seed. Frozen, and short enough to print."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass

from elastic_ep.brain.events import Drain
from elastic_ep.brain.planner import PlanSettings
from elastic_ep.brain.scheduler import SchedulerLimits
from elastic_ep.brain.settings import BrainSettings
from elastic_ep.core.recovery import Phase
from elastic_ep.core.topology import Topology


class FaultKind(enum.Enum):
    """What can go wrong. Those that end by themselves do so after `Fault.seconds`."""

    CRASH = "crash"
    STOP = "stop"
    """stopped, and continued later (0 s: never)"""
    WEDGE = "wedge"
    SLOW_RANK = "slow_rank"
    SLOW_LINK = "slow_link"
    PARTITION = "partition"
    """one wire is cut, and healed later; peer -1 is the controller"""
    ISOLATE = "isolate"
    """all of a rank's wires are cut, and healed later"""
    DELAY = "delay"
    """the next message of a rank to the controller, and of the controller to it, comes late"""
    FLIP_READ = "flip_read"
    """one bit of the next expert that it reads is wrong"""
    JOINER_DIES = "joiner_dies"
    """the next process of this seat dies some time after its start"""
    UNKILLABLE = "unkillable"
    """the controller can't reach its process any more, and fails it: it goes on as long as it likes"""
    FLIP_SLOT = "flip_slot"
    """one bit of a slot changes after it was verified. Nothing re-reads slots, so this is outside the promises, and never drawn"""


DRAWN = {
    FaultKind.CRASH: 6,
    FaultKind.STOP: 3,
    FaultKind.WEDGE: 2,
    FaultKind.SLOW_RANK: 1,
    FaultKind.SLOW_LINK: 1,
    FaultKind.PARTITION: 2,
    FaultKind.ISOLATE: 2,
    FaultKind.DELAY: 2,
    FaultKind.FLIP_READ: 1,
    FaultKind.JOINER_DIES: 1,
    FaultKind.UNKILLABLE: 2,
}


MAX_WAIT = 200
PHASES = tuple(phase.value for phase in (Phase.FENCING, Phase.PLANNING, Phase.INSTALLING, Phase.INSTALLING, Phase.RESUMING))


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens after so many events of the run, and then, if `phase` names one, when the group is next in that phase (or after
    `MAX_WAIT` events more). `rank` is taken modulo the ranks there are."""

    after: int
    kind: FaultKind
    rank: int
    peer: int = -1
    seconds: float = 0.0
    phase: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """One client's request, sent after so many events; given up after `cancel_after` more if that is not 0."""

    after: int
    prompt: tuple[int, ...]
    max_tokens: int
    cancel_after: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """What an operator asks for after so many events: another number of ranks, or, with `is_drain`, that rank `target` leaves."""

    after: int
    is_drain: bool
    target: int
    drain: Drain


@dataclass(frozen=True, slots=True)
class Schedule:
    """One run.

    Attributes:
        slots_per_rank: of one layer.
        stream: what to do with too few slots: stream the rest, or refuse.
        is_local: whether the controller sees the processes (else it knows silence and closed channels only).
        loss: part of the messages that comes 200 ms late.
        plan_s: what solving a placement takes.
        read_s: what reading one expert takes.
        rebalance_s: how often placements are made anew for the recorded load; 0 never.
        staging_slots: experts that a rank may hold beside its live slots in a change; few make a change take several rounds.
    """

    seed: int
    ep_size: int
    slots_per_rank: int
    num_layers: int
    num_experts: int
    stream: bool
    restart: bool
    is_local: bool
    loss: float
    plan_s: float
    staging_slots: int
    read_s: float
    rebalance_s: float
    requests: tuple[Request, ...]
    orders: tuple[Order, ...]
    faults: tuple[Fault, ...]

    def settings(self) -> BrainSettings:
        """As a server would have them, with shorter patience."""
        return BrainSettings(
            Topology((self.slots_per_rank,) * self.ep_size),
            self.num_layers,
            1000,
            PlanSettings(self.num_experts, self.stream, staging_slots=self.staging_slots),
            SchedulerLimits(kv_tokens=64, max_sequences=4, max_batch_tokens=12, prefill_chunk=4),
            heartbeat_timeout_s=0.9,
            step_timeout_s=1.0,
            boot_timeout_s=3.0,
            install_timeout_s=1.0,
            load_bytes_per_s=20e3,
            fence_timeout_s=0.5,
            restart=self.restart,
            restart_backoff_s=0.1,
            restart_backoff_max_s=0.8,
            restart_reset_s=1.0,
            rebalance_interval_s=self.rebalance_s,
            rebalance_min_gain=0.0,
        )


def draw(seed: int, ep_size: int = 0, shape: tuple[int, int] | None = None) -> Schedule:
    """The schedule of a seed. ep_size 0 draws 2 to 4 ranks; shape (layers, experts) None draws a small one."""
    rng = random.Random(seed)
    ranks = ep_size or rng.choice((2, 3, 3, 4))
    layers, experts = shape or (rng.choice((1, 1, 2)), rng.choice((3, 4, 6)))
    short = rng.random() < 0.15
    least = max(1, -(-experts // ranks) - 1) if short else -(-experts // ranks)
    slots = min(experts, least + rng.choice((0, 0, 1, 2)))
    requests = tuple(
        Request(
            rng.choice((0, rng.randrange(300))),
            tuple(rng.randrange(100) for _ in range(rng.randint(1, 6))),
            rng.randint(1, 12),
            rng.randrange(1, 150) if rng.random() < 0.1 else 0,
        )
        for _ in range(rng.randint(2, 4))
    )
    return Schedule(
        seed,
        ranks,
        slots,
        layers,
        experts,
        stream=rng.random() < 0.8,
        restart=rng.random() < 0.7,
        is_local=rng.random() < 0.7,
        loss=rng.choice((0.0, 0.0, 0.002)),
        plan_s=rng.choice((0.0, 0.0, 0.003)),
        staging_slots=rng.choice((1, 2, 1024)),
        read_s=rng.choice((0.001, 0.006)),
        rebalance_s=0.3 if rng.random() < 0.1 else 0.0,
        requests=requests,
        orders=draw_orders(rng, ranks, experts),
        faults=draw_faults(rng, ranks),
    )


def draw_orders(rng: random.Random, ranks: int, experts: int) -> tuple[Order, ...]:
    """None mostly; else one or two."""
    if rng.random() < 0.65:
        return ()
    orders = []
    for _ in range(rng.choice((1, 1, 2))):
        is_drain = rng.random() < 0.4
        target = rng.randrange(ranks) if is_drain else rng.randint(1, min(ranks + 2, experts))
        orders.append(Order(rng.randrange(20, 250), is_drain, target, rng.choice(("move", "finish"))))
    return tuple(orders)


def draw_faults(rng: random.Random, ranks: int) -> tuple[Fault, ...]:
    """One to five faults. Of those after the first half meet the recovery from the one before: in a phase of it, or a few events later."""
    faults: list[Fault] = []
    after = rng.randrange(0, 100)
    kinds, weights = list(DRAWN), list(DRAWN.values())
    for _ in range(rng.choice((1, 2, 2, 3, 3, 5))):
        kind = rng.choices(kinds, weights)[0]
        rank = rng.randrange(ranks)
        peer = rng.choice([other for other in range(-1, ranks) if other != rank])
        seconds = rng.choice((0.0, 0.02, 0.3, 1.5)) if kind is FaultKind.STOP else rng.choice((0.01, 0.1, 0.6, 2.0))
        how = rng.random() if faults else 1.0
        phase = rng.choice(PHASES) if how < 0.45 else ""
        after += rng.randrange(0, 12) if how < 0.6 else rng.randrange(10, 120)
        faults.append(Fault(after, kind, rank, peer, seconds, phase))
    return tuple(faults)
