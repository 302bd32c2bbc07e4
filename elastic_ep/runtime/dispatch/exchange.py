"""One exchange over a mesh: a frame to every peer, a frame from every peer, in bounded time, whatever the peers do.

It ends when every frame has come and every own byte has left, so that a peer never waits for bytes that a busy rank still holds.
"""

from __future__ import annotations

import select
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from elastic_ep.runtime.dispatch.base import FailureKind
from elastic_ep.runtime.dispatch.channel import Accept, Channel, Progress
from elastic_ep.runtime.dispatch.frames import FrameFormat
from elastic_ep.runtime.dispatch.mesh import GONE, Mesh

_FAILURE_OF = {Progress.CLOSED: FailureKind.CLOSED, Progress.REFUSED: FailureKind.PROTOCOL}


@dataclass(slots=True)
class Exchanged:
    """How an exchange ended: which peers failed, whose frames came, whether the interrupt fired."""

    failed: dict[int, FailureKind]
    arrived: set[int] = field(default_factory=set)
    interrupted: bool = False


class Exchange:
    """The loop and its limits. Times in seconds; see `SocketDispatcher`."""

    def __init__(self, mesh: Mesh, interrupt_fd: int | None, deadline_s: float, grace_s: float):
        self.deadline_s = deadline_s
        self.grace_s = grace_s
        self._mesh = mesh
        self.interrupt_fd = interrupt_fd

    def settle(self, form: FrameFormat, accept: Accept, began: float) -> Exchanged:
        """Give what comes from each peer to `accept`. This rank's own frames are posted already, since `began`.

        A peer that failed is dropped from the mesh, unless it was only late.
        """
        mesh = self._mesh
        done = Exchanged({r: FailureKind.CLOSED for r in mesh.peers if r not in mesh.channels})
        deadline = began + (self.grace_s if done.failed else self.deadline_s)
        waiting = dict.fromkeys(mesh.channels.values(), Progress.WAITING)
        ready = [(channel, 0) for channel in waiting if channel.holds_input or channel.broken]
        last_look = False
        while True:
            for channel, event in ready:
                kind = _advance(channel, event, form, accept, done.arrived, waiting)
                if kind is not None:
                    done.failed[channel.peer] = kind
                    mesh.drop(channel.peer)
                    deadline = min(deadline, time.monotonic() + self.grace_s)
            if not waiting:
                return done
            left_s = deadline - time.monotonic()
            if last_look:
                if not done.failed:
                    done.failed = {channel.peer: FailureKind.DEADLINE for channel in waiting}
                return done
            # this process may have been stopped past the deadline itself, with all frames waiting to be read
            last_look = left_s <= 0
            events = self._poll(waiting, max(0.0, left_s))
            if self.interrupt_fd in events:
                done.interrupted = True
                return done
            ready = [(channel, events[channel.fd]) for channel in waiting if channel.fd in events]

    def _poll(self, waiting: Mapping[Channel, Progress], timeout_s: float) -> dict[int, int]:
        """fd -> events, empty when the time is up."""
        poll = select.poll()
        if self.interrupt_fd is not None:
            poll.register(self.interrupt_fd, select.POLLIN)
        for channel, progress in waiting.items():
            interest = select.POLLIN if progress is Progress.WAITING else select.POLLRDHUP
            poll.register(channel.fd, interest | select.POLLOUT if channel.has_unsent else interest)
        return dict(poll.poll(timeout_s * 1e3))


def _advance(
    channel: Channel, event: int, form: FrameFormat, accept: Accept, arrived: set[int], waiting: dict[Channel, Progress]
) -> FailureKind | None:
    """Serve one ready channel; take it off `waiting` once it is done or failed. Returns how the peer failed, if it did."""
    if channel.has_unsent:
        channel.flush()
    progress = waiting[channel]
    if progress is not Progress.DONE:
        progress = waiting[channel] = channel.receive(form, accept)
        if progress is Progress.DONE:
            arrived.add(channel.peer)
    kind = _FAILURE_OF.get(progress)
    if kind is None and (channel.broken or (event & GONE and progress is Progress.PARKED)):
        kind = FailureKind.CLOSED
    if kind is not None or (progress is Progress.DONE and not channel.has_unsent):
        del waiting[channel]
    return kind
