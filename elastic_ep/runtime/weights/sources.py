"""Which sources are asked for an expert, in which order: the one that the plan chose, then the host's backup, then the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from elastic_ep.brain.messages import LoadOrder
from elastic_ep.core.links import SourceKind
from elastic_ep.runtime.engine import Slots
from elastic_ep.runtime.weights.base import ExpertSource, LocalSource
from elastic_ep.runtime.weights.peer import PeerSource
from elastic_ep.runtime.weights.peer_memory import MemoryAccess, PeerMemory


class _Peer(NamedTuple):
    address: str
    channel: PeerSource
    memory: PeerMemory | None


class Peers:
    """A source for each rank that can be asked, made when first needed.

    Args:
        shape: (L, E, bytes of a slot).
        access: to copy the experts of ranks on this host out of their memory; None: they are to send them.
    """

    def __init__(self, rank: int, address: str, token: str, shape: tuple[int, int, int], access: MemoryAccess | None = None) -> None:
        self._rank, self._address, self._token = rank, address, token
        self._shape = shape
        self._access = access
        self._known: dict[int, _Peer] = {}

    def source(self, peer: int, addresses: Mapping[int, str], *, is_digest_known: bool = False) -> ExpertSource | None:
        """The source of a rank, None if its address is not known. Memory may hold another expert by now: only if the digest tells."""
        address = addresses.get(peer)
        if not address or peer == self._rank:
            return None
        known = self._known.get(peer)
        if known is None or known.address != address:
            if known is not None:
                known.channel.close()
            channel = PeerSource(self._rank, self._address, peer, address, self._token)
            memory = None
            if self._access is not None and address.startswith("unix:"):
                memory = PeerMemory(channel, self._shape, self._access)
            known = self._known[peer] = _Peer(address, channel, memory)
        return known.memory if known.memory is not None and is_digest_known else known.channel

    def begin_order(self) -> None:
        """Experts may lie elsewhere than they did in the order before."""
        for peer in self._known.values():
            if peer.memory is not None:
                peer.memory.forget()

    def close(self) -> None:
        for peer in self._known.values():
            peer.channel.close()
        self._known.clear()


class Sources:
    """All sources of one rank. Threads do not share peers' channels: with `weights` given to `chain`, for one thread at a time."""

    def __init__(self, slots: Slots, peers: Peers) -> None:
        self._slots = slots
        self._peers = peers
        self._local = LocalSource(slots.bytes_of)
        self._order = -1

    def begin_order(self, number: int) -> None:
        """What `chain` is asked from now on belongs to this order."""
        if number != self._order:
            self._order = number
            self._peers.begin_order()

    def chain(self, order: LoadOrder, weights: Mapping[int, str]) -> tuple[ExpertSource, ...]:
        """What to ask for this order, best first. `weights`: where each rank can be asked."""
        chosen: ExpertSource | None = None
        match SourceKind(order.source):
            case SourceKind.LOCAL:
                chosen = self._local
            case SourceKind.SAME_NODE | SourceKind.OTHER_NODE:
                chosen = self._peers.source(order.peer, weights, is_digest_known=order.digest is not None)
            case SourceKind.HOST:
                chosen = self._slots.backup
            case SourceKind.CHECKPOINT:
                chosen = self._slots.checkpoint
        wanted = [chosen, self._slots.backup, self._slots.checkpoint]
        return tuple(source for i, source in enumerate(wanted) if source is not None and source not in wanted[:i])
