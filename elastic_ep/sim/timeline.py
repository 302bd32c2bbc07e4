"""Virtual time: events in order of their moment, ties in order of their making. What happens leaves a trace whose hash names the run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Note = str | tuple[Any, ...]
"""words, or a function and its arguments that make them"""


class Timeline:
    """Calls that are due, and the trace of what was done.

    Attributes:
        now: virtual seconds.
        happened: events taken so far.
        notes: (moment, what) of each noted fact, oldest first; put into words only when somebody reads them.
    """

    def __init__(self, *, with_notes: bool = True) -> None:
        self.now = 0.0
        self.happened = 0
        self.notes: list[tuple[float, Note]] = []
        self.with_notes = with_notes
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._made = 0

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        """Do this at `when`, or now if that is past."""
        self._made += 1
        heappush(self._heap, (when if when > self.now else self.now, self._made, call, args))

    def after(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        self._made += 1
        heappush(self._heap, (self.now + seconds if seconds > 0 else self.now, self._made, call, args))

    @property
    def next_at(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def step(self) -> bool:
        """Take the next event. False when there is none."""
        if not self._heap:
            return False
        self.now, _, call, args = heappop(self._heap)
        self.happened += 1
        call(*args)
        return True

    def note(self, what: Note) -> None:
        """Remember a fact: its words, or what words can be made of later. Nothing that it refers to may change."""
        if self.with_notes:
            self.notes.append((self.now, what))

    def trace(self) -> list[str]:
        """One line per noted fact."""
        return [f"{moment:.6f} {what if isinstance(what, str) else what[0](*what[1:])}" for moment, what in self.notes]

    def digest(self) -> str:
        """Hash of the whole trace: equal for two runs of one schedule, on any machine."""
        return hashlib.blake2b("\n".join(self.trace()).encode(), digest_size=8).hexdigest()
