"""What the API layer needs of whatever generates tokens: the controller implements it, the API's tests script it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from elastic_ep.brain.messages import SampledToken, SamplingParams
from elastic_ep.core.errors import ElasticEPError

Finish = Literal["stop", "length", "error"]


class QueueFull(ElasticEPError):
    """Too many requests wait: the client may come again after `retry_after_s` (HTTP 429)."""

    def __init__(self, message: str, retry_after_s: float = 1.0):
        self.retry_after_s = retry_after_s
        super().__init__(message)


class Unavailable(ElasticEPError):
    """The server takes no requests now (starting, stopping, no live rank, experts missing). The message is the reason (HTTP 503)."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate: one prompt of one choice.

    Attributes:
        request_id: unique among the server's requests.
        prompt_ids: at least one token id, each in [0, vocab_size).
        max_tokens: at least 1; len(prompt_ids) + max_tokens <= max_model_len.
        sampling: with the seed already chosen.
        eos_ids: ids that end the sequence; empty when the client ignores them.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    eos_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One committed token, or the end of the sequence, or both.

    Attributes:
        token: None only when `finish` is set and no token comes with it (always so for "error").
        index: position of the token among the sequence's generated ones, from 0.
        finish: None while more follows; "stop" when `token` is one of eos_ids; nothing follows an event that has it.
        error: the reason, for finish "error".
    """

    token: SampledToken | None
    index: int
    finish: Finish | None = None
    error: str = ""


class TokenStream(Protocol):
    """The events of one sequence, in order, each once. `aclose()` before the end cancels the sequence, also when nothing was read yet
    (an async generator's own does nothing then); after the end it does nothing."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    async def __anext__(self) -> TokenEvent: ...

    async def aclose(self) -> None: ...


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

    def health(self) -> tuple[bool, str]:
        """Whether requests are served now, and why not if not."""
        ...
