"""Links of virtual machines. A channel is a stream: in order, nothing lost; what a wire loses only comes later, and a cut wire holds all.

Different channels do not wait for each other, so messages overtake one another freely between them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from elastic_ep.sim.timeline import Timeline

CONTROLLER = -1
"""the controller's place among the ranks"""


@dataclass
class Wire:
    """What lies between two places, in both directions.

    Attributes:
        factor: how many times slower than it should be.
        is_cut: nothing comes through until it is healed.
        held: what waits for that.
    """

    factor: float = 1.0
    is_cut: bool = False
    held: list[Callable[[], None]] = field(default_factory=list)


class Network:
    """All wires, and how long things take on them.

    Args:
        loss: part of the messages that is lost and sent again, 200 ms later.
    """

    def __init__(self, timeline: Timeline, rng: random.Random, latency_s: float, loss: float) -> None:
        self.timeline = timeline
        self.latency_s = latency_s
        self.loss = loss
        self._random = rng.random
        self._wires: dict[tuple[int, int], Wire] = {}

    def wire(self, a: int, b: int) -> Wire:
        key = (a, b) if a < b else (b, a)
        found = self._wires.get(key)
        if found is None:
            found = self._wires[key] = Wire()
        return found

    def delay(self, wire: Wire) -> float:
        seconds = self.latency_s * (0.2 + 1.6 * self._random()) * wire.factor
        if self.loss and self._random() < self.loss:
            seconds += 0.2
        return seconds

    def heal(self, a: int, b: int) -> None:
        """The wire works again: what it held goes on its way, in order."""
        wire = self.wire(a, b)
        wire.is_cut = False
        held, wire.held = wire.held, []
        for send in held:
            send()

    def heal_all(self) -> None:
        for a, b in list(self._wires):
            self.heal(a, b)
            self.wire(a, b).factor = 1.0


class Channel:
    """One direction of a stream between two processes: `deliver` is called with each item, in the order in which they were sent."""

    __slots__ = ("_deliver", "_last", "_net", "_wire", "extra_s", "is_broken", "is_closed")

    def __init__(self, net: Network, source: int, target: int, deliver: Callable[..., None]) -> None:
        self._net = net
        self._wire = net.wire(source, target)
        self._deliver = deliver
        self._last = 0.0
        self.extra_s = 0.0
        """what the next message is delayed by, beside the usual"""
        self.is_closed = False
        """nothing more is sent; what was, still comes"""
        self.is_broken = False
        """what a cut wire holds never comes, either"""

    def send(self, item: Any) -> None:
        if not self.is_closed:
            self._put(item)

    def _put(self, item: Any) -> None:
        if self._wire.is_cut:
            self._wire.held.append(partial(self._put, item))
            return
        if self.is_broken:
            return
        timeline = self._net.timeline
        when = timeline.now + self._net.delay(self._wire) + self.extra_s
        if when < self._last:
            when = self._last
        self.extra_s = 0.0
        self._last = when
        timeline.at(when, self._deliver, item)
