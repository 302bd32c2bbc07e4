"""How each kind of fault is done to a world."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic_ep.brain.events import FailureCause
from elastic_ep.sim.network import CONTROLLER
from elastic_ep.sim.process import Process
from elastic_ep.sim.schedule import Fault, FaultKind

if TYPE_CHECKING:
    from elastic_ep.sim.world import World


def do(world: World, fault: Fault) -> None:
    """Nothing happens to a seat without a living process, except that what comes next there may be doomed."""
    rank = fault.rank % len(world.brain.state.seats)
    process = world.processes.get((rank, world.brain.state.seats[rank].incarnation))
    after = world.timeline.after
    match fault.kind:
        case FaultKind.JOINER_DIES:
            world.doomed[rank] = fault.seconds * 0.1
        case FaultKind.FLIP_READ:
            world.flips[rank] = world.flips.get(rank, 0) + 1
        case FaultKind.PARTITION:
            cut(world, rank, fault.peer, fault.seconds)
        case FaultKind.ISOLATE:
            for other in (CONTROLLER, *range(len(world.brain.state.seats))):
                if other != rank:
                    cut(world, rank, other, fault.seconds)
        case FaultKind.SLOW_LINK:
            wire = world.net.wire(rank, fault.peer)
            wire.factor = 100.0
            after(fault.seconds, setattr, wire, "factor", 1.0)
        case FaultKind.NODE_DOWN:
            node_down(world, rank, fault.seconds)
        case FaultKind.CUT_HOST | FaultKind.AGENT_DIES:
            host = world.hosts.get(rank) or next(iter(world.hosts.values()), None)
            if host is not None:
                (host.cut if fault.kind is FaultKind.CUT_HOST else host.agent_dies)(fault.seconds)
        case FaultKind.DISK_SLOW:
            machine = world.machine_of(rank)
            machine.disk_factor = 40.0
            after(fault.seconds, setattr, machine, "disk_factor", 1.0)
        case FaultKind.DISK_FAILS:
            machine = world.machine_of(rank)
            machine.disk_fails = True
            after(fault.seconds, setattr, machine, "disk_fails", False)
        case FaultKind.FLIP_BACKUP:
            world.machine_of(rank).flip_backup()
        case _ if process is None or not process.is_alive:
            return
        case FaultKind.CRASH:
            crash(world, process)
        case FaultKind.STOP:
            harm(world, process, "stop")
            process.stop()
            world.seen(process, FailureCause.STOPPED)
            if fault.seconds:
                after(fault.seconds, go_on, world, process)
        case FaultKind.WEDGE:
            process.is_wedged = True
        case FaultKind.SLOW_RANK:
            process.slowness = 20.0
            after(fault.seconds, setattr, process, "slowness", 1.0)
        case FaultKind.DELAY:
            process.up.extra_s = fault.seconds
            world.down[rank, process.incarnation].extra_s = fault.seconds
        case FaultKind.UNKILLABLE:
            world.unkillable.add(rank)
            world.feed_failure(process, FailureCause.HEARTBEAT)
        case FaultKind.FLIP_SLOT:
            flip_slot(process)


def harm(world: World, process: Process, how: str) -> None:
    """From now on the controller has to notice within a bounded time."""
    world.harmed.setdefault((process.rank, process.incarnation), (world.timeline.now, how))


def crash(world: World, process: Process) -> None:
    if process.is_alive:
        harm(world, process, "crash")
        process.die()


def node_down(world: World, rank: int, seconds: float) -> None:
    host = world.hosts.get(rank)
    if host is not None:
        host.go_down(seconds)
        return
    labels = world.brain.state.topology.domains.get("node")
    for process in list(world.processes.values()):
        if process.rank == rank or (labels is not None and labels[process.rank] == labels[rank]):
            crash(world, process)


def go_on(world: World, process: Process) -> None:
    world.harmed.pop((process.rank, process.incarnation), None)
    process.go_on()


def cut(world: World, rank: int, other: int, seconds: float) -> None:
    world.net.wire(rank, other).is_cut = True
    world.timeline.after(seconds, world.net.heal, rank, other)


def flip_slot(process: Process) -> None:
    if process.held:
        key = min(process.held)
        expert, content = process.held[key]
        process.held = {**process.held, key: (expert, content ^ (1 << 17))}
