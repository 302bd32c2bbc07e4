"""What a server tells about itself."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastic_ep.serving.api import server_routes
from elastic_ep.serving.text import TextTokenizer
from tests.serving.conftest import Api, refusal, run_live
from tests.serving.fakes import FakeBackend


def test_models(api: Api) -> None:
    (card,) = api.get("/v1/models").json()["data"]
    assert card == {"id": "tiny", "object": "model", "created": card["created"], "owned_by": "elastic-ep", "max_model_len": 256}
    assert api.get("/v1/models/tiny").json() == card
    assert refusal(api.get("/v1/models/org/other"), 404)["message"] == 'model "org/other" is not served here; use "tiny"'


def test_health(api: Api) -> None:
    response = api.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok", "detail": "serving"})
    api.backend.healthy = (False, "ranks are loading")
    assert refusal(api.get("/health"), 503)["message"] == "ranks are loading"


def test_status_is_the_backends(api: Api) -> None:
    assert api.get("/elastic/status").json() == api.backend.status()


def test_metrics(api: Api) -> None:
    api.complete(prompt="hello", max_tokens=3)
    api.refused("/v1/completions", prompt=5)
    response = api.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = {(s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(response.text) for s in f.samples}
    assert samples["elastic_ep_request_success_total", "length"] == 1
    assert samples["elastic_ep_request_rejected_total", "400"] == 1
    assert samples["elastic_ep_time_to_first_token_seconds_count",] == 1
    assert samples["elastic_ep_inter_token_latency_seconds_count",] == 2
    assert samples["elastic_ep_prompt_tokens_total",] == 1
    assert (samples["elastic_ep_num_requests_running",], samples["elastic_ep_num_requests_waiting",]) == (2, 3)
    assert (samples["elastic_ep_epoch",], samples["elastic_ep_ep_size",], samples["elastic_ep_active_ranks",]) == (2, 2, 1)
    assert samples["elastic_ep_generation_tokens_total",] == 7


async def next_line(lines: Any) -> str:
    return await anext(line async for line in lines if line)


def test_events(tokenizer: TextTokenizer) -> None:
    async def test(backend: FakeBackend, url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as client, client.stream("GET", "/elastic/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.aiter_lines()
            assert await next_line(lines) == ": connected"
            for event in ({"event": "rank_failed", "rank": 1}, {"event": "recovery", "what": "a\nb"}):
                backend.event_log.put_nowait(event)
                assert json.loads((await next_line(lines)).removeprefix("data: ")) == event
        await backend.unsubscribed.wait()

    run_live(test, FakeBackend(), tokenizer)


def test_events_end_with_the_server(api: Api) -> None:
    api.backend.event_log.put_nowait({"event": "stopping"})
    api.backend.event_log.put_nowait(None)
    assert api.get("/elastic/events").text == ': connected\n\ndata: {"event":"stopping"}\n\n'
    assert api.backend.unsubscribed.is_set()


def test_silence_is_kept_alive(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_routes, "KEEP_ALIVE_S", 0.01)

    async def test(backend: FakeBackend, url: str) -> None:
        async with httpx.AsyncClient(base_url=url) as client, client.stream("GET", "/elastic/events") as response:
            lines = response.aiter_lines()
            assert [await next_line(lines) for _ in range(3)] == [": connected", ": keep-alive", ": keep-alive"]
            backend.event_log.put_nowait({"event": "x"})
            while (line := await next_line(lines)) == ": keep-alive":
                await asyncio.sleep(0)
            assert line == 'data: {"event":"x"}'

    run_live(test, FakeBackend(), tokenizer)
