"""Channels between ranks as `runtime/dispatch/mesh.py` makes them: the higher rank calls, the lower one answers whom it was told of.

Only a rank that is connecting answers; a call that came before waits, one that is not expected is refused and tried again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from elastic_ep.sim.network import Channel

if TYPE_CHECKING:
    from elastic_ep.sim.process import Process

RETRY_S = 0.02
EOF = "eof"


class End:
    """One process's end of a channel to a peer."""

    def __init__(self, owner: Process, peer: int, address: str) -> None:
        self.owner = owner
        self.peer = peer
        self.address = address
        self.twin: End
        self.channel: Channel
        self.is_open = True

    def arrive(self, item: Any) -> None:
        """Something sent by the other end has come."""
        if self.is_open:
            self.owner.guarded(self.owner.on_peer, self, item)

    def close(self) -> None:
        """The other end learns of it after all that was sent before."""
        if self.is_open:
            self.is_open = False
            self.channel.send(EOF)
            self.channel.is_closed = True


def make_ends(a: Process, b: Process) -> tuple[End, End]:
    """Both ends of a new channel between two processes."""
    near, far = End(a, b.rank, b.address), End(b, a.rank, a.address)
    near.twin, far.twin = far, near
    net = a.world.net
    near.channel = Channel(net, a.rank, b.rank, far.arrive)
    far.channel = Channel(net, b.rank, a.rank, near.arrive)
    return near, far


@dataclass(eq=False)
class Call:
    """An attempt of `caller` to reach the process at `address`."""

    caller: Process
    target: int
    address: str
    is_open: bool = True


class Mesh:
    """The channels of one process. `connect` tells `done` once every peer has one; what fails until then is `missing`."""

    def __init__(self, owner: Process) -> None:
        self.owner = owner
        self.peers: dict[int, str] = {}
        self.ends: dict[int, End] = {}
        self.calls: dict[int, Call] = {}
        self.guests: list[Call] = []
        self.is_connecting = False

    def connect(self, peers: dict[int, str]) -> None:
        self.peers = {rank: address for rank, address in peers.items() if rank != self.owner.rank}
        for rank, end in list(self.ends.items()):
            if self.peers.get(rank) != end.address or not end.twin.is_open:
                end.close()
                del self.ends[rank]
        self.is_connecting = True
        for rank in self.missing():
            if rank < self.owner.rank:
                self._call(rank)
        guests, self.guests = self.guests, []
        for call in guests:
            self.on_call(call)

    def missing(self) -> list[int]:
        return [rank for rank in self.peers if rank not in self.ends]

    def stop_connecting(self) -> None:
        self.is_connecting = False
        for call in self.calls.values():
            call.is_open = False
        self.calls.clear()

    def drop(self, end: End) -> None:
        """The other end has closed."""
        end.close()
        if self.ends.get(end.peer) is end:
            del self.ends[end.peer]
            if self.is_connecting and end.peer < self.owner.rank:
                self._call(end.peer)

    def close(self) -> None:
        self.stop_connecting()
        for end in self.ends.values():
            end.close()
        self.ends.clear()

    def abandon(self) -> None:
        """Nothing is sent any more, and nobody is told."""
        for end in self.ends.values():
            end.is_open = False
        self.ends.clear()

    def _call(self, rank: int) -> None:
        world = self.owner.world
        call = self.calls[rank] = Call(self.owner, rank, self.peers[rank])
        world.send_between(self.owner.rank, rank, world.deliver_call, call)

    def on_call(self, call: Call) -> None:
        """A call has come in."""
        if not call.is_open:
            return
        if not self.is_connecting:
            self.guests.append(call)
            return
        caller = call.caller
        if self.peers.get(caller.rank) != caller.address:
            self.owner.world.send_between(self.owner.rank, caller.rank, caller.guarded, caller.mesh.on_refused, call)
            return
        old = self.ends.get(caller.rank)
        if old is not None:
            old.close()
        near, far = make_ends(self.owner, caller)
        self.ends[caller.rank] = near
        self.owner.world.send_between(self.owner.rank, caller.rank, caller.guarded, caller.mesh.on_welcome, call, far)
        self.owner.on_connected()

    def on_welcome(self, call: Call, end: End) -> None:
        if not call.is_open:
            end.close()
            return
        call.is_open = False
        self.calls.pop(call.target, None)
        self.ends[call.target] = end
        self.owner.on_connected()

    def on_refused(self, call: Call) -> None:
        if call.is_open:
            call.is_open = False
            self.owner.later(RETRY_S, self._again, call.target)

    def _again(self, rank: int) -> None:
        if self.is_connecting and rank in self.peers and rank not in self.ends:
            self._call(rank)
