"""A streaming client that notes every token and when it came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

READ_TIMEOUT_S = 120.0


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


async def stream_completion(client: httpx.AsyncClient, url: str, model: str, prompt: Sequence[int], **parameters: Any) -> StreamRecord:
    """POST /v1/completions with `stream`, token ids in and out. Never raises for what the server does: `error` says it."""
    record = StreamRecord(prompt)
    body = {"model": model, "prompt": list(prompt), "stream": True, "return_token_ids": True, **parameters}
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body, timeout=READ_TIMEOUT_S) as answer:
            if answer.status_code != 200:
                record.error = f"HTTP {answer.status_code}: {(await answer.aread()).decode()}"
                return record
            async for line in answer.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _take(record, json.loads(line[6:]))
    except httpx.HTTPError as error:
        record.error = f"{type(error).__name__}: {error}"
    return record


def _take(record: StreamRecord, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        record.error = str(chunk["error"].get("message", chunk["error"]))
        return
    for choice in chunk["choices"]:
        ids = choice.get("token_ids") or []
        record.token_ids += ids
        record.times += [time.monotonic()] * len(ids)
        record.text += choice.get("text") or ""
        record.finish = choice.get("finish_reason") or record.finish


async def stream_all(url: str, model: str, prompts: Sequence[Sequence[int]], **parameters: Any) -> list[StreamRecord]:
    """All prompts at once, one stream each."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, trust_env=False) as client:
        return await asyncio.gather(*(stream_completion(client, url, model, prompt, **parameters) for prompt in prompts))
