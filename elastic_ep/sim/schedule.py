"""What one run is made of: a group, its requests and its faults, all drawn from one seed. Frozen, and short enough to print."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass
from functools import cache

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
    NODE_DOWN = "node_down"
    """all ranks of a node at once: on another host its power fails and returns later, here their processes end"""
    CUT_HOST = "cut_host"
    """nothing comes or goes between another host and all others, and is healed later"""
    AGENT_DIES = "agent_dies"
    """the agent of another host ends, its ranks with it; another one is started later"""
    DISK_SLOW = "disk_slow"
    """a host reads its checkpoint 40 times more slowly for some time"""
    DISK_FAILS = "disk_fails"
    """no read of the checkpoint works on a host for some time"""
    FLIP_BACKUP = "flip_backup"
    """one bit of a host's copy of the experts changes"""
    FLIP_SLOT = "flip_slot"
    """one bit of a slot changes after it was verified. Until slots are looked at next that is outside the promises, so it is never drawn"""


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
    FaultKind.DISK_SLOW: 2,
    FaultKind.DISK_FAILS: 2,
}
WITH_NODES = {FaultKind.NODE_DOWN: 5}
WITH_OTHER_HOSTS = {FaultKind.CUT_HOST: 5, FaultKind.AGENT_DIES: 2}
WITH_BACKUP = {FaultKind.FLIP_BACKUP: 1}


SECONDS = {FaultKind.STOP: (0.0, 0.02, 0.3, 1.5), FaultKind.CUT_HOST: (0.3, 1.2, 2.8, 5.0), FaultKind.NODE_DOWN: (0.3, 2.0, 5.0)}
"""how long it lasts, where that is not the usual"""
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
        nodes: label of each rank's node; () names none. `remote` are those that are other hosts, with agents; all else is on the
            controller's.
        spread: the level on which replicas are kept apart.
        has_backup: each host keeps a copy of all experts in its memory, filled in the background.
        late_s: how long after the start the agents of other hosts come.
        restart_limit: see `BrainSettings`.
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
    nodes: tuple[str, ...] = ()
    remote: tuple[str, ...] = ()
    spread: str = "rank"
    has_backup: bool = False
    late_s: float = 0.01
    restart_limit: int = 5

    def settings(self) -> BrainSettings:
        """As a server would have them, with shorter patience."""
        return BrainSettings(
            topology_of(self.slots_per_rank, self.ep_size, self.nodes),
            self.num_layers,
            1000,
            PlanSettings(self.num_experts, self.stream, self.spread, staging_slots=self.staging_slots),
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
            restart_limit=self.restart_limit,
            rebalance_interval_s=self.rebalance_s,
            rebalance_min_gain=0.0,
        )


@cache
def topology_of(slots_per_rank: int, ep_size: int, nodes: tuple[str, ...]) -> Topology:
    """One object for all schedules of a shape: what is derived from it is computed once."""
    return Topology((slots_per_rank,) * ep_size, {"node": nodes} if nodes else {})


def draw(seed: int, ep_size: int = 0, shape: tuple[int, int] | None = None) -> Schedule:
    """The schedule of a seed. ep_size 0 draws 2 to 4 ranks; shape (layers, experts) None draws a small one."""
    rng = random.Random(seed)
    has_nodes = rng.random() < 0.5
    ranks = ep_size or rng.choice((2, 3, 4, 4) if has_nodes else (2, 3, 3, 4))
    nodes, remote = draw_nodes(rng, ranks) if has_nodes else ((), ())
    has_backup = rng.random() < 0.3
    kinds = DRAWN | (WITH_NODES if nodes else {}) | (WITH_OTHER_HOSTS if remote else {}) | (WITH_BACKUP if has_backup else {})
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
        faults=draw_faults(rng, ranks, kinds),
        nodes=nodes,
        remote=remote,
        spread="node" if nodes and rng.random() < 0.6 else "rank",
        has_backup=has_backup,
        late_s=rng.choice((0.01, 0.01, 0.01, 0.3, 1.6)) if remote else 0.01,
        restart_limit=rng.choice((1, 2, 5, 5)),
    )


def draw_nodes(rng: random.Random, ranks: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(label of each rank's node, those that are other hosts): two or three nodes, each with ranks that follow each other."""
    count = min(ranks, rng.choice((2, 2, 3)))
    cuts = sorted(rng.sample(range(1, ranks), count - 1))
    nodes = tuple("abc"[sum(rank >= cut for cut in cuts)] for rank in range(ranks))
    return nodes, tuple("abc"[1:count]) if rng.random() < 0.7 else ()


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


def draw_faults(rng: random.Random, ranks: int, drawn: dict[FaultKind, int]) -> tuple[Fault, ...]:
    """One to five faults. Of those after the first half meet the recovery from the one before: in a phase of it, or a few events later."""
    faults: list[Fault] = []
    after = rng.randrange(0, 100)
    kinds, weights = list(drawn), list(drawn.values())
    for _ in range(rng.choice((1, 2, 2, 3, 3, 5))):
        kind = rng.choices(kinds, weights)[0]
        rank = rng.randrange(ranks)
        peer = rng.choice([other for other in range(-1, ranks) if other != rank])
        seconds = rng.choice(SECONDS.get(kind, (0.01, 0.1, 0.6, 2.0)))
        how = rng.random() if faults else 1.0
        phase = rng.choice(PHASES) if how < 0.45 else ""
        after += rng.randrange(0, 12) if how < 0.6 else rng.randrange(10, 120)
        faults.append(Fault(after, kind, rank, peer, seconds, phase))
    return tuple(faults)
