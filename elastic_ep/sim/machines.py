"""The hosts under the ranks: a disk that may be slow or fail, and the memory that keeps a copy of all experts beside the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from elastic_ep.brain.messages import LoadOrder
from elastic_ep.core.links import SourceKind
from elastic_ep.sim import tokens

if TYPE_CHECKING:
    from elastic_ep.sim.process import Process
    from elastic_ep.sim.world import World

FILL_S = 0.02
"""how long a rank's upkeep takes for one expert"""
Backups = dict[str, NDArray[np.bool_]]
"""node label -> bool [L, E]: what is in that node's memory"""
HERE = ""
"""the name of the controller's host"""


class Machine:
    """One host.

    Attributes:
        backup: (layer, expert) -> (bytes, digest of them when they were written); None where none is kept.
        disk_factor: how many times slower than it should be.
        disk_fails: every read of the checkpoint fails.
    """

    def __init__(self, name: str, has_backup: bool) -> None:
        self.name = name
        self.backup: dict[tuple[int, int], tuple[int, int]] | None = {} if has_backup else None
        self.disk_factor = 1.0
        self.disk_fails = False

    def lose_memory(self) -> None:
        if self.backup is not None:
            self.backup = {}

    def flip_backup(self) -> None:
        """One bit of the lowest expert of the copy changes."""
        if self.backup:
            key = min(self.backup)
            content, digest = self.backup[key]
            self.backup[key] = (content ^ (1 << 17), digest)

    def experts(self, shape: tuple[int, int]) -> NDArray[np.bool_]:
        """bool [L, E]: what the copy has."""
        has = np.zeros(shape, dtype=np.bool_)
        for pair in self.backup or ():
            has[pair] = True
        return has


def read(world: World, process: Process, load: LoadOrder) -> int | None:
    """The bytes of one expert as `runtime/weights` reads them: from the source that the plan chose, else the host's copy, else the
    checkpoint; the first that have the digest. None if none has them."""
    machine = world.machine_of(process.rank)
    chosen = SourceKind(load.source)
    order = [_from_checkpoint if chosen is SourceKind.CHECKPOINT else _from_backup if chosen is SourceKind.HOST else _from_peer]
    for source in [*order, *(s for s in (_from_backup, _from_checkpoint) if s not in order)]:
        found = source(world, process, machine, load)
        if found is None:
            continue
        content, known = found
        if takes_flip(world, process, load.layer, load.expert):
            content ^= 1 << 17
        expected = known if load.digest is None else load.digest
        if expected is None or content == expected:
            return content
    return None


Found = tuple[int, int | None]
"""bytes, and the digest that the source itself knows"""


def _from_peer(world: World, process: Process, machine: Machine, load: LoadOrder) -> Found | None:
    content = read_from_peer(world, process, load)
    return None if content is None else (content, None)


def _from_backup(world: World, process: Process, machine: Machine, load: LoadOrder) -> Found | None:
    return None if machine.backup is None else machine.backup.get((load.layer, load.expert))


def _from_checkpoint(world: World, process: Process, machine: Machine, load: LoadOrder) -> Found | None:
    return None if machine.disk_fails else (tokens.expert_bytes(load.layer, load.expert), None)


def fill(world: World, process: Process) -> bool:
    """Put one more expert into the host's copy: those of this rank's slots first. False when none is missing, or the disk fails."""
    machine = world.machine_of(process.rank)
    if machine.backup is None:
        return False
    for (layer, _), (expert, content) in process.held.items():
        if (layer, expert) not in machine.backup:
            machine.backup[layer, expert] = (content, content)
            return True
    layers, experts = world.settings.num_layers, world.settings.plan.num_experts
    start = process.rank * layers * experts // len(world.brain.state.seats)
    for i in range(layers * experts):
        pair = divmod((start + i) % (layers * experts), experts)
        if pair not in machine.backup:
            if machine.disk_fails:
                return False
            content = tokens.expert_bytes(*pair)
            if takes_flip(world, process, *pair):
                content ^= 1 << 17
            machine.backup[pair] = (content, content)
            return True
    return False


def backups(world: World) -> Backups:
    """What is in the memory of hosts that can be reached, under the label of each of their nodes."""
    if not world.schedule.has_backup:
        return {}
    topology, shape = world.brain.state.topology, (world.settings.num_layers, world.settings.plan.num_experts)
    labels = topology.labels("node" if "node" in topology.domains else "rank")
    here = [rank for rank in range(len(labels)) if rank not in world.hosts or world.hosts[rank].holder]
    has = {machine: machine.experts(shape) for machine in {world.machine_of(rank).name: world.machine_of(rank) for rank in here}.values()}
    return {labels[rank]: has[world.machine_of(rank)] for rank in here}


def takes_flip(world: World, process: Process, layer: int, expert: int) -> bool:
    """Whether this read has a bit wrong. Not the first read of an expert, which sets its digest: that is outside the promises."""
    if not world.flips.get(process.rank) or (layer, expert) not in world.brain.state.digests:
        return False
    world.flips[process.rank] -= 1
    return True


def read_from_peer(world: World, reader: Process, load: LoadOrder) -> int | None:
    """The bytes that the ordered peer, or the reader itself, holds; None if it holds none or can't be reached."""
    if load.peer < 0:
        return None
    process = world.processes.get((load.peer, world.brain.state.seats[load.peer].incarnation))
    if process is None or not process.is_alive or process.is_stopped or world.net.wire(reader.rank, load.peer).is_cut:
        return None
    wanted = (load.layer, load.expert)
    return next((content for (layer, _), (expert, content) in process.held.items() if (layer, expert) == wanted), None)
