"""The event log: numbered, timed, bounded; every subscriber gets each event once, a slow one loses the oldest and is told how many."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

KEPT = 1024


class EventLog:
    """Recent events for whoever asks, new ones for whoever listens."""

    def __init__(self) -> None:
        self.recent: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._next_id = 1
        self._changed: asyncio.Event = asyncio.Event()
        self._closed = False

    def publish(self, kind: str, data: dict[str, Any]) -> None:
        self.recent.append({"id": self._next_id, "time": time.time(), "event": kind, **data})
        self._next_id += 1
        self._changed.set()

    def close(self) -> None:
        """End all subscriptions."""
        self._closed = True
        self._changed.set()

    async def subscribe(self) -> AsyncGenerator[dict[str, Any], None]:
        """Events from now on, in order."""
        seen = self._next_id - 1
        while not self._closed:
            fresh = [event for event in self.recent if event["id"] > seen]
            if fresh and fresh[0]["id"] > seen + 1:
                yield {"event": "lost", "count": fresh[0]["id"] - seen - 1, "time": time.time()}
            for event in fresh:
                seen = event["id"]
                yield event
            if seen == self._next_id - 1:
                self._changed.clear()
                await self._changed.wait()
