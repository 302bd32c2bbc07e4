"""Operators' requests to grow, shrink and drain: refused with a reason or handed to the brain, and their askers told when they are over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from elastic_ep.brain import operations
from elastic_ep.brain.events import DrainRequested, ScaleRequested
from elastic_ep.brain.state import BrainState, OperationState
from elastic_ep.serving.backend import OperationRefused


class OperationDesk:
    """`feed` hands an event to the brain, whose state is `state`."""

    def __init__(self, state: BrainState, feed: Callable[[ScaleRequested | DrainRequested], None]) -> None:
        self._state = state
        self._feed = feed
        self._waiters: dict[str, asyncio.Future[dict[str, Any]]] = {}

    def begin(self, request: ScaleRequested | DrainRequested) -> asyncio.Future[dict[str, Any]]:
        """See `Backend.begin_operation`."""
        reason = operations.refusal(self._state, request)
        if reason is not None:
            raise OperationRefused(reason)
        waiter = self._waiters.setdefault(request.operation_id, asyncio.get_running_loop().create_future())
        self._feed(request)
        self.note_finished(request.operation_id)
        return waiter

    def note_finished(self, operation_id: str) -> None:
        """Tell whoever waits for this operation, if it is over."""
        operation = self._state.operations[operation_id]
        if operation.state is not OperationState.RUNNING:
            waiter = self._waiters.pop(operation_id, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(operation.as_status())

    def find(self, operation_id: str) -> dict[str, Any] | None:
        found = self._state.operations.get(operation_id)
        return None if found is None else found.as_status()

    def all(self) -> list[dict[str, Any]]:
        return [operation.as_status() for operation in self._state.operations.values()]
