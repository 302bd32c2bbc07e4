"""Which sources are asked for an expert, in which order: the one that the plan chose, then the host's backup, then the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from elastic_ep.brain.messages import LoadOrder
from elastic_ep.core.links import SourceKind
from elastic_ep.runtime.engine import Slots
from elastic_ep.runtime.weights.base import ExpertSource, LocalSource
from elastic_ep.runtime.weights.peer import Peers


class Sources:
    """All sources of one rank. Threads do not share peers' channels: with `weights` given to `chain`, for one thread at a time."""

    def __init__(self, slots: Slots, peers: Peers) -> None:
        self._slots = slots
        self._peers = peers
        self._local = LocalSource(slots.bytes_of)

    def chain(self, order: LoadOrder, weights: Mapping[int, str]) -> tuple[ExpertSource, ...]:
        """What to ask for this order, best first. `weights`: where each rank can be asked."""
        chosen: ExpertSource | None = None
        match SourceKind(order.source):
            case SourceKind.LOCAL:
                chosen = self._local
            case SourceKind.SAME_NODE | SourceKind.OTHER_NODE:
                chosen = self._peers.source(order.peer, weights)
            case SourceKind.HOST:
                chosen = self._slots.backup
            case SourceKind.CHECKPOINT:
                chosen = self._slots.checkpoint
        wanted = [chosen, self._slots.backup, self._slots.checkpoint]
        return tuple(source for i, source in enumerate(wanted) if source is not None and source not in wanted[:i])
