"""Streams over real connections: what the openai client makes of them, and what happens when a client goes away."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from elastic_ep.brain.events import GenerationRequest
from elastic_ep.serving.backend import QueueFull
from elastic_ep.serving.metrics import Metrics
from elastic_ep.serving.text import TextTokenizer
from tests.serving.conftest import CHAT, COMPLETIONS, Api, run_live
from tests.serving.fakes import FakeBackend

TEXT = "hello 你好 🎉☃ the quick brown fox"


def says(tokenizer: TextTokenizer, text: str) -> Any:
    return lambda request: [*tokenizer.encode(text), *tokenizer.eos_ids, *([5] * 100)]


def client_of(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


# ---- what is streamed


def test_one_event_per_token(api: Api, tokenizer: TextTokenizer) -> None:
    api.backend.answer = says(tokenizer, TEXT)
    events = api.stream(COMPLETIONS, prompt="x", max_tokens=100, return_token_ids=True, stream_options={"include_usage": True})
    *parts, usage = events
    ids = [*tokenizer.encode(TEXT), *tokenizer.eos_ids]
    assert [e["choices"][0]["token_ids"] for e in parts] == [[i] for i in ids]
    assert "".join(e["choices"][0]["text"] for e in parts) == TEXT
    assert all("\ufffd" not in e["choices"][0]["text"] for e in parts)
    assert [e["choices"][0]["finish_reason"] for e in parts] == [None] * (len(ids) - 1) + ["stop"]
    assert parts[0]["choices"][0]["prompt_token_ids"] == tokenizer.encode("x")
    assert all("prompt_token_ids" not in e["choices"][0] for e in parts[1:])
    assert all(e["usage"] is None for e in parts)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(ids)


def test_no_usage_unless_asked(api: Api) -> None:
    events = api.stream(COMPLETIONS, prompt="x", max_tokens=2)
    assert len(events) == 2
    assert all("usage" not in e for e in events)


def test_text_that_may_become_a_stop_string_is_held_back(api: Api, tokenizer: TextTokenizer) -> None:
    api.backend.answer = says(tokenizer, "hello world, hello fox")
    texts = [e["choices"][0]["text"] for e in api.stream(COMPLETIONS, prompt="x", max_tokens=50, stop=["o foz", "fox"])]
    assert "".join(texts) == "hello world, hello "
    assert "hello" not in texts  # its last letter waits for what follows
    assert api.backend.cancelled


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_streamed_equals_whole(tokenizer: TextTokenizer, path: str) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    prompt: dict[str, Any] = {"prompt": "x"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
    for _ in range(20):
        ids = [rng.randrange(1, 320) for _ in range(60)]

        def answer(request: GenerationRequest, ids: list[int] = ids) -> list[int]:
            return ids[int(request.request_id.rsplit("-")[-1]) :] + ids

        api = Api(FakeBackend(answer=answer), tokenizer)
        stop = [chr(rng.randrange(97, 123)) for _ in range(2)]
        body = {**prompt, "n": 3, "max_tokens": 20, "stop": stop, "return_token_ids": True}
        whole = api.post(path, **body)["choices"]
        events = [e["choices"][0] for e in api.stream(path, **body)]
        for choice in whole:
            parts = [e for e in events if e["index"] == choice["index"]]
            text = "".join(p["text"] if path == COMPLETIONS else p["delta"]["content"] for p in parts)
            assert text == (choice["text"] if path == COMPLETIONS else choice["message"]["content"])
            assert [t for p in parts for t in p.get("token_ids", [])] == choice["token_ids"]
            assert parts[-1]["finish_reason"] == choice["finish_reason"]


# ---- the openai client


def test_openai_client(tokenizer: TextTokenizer) -> None:
    async def test(backend: FakeBackend, url: str) -> None:
        async with client_of(url) as client:
            assert [m.id for m in (await client.models.list()).data] == ["tiny"]
            assert (await client.models.retrieve("tiny")).id == "tiny"
            completion = await client.completions.create(model="tiny", prompt="x", max_tokens=50, logprobs=2)
            assert completion.choices[0].text == TEXT
            stream = await client.completions.create(
                model="tiny", prompt="x", max_tokens=50, stream=True, extra_body={"return_token_ids": True}
            )
            text, ids = "", []
            async for part in stream:
                text += part.choices[0].text
                ids += part.choices[0].token_ids  # type: ignore[attr-defined]
            assert (text, ids) == (TEXT, [*tokenizer.encode(TEXT), *tokenizer.eos_ids])
            messages: Any = [{"role": "user", "content": "hi"}]
            chat = await client.chat.completions.create(model="tiny", messages=messages, logprobs=True, top_logprobs=2)
            assert chat.choices[0].message.content == TEXT
            assert chat.choices[0].logprobs is not None
            again: Any = [*messages, chat.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
            parts = await client.chat.completions.create(model="tiny", messages=again, stream=True, stream_options={"include_usage": True})
            received = [part async for part in parts]
            assert "".join(p.choices[0].delta.content or "" for p in received[:-1]) == TEXT
            assert received[-1].usage is not None

    run_live(test, FakeBackend(answer=says(tokenizer, TEXT)), tokenizer)


def test_openai_client_sees_errors_as_its_own(tokenizer: TextTokenizer) -> None:
    async def test(backend: FakeBackend, url: str) -> None:
        async with client_of(url) as client:
            with pytest.raises(openai.NotFoundError, match="not served here"):
                await client.completions.create(model="other", prompt="x")
            with pytest.raises(openai.BadRequestError, match="temperature must be at most 2") as info:
                await client.completions.create(model="tiny", prompt="x", temperature=3)
            assert info.value.param == "temperature"
            backend.refuse = QueueFull("full")
            with pytest.raises(openai.RateLimitError, match="full"):
                await client.completions.create(model="tiny", prompt="x")

    run_live(test, FakeBackend(), tokenizer)


def test_many_streams_at_once(tokenizer: TextTokenizer) -> None:
    async def test(backend: FakeBackend, url: str) -> None:
        async def one(client: AsyncOpenAI, i: int) -> list[int]:
            stream = await client.completions.create(
                model="tiny", prompt=[i, i + 1], max_tokens=40, stream=True, extra_body={"return_token_ids": True}
            )
            return [t async for part in stream for t in part.choices[0].token_ids]  # type: ignore[attr-defined]

        async with client_of(url) as client:
            answers = await asyncio.gather(*[one(client, i) for i in range(1, 33)])
        assert answers == [[i, i + 1] * 20 for i in range(1, 33)]

    run_live(test, FakeBackend(), tokenizer)


# ---- clients that go away


async def post(url: str, path: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps(body).encode()
    writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), len(content), content))
    await writer.drain()
    return reader, writer


async def leave(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("tokens_before", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_cancels(tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture, stream: bool, tokens_before: int, n: int) -> None:
    metrics = Metrics()

    async def test(backend: FakeBackend, url: str) -> None:
        backend.gate = asyncio.Semaphore(tokens_before * n)
        reader, writer = await post(url, COMPLETIONS, {"prompt": "hello", "max_tokens": 50, "stream": stream, "n": n})
        if stream and tokens_before:
            await reader.readuntil(b"data: ")
        while len(backend.requests) < n:
            await asyncio.sleep(0.001)  # polls for an observable state; nothing hangs on its length
        await leave(writer)
        while len(backend.cancelled) < n:
            await backend.cancel_seen.wait()
            backend.cancel_seen.clear()
        assert sorted(backend.cancelled) == sorted(r.request_id for r in backend.requests)

    run_live(test, FakeBackend(), tokenizer, metrics)
    assert f"elastic_ep_request_cancelled_total {n}.0" in metrics.render().decode()
    assert caplog.records == []


def test_a_client_that_leaves_within_its_request(tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    async def test(backend: FakeBackend, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"prompt"')
        await writer.drain()
        await leave(writer)
        async with client_of(url) as client:
            await client.completions.create(model="tiny", prompt="hello", max_tokens=2)
        assert len(backend.requests) == 1

    run_live(test, FakeBackend(), tokenizer)
    assert [r for r in caplog.records if r.name != "httpx"] == []


@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_does_not_read_holds_its_stream_back_and_can_leave(tokenizer: TextTokenizer, n: int) -> None:
    async def test(backend: FakeBackend, url: str) -> None:
        _, writer = await post(url, COMPLETIONS, {"prompt": "hello", "max_tokens": 10**5, "stream": True, "n": n})
        while not backend.streams or not backend.streams[0].position:
            await asyncio.sleep(0.001)
        stream = backend.streams[0]
        quiet_turns, last = 0, -1
        while quiet_turns < 200:  # turns of the loop in which the server could have gone on
            quiet_turns, last = (quiet_turns + 1 if stream.position == last else 0), stream.position
            await asyncio.sleep(0)
        assert stream.position < 10**5
        await leave(writer)
        await backend.cancel_seen.wait()

    run_live(test, FakeBackend(max_model_len=2 * 10**5, answer=lambda request: [5] * request.max_tokens), tokenizer)


def test_a_request_after_a_cancelled_one_on_the_same_server(tokenizer: TextTokenizer) -> None:
    async def test(backend: FakeBackend, url: str) -> None:
        backend.gate = asyncio.Semaphore(0)
        _, writer = await post(url, COMPLETIONS, {"prompt": "hello", "stream": True})
        while not backend.requests:
            await asyncio.sleep(0.001)
        await leave(writer)
        await backend.cancel_seen.wait()
        backend.gate = None
        async with client_of(url) as client:
            assert (await client.completions.create(model="tiny", prompt="hello", max_tokens=2)).choices[0].text == "hellohello"

    run_live(test, FakeBackend(), tokenizer)
