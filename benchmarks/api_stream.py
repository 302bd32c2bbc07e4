"""What the API layer costs per streamed token: CPU of the serving process, beside an application that only sends prepared bytes.

The peer is the floor: the same server, one event per token, no JSON, no text. Both send the same number of events to the same
client process over loopback, in turns; medians are compared.

    python benchmarks/api_stream.py [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import uvicorn
import uvloop

from elastic_ep.serving.api.app import create_app
from elastic_ep.serving.metrics import Metrics
from tests.serving.fakes import FakeBackend, text_tokenizer

TOKENS = 2000
STREAMS = 8
REPEATS = 5
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "token_ids": {"return_token_ids": True},
    "logprobs=5": {"logprobs": 5},
    "2 stop strings": {"stop": ["zzz", "hello world q"]},
    "n=4": {"n": 4, "max_tokens": TOKENS // 4},
}


async def floor_app(scope: Any, receive: Any, send: Any) -> None:
    """Sends TOKENS prepared events to whatever is asked."""
    if scope["type"] != "http":
        return
    event = b"data: " + b"x" * 150 + b"\n\n"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for i in range(TOKENS):
        if i % 7 == 0:
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[int]:
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False, lifespan="off")
    sockets = [config.bind_socket()]
    sockets[0].listen()
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=sockets))
    try:
        yield sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def measure(port: int, body: dict[str, Any]) -> float:
    """CPU microseconds of this process per event that the client counted."""
    arguments = (sys.executable, __file__, "--client", str(port), json.dumps(body))
    started = time.process_time()
    client = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
    out, _ = await client.communicate()
    return (time.process_time() - started) / int(out) * 1e6


async def client(port: int, body: str) -> None:
    """Reads STREAMS streams and prints how many events came."""

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())
        count = 0
        while part := await reader.read(1 << 16):
            count += part.count(b"data: ")
        writer.close()
        return count

    print(sum(await asyncio.gather(*[one() for _ in range(STREAMS)])))


async def main(as_json: bool) -> None:
    base = {"prompt": "hello world the quick brown fox", "max_tokens": TOKENS, "stream": True}
    app = create_app(FakeBackend(max_model_len=10**6), text_tokenizer(), Metrics())
    times: dict[str, list[float]] = {name: [] for name in ("floor", *CASES)}
    async with served(app) as port, served(floor_app) as floor_port:
        for _ in range(REPEATS):
            times["floor"].append(await measure(floor_port, {}))
            for name, extra in CASES.items():
                times[name].append(await measure(port, {**base, **extra}))
    medians = {name: round(statistics.median(values), 1) for name, values in times.items()}
    result = {name: {"cpu_us_per_token": medians[name], "above_floor_us": round(medians[name] - medians["floor"], 1)} for name in medians}
    if as_json:
        print(json.dumps(result))
        return
    for name, row in result.items():
        print(f"{name:>15}: {row['cpu_us_per_token']:6.1f} us CPU per token, {row['above_floor_us']:6.1f} above the floor")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--client", nargs=2, metavar=("PORT", "BODY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        asyncio.run(client(int(options.client[0]), options.client[1]))
    else:
        uvloop.run(main(options.json))
