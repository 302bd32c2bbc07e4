"""Virtual time: events in order of their moment, ties in order of their making. What happens leaves a trace whose hash names the run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Timeline:
    """Calls that are due, and the trace of what was done.

    Attributes:
        now: virtual seconds.
        happened: events taken so far.
        trace: one line per noted fact, oldest first.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0
        self.trace: list[str] = []
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._made = 0

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        """Do this at `when`, or now if that is past."""
        self._made += 1
        heappush(self._heap, (max(when, self.now), self._made, call, args))

    def after(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        self.at(self.now + seconds, call, *args)

    @property
    def next_at(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def step(self) -> bool:
        """Take the next event. False when there is none."""
        if not self._heap:
            return False
        when, _, call, args = heappop(self._heap)
        self.now = when
        self.happened += 1
        call(*args)
        return True

    def note(self, text: str) -> None:
        self.trace.append(f"{self.now:.6f} {text}")

    def digest(self) -> str:
        """Hash of the whole trace: equal for two runs of one schedule, on any machine."""
        return hashlib.blake2b("\n".join(self.trace).encode(), digest_size=8).hexdigest()
