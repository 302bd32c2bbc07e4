"""Where an expert's bytes can come from, how fast each way is, and which way is least busy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class SourceKind(Enum):
    """Ways to fill a slot, cheapest first."""

    LOCAL = "local"
    """another slot of the same rank"""
    SAME_NODE = "same_node"
    """a live peer on the same node"""
    OTHER_NODE = "other_node"
    """a live peer on another node"""
    HOST = "host"
    """a backup in the memory of the rank's own node"""
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class LinkSpeeds:
    """Bytes per second of each way. Defaults are those of one 8-GPU node with NVLink and one 400 Gbit/s card per GPU.

    Attributes:
        same_node: of one rank, in each direction, to peers on its node.
        other_node: of one rank, in each direction, to other nodes.
        host: from a node's memory to one rank.
        checkpoint: from storage to one node.
    """

    same_node: float = 300e9
    other_node: float = 50e9
    host: float = 50e9
    checkpoint: float = 5e9


class Link(NamedTuple):
    """One way with a capacity of its own, e.g. ``("out other_node", 3)``: what rank 3 sends to other nodes."""

    name: str
    owner: int | str


class Source(NamedTuple):
    """Where the bytes of one copy come from. rank and slot are -1 unless a rank sends them."""

    kind: SourceKind
    rank: int = -1
    slot: int = -1


@dataclass
class LinkLoads:
    """Bytes that each link has to carry so far, and what that takes.

    Attributes:
        node: label of each rank's node.
        num_bytes: per link.
    """

    speeds: LinkSpeeds
    node: tuple[str, ...]
    num_bytes: dict[Link, int] = field(default_factory=lambda: defaultdict(int))

    def links_of(self, source: Source, rank: int) -> list[tuple[Link, float]]:
        """The links, with their speeds, that a copy from ``source`` to ``rank`` goes over."""
        if source.kind is SourceKind.SAME_NODE:
            return [(Link("out same_node", source.rank), self.speeds.same_node), (Link("in same_node", rank), self.speeds.same_node)]
        if source.kind is SourceKind.OTHER_NODE:
            speed = self.speeds.other_node
            return [(Link("out other_node", source.rank), speed), (Link("in other_node", rank), speed)]
        if source.kind is SourceKind.HOST:
            return [(Link("host", rank), self.speeds.host)]
        if source.kind is SourceKind.CHECKPOINT:
            return [(Link("checkpoint", self.node[rank]), self.speeds.checkpoint)]
        return []

    def pick(self, options: Iterable[Source], rank: int, num_bytes: int) -> Source:
        """The source whose links are done first with it added; among equals the cheaper kind, then the lower rank. It is added."""
        best: tuple[float, int, int, int] | None = None
        chosen = Source(SourceKind.CHECKPOINT)
        for source in options:
            done = max(((self.num_bytes[k] + num_bytes) / v for k, v in self.links_of(source, rank)), default=0.0)
            key = (done, list(SourceKind).index(source.kind), source.rank, source.slot)
            if best is None or key < best:
                best, chosen = key, source
        for link, _ in self.links_of(chosen, rank):
            self.num_bytes[link] += num_bytes
        return chosen

    def seconds(self) -> Mapping[Link, float]:
        """Time that each link needs for its bytes, busiest first."""
        speed = {"same_node": self.speeds.same_node, "other_node": self.speeds.other_node}
        speed |= {"host": self.speeds.host, "checkpoint": self.speeds.checkpoint}
        times = {link: n / speed[link.name.split()[-1]] for link, n in self.num_bytes.items() if n}
        return dict(sorted(times.items(), key=lambda item: (-item[1], str(item[0]))))
