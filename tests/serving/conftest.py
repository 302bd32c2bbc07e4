"""An application over a scripted backend: in process for most tests, behind a real server on loopback for those about connections."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn

from elastic_ep.serving.api.app import create_app
from elastic_ep.serving.metrics import Metrics
from elastic_ep.serving.text import TextTokenizer, Tokenizer
from tests.serving.fakes import FakeBackend, text_tokenizer

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
DEADLINE_S = 10


@dataclass
class Api:
    """The application in this process; each call runs on an event loop of its own."""

    backend: FakeBackend
    tokenizer: Tokenizer
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.app = create_app(self.backend, self.tokenizer, self.metrics)

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await asyncio.wait_for(client.request(method, path, **kwargs), DEADLINE_S)

        return asyncio.run(go())

    def get(self, path: str) -> httpx.Response:
        return self.request("GET", path)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer of a request that must succeed."""
        response = self.request("POST", path, json=body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/json"
        return response.json()

    def complete(self, **body: Any) -> dict[str, Any]:
        return self.post(COMPLETIONS, **body)

    def chat(self, **body: Any) -> dict[str, Any]:
        return self.post(CHAT, messages=[{"role": "user", "content": "hello"}], **body)

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream that must end with [DONE], without it."""
        response = self.request("POST", path, json={"stream": True, **body})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all(event.startswith("data: ") and "\n" not in event for event in events[:-1])
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def refused(self, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
        """The error of a request that must be refused with one line."""
        return refusal(self.request("POST", path, json=body), status)


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 300
    return body["error"]


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return text_tokenizer()


@pytest.fixture
def api(tokenizer: TextTokenizer) -> Api:
    return Api(FakeBackend(), tokenizer)


@asynccontextmanager
async def serving(backend: FakeBackend, tokenizer: Tokenizer, metrics: Metrics | None = None) -> AsyncIterator[str]:
    """A real server on loopback in this event loop; yields its address."""
    app = create_app(backend, tokenizer, metrics or Metrics())
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    sockets = [config.bind_socket()]
    sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # so that a reader's slowness is soon felt
    sockets[0].listen()  # connections made before the server is up wait for it
    port = sockets[0].getsockname()[1]
    task = asyncio.create_task(server.serve(sockets=sockets))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


def run_live(test: Callable[[FakeBackend, str], Any], backend: FakeBackend, tokenizer: Tokenizer, metrics: Metrics | None = None) -> None:
    """Runs an async test against a real server."""

    async def go() -> None:
        async with serving(backend, tokenizer, metrics) as url:
            await asyncio.wait_for(test(backend, url), DEADLINE_S)

    asyncio.run(go())
