"""What the API layer needs of whatever generates tokens: the controller implements it, the API's tests script it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol

from elastic_ep.brain.events import Drain, DrainRequested, GenerationRequest, ScaleRequested, TokenEvent
from elastic_ep.core.errors import ElasticEPError


class QueueFull(ElasticEPError):
    """Too many requests wait: the client may come again after `retry_after_s` (HTTP 429)."""

    def __init__(self, message: str, retry_after_s: float = 1.0):
        self.retry_after_s = retry_after_s
        super().__init__(message)


class Unavailable(ElasticEPError):
    """The server takes no requests now (starting, stopping, no live rank, experts missing). The message is the reason (HTTP 503)."""


class OperationRefused(ElasticEPError):
    """The group cannot be changed so, or not now. The message is the reason (HTTP 409)."""


class TokenStream(Protocol):
    """The events of one sequence, in order, each once. `aclose()` before the end cancels the sequence, also when nothing was read yet
    (an async generator's own does nothing then); after the end it does nothing. `finish()` is the same, of a sequence that has brought all
    that its client asked for."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    async def __anext__(self) -> TokenEvent: ...

    async def aclose(self) -> None: ...

    async def finish(self) -> None: ...


class EventStream(Protocol):
    """Membership, recovery and step events as JSON objects. Ends when the server stops; `aclose()` unsubscribes."""

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]: ...

    async def __anext__(self) -> dict[str, Any]: ...

    async def aclose(self) -> None: ...


class Backend(Protocol):
    """Generates tokens. All methods are called from the event loop that serves the API."""

    @property
    def model_name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def submit(self, request: GenerationRequest) -> TokenStream:
        """Queue a sequence. Raises QueueFull or Unavailable from the call itself, not from the stream: the HTTP status hangs on it."""
        ...

    def status(self) -> dict[str, Any]:
        """The object of GET /elastic/status."""
        ...

    def events(self) -> EventStream: ...

    @property
    def default_drain(self) -> Drain:
        """What happens to the requests of a rank that leaves, unless the operation says."""
        ...

    def begin_operation(self, request: ScaleRequested | DrainRequested) -> Awaitable[dict[str, Any]]:
        """Begin to grow, shrink or drain; what is awaited is the finished operation. One that is known by its name is not begun again.
        Raises OperationRefused."""
        ...

    def operation(self, operation_id: str) -> dict[str, Any] | None:
        """The object of GET /elastic/operations/ID; None if it is not known."""
        ...

    def operations(self) -> list[dict[str, Any]]:
        """All that are remembered, oldest first."""
        ...

    def health(self) -> tuple[bool, str]:
        """Whether requests are served now, and why not if not."""
        ...
