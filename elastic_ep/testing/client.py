"""A streaming client that notes every token and when it came."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from elastic_ep.testing.history import Event, History, Kind

READ_TIMEOUT_S = 120.0
_numbers = itertools.count(1)


@dataclass
class StreamRecord:
    """What one client got.

    Attributes:
        token_ids, text: in order of arrival.
        times: when each token came (time.monotonic(), seconds), one per token.
        finish: the finish reason, "" if the stream ended without one.
        error: what went wrong, "" if nothing.
    """

    prompt: Sequence[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    times: list[float] = field(default_factory=list)
    finish: str = ""
    error: str = ""

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between consecutive tokens."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


class Recorder:
    """One request's way into its record and into a history.

    Args:
        key: requests of one key ask for the same tokens; made from the request when not given.
        reference: nothing fails during this run.
        cancel_after: hang up after so many tokens.
    """

    def __init__(
        self, history: History | None = None, *, key: str | None = None, reference: bool = False, cancel_after: int | None = None
    ) -> None:
        self.history = history or History()
        self.key = key
        self.reference = reference
        self.cancel_after = cancel_after
        self.request = str(next(_numbers))

    def note(self, kind: Kind, at: float | None = None, **what: Any) -> None:
        self.history.note(Event(kind, time.monotonic() if at is None else at, self.request, **what))

    def sent(self, body: dict[str, Any]) -> None:
        asked = {name: value for name, value in body.items() if name not in ("stream", "return_token_ids", "model")}
        key = self.key or json.dumps(asked, sort_keys=True)
        self.note(Kind.SENT, key=key, reference=self.reference, max_tokens=body.get("max_tokens"))


async def stream_completion(
    client: httpx.AsyncClient, url: str, model: str, prompt: Sequence[int], recorder: Recorder | None = None, **parameters: Any
) -> StreamRecord:
    """POST /v1/completions with `stream`, token ids in and out. Never raises for what the server does: `error` says it."""
    record, recorder = StreamRecord(prompt), recorder or Recorder()
    body = {"model": model, "prompt": list(prompt), "stream": True, "return_token_ids": True, **parameters}
    recorder.sent(body)
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body, timeout=READ_TIMEOUT_S) as answer:
            if answer.status_code != 200:
                _refuse(record, answer.status_code, (await answer.aread()).decode(), recorder)
                return record
            async for line in answer.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _take(record, json.loads(line[6:]), recorder)
                if recorder.cancel_after is not None and len(record.token_ids) >= recorder.cancel_after and not record.finish:
                    recorder.note(Kind.CANCELLED)
                    return record
        if not record.finish and not record.error:
            record.error = "the stream ended without a finish reason"
            recorder.note(Kind.FAILED, reason=record.error)
    except httpx.HTTPError as error:
        record.error = f"{type(error).__name__}: {error}"
        recorder.note(Kind.FAILED, reason=record.error)
    return record


async def complete(
    client: httpx.AsyncClient, url: str, model: str, prompt: Sequence[int], recorder: Recorder | None = None, **parameters: Any
) -> StreamRecord:
    """The same request, answered in one piece; its tokens all have the time of the answer."""
    record, recorder = StreamRecord(prompt), recorder or Recorder()
    body = {"model": model, "prompt": list(prompt), "return_token_ids": True, **parameters}
    recorder.sent(body)
    try:
        answer = await client.post(f"{url}/v1/completions", json=body, timeout=READ_TIMEOUT_S)
        if answer.status_code == 200:
            _take(record, answer.json(), recorder)
        else:
            _refuse(record, answer.status_code, answer.text, recorder)
    except httpx.HTTPError as error:
        record.error = f"{type(error).__name__}: {error}"
        recorder.note(Kind.FAILED, reason=record.error)
    return record


def _refuse(record: StreamRecord, status: int, text: str, recorder: Recorder) -> None:
    """An error status: too many requests, or nobody who could serve them, is a refusal, all else a failure."""
    record.error = f"HTTP {status}: {text}"
    recorder.note(Kind.REFUSED if status in (429, 503) else Kind.FAILED, reason=record.error)


def _take(record: StreamRecord, chunk: dict[str, Any], recorder: Recorder) -> None:
    now = time.monotonic()
    if "error" in chunk:
        record.error = str(chunk["error"].get("message", chunk["error"]))
        recorder.note(Kind.FAILED, now, reason=record.error)
        return
    for choice in chunk["choices"]:
        ids, text = choice.get("token_ids") or [], choice.get("text") or ""
        record.token_ids += ids
        record.times += [now] * len(ids)
        record.text += text
        if ids or text:
            recorder.note(Kind.TOKENS, now, token_ids=tuple(ids), text=text)
        if choice.get("finish_reason"):
            record.finish = choice["finish_reason"]
            recorder.note(Kind.FINISHED, now, reason=record.finish)


async def stream_all(
    url: str, model: str, prompts: Sequence[Sequence[int]], history: History | None = None, reference: bool = False, **parameters: Any
) -> list[StreamRecord]:
    """All prompts at once, one stream each, noted in `history`."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, trust_env=False) as client:
        return await asyncio.gather(
            *(stream_completion(client, url, model, prompt, Recorder(history, reference=reference), **parameters) for prompt in prompts)
        )
