"""How many tokens each expert was asked for, lately: the load that placements are made for."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

WINDOWS_USED = 8
"""the load that a plan sees is the sum of so many newest windows"""


class LoadRecorder:
    """Counts by window of time. Each rank reports what its own tokens asked for, so that the sum counts each once.

    Attributes:
        windows: finished windows, int64 [L, E] each, oldest first, with the time at which each ended.
    """

    def __init__(self, num_layers: int, num_experts: int, window_s: float, now: float, windows_kept: int = WINDOWS_USED) -> None:
        self._shape = (num_layers, num_experts)
        self._window_s = window_s
        self._current = np.zeros(self._shape, dtype=np.int64)
        self._ends = now + window_s
        self._has_counts = False
        self.windows: deque[tuple[float, NDArray[np.int64]]] = deque(maxlen=windows_kept)

    def add(self, counts: bytes, now: float) -> None:
        """Take one report: uint32 [L, E], little-endian, C order. One of another size is not of this model and is left out."""
        reported = np.frombuffer(counts, "<u4")
        if reported.size != self._current.size:
            return
        if now >= self._ends:
            if self._current.any():
                self.windows.append((now, self._current))
                self._current = np.zeros(self._shape, dtype=np.int64)
            self._ends = now + self._window_s
        self._current += reported.reshape(self._shape)
        self._has_counts = True

    def recent(self) -> NDArray[np.float64] | None:
        """float64 [L, E] tokens of the newest windows, the unfinished one among them; None before anything was reported.

        A layer that nobody has used yet counts as evenly used.
        """
        if not self._has_counts:
            return None
        newest = [counts for _, counts in list(self.windows)[1 - WINDOWS_USED :]]
        total = sum(newest, self._current).astype(np.float64)
        if not total.any():
            return None
        total[total.sum(axis=1) == 0] = 1.0
        return total

    def trace(self) -> NDArray[np.int64]:
        """int64 [windows, L, E]: all finished windows that are kept and the unfinished one."""
        return np.stack([*(counts for _, counts in self.windows), self._current])
