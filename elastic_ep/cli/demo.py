"""`elastic-ep demo`: a server, sixteen streams, three dead ranks, and the proof that no client noticed."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from elastic_ep.cli.demo_prompts import PROMPTS, encoded_prompts

if TYPE_CHECKING:
    from elastic_ep.testing.client import StreamRecord
    from elastic_ep.testing.history import History, Verdict
    from elastic_ep.testing.server import ServerProcess

CHECKPOINT = Path(__file__).parents[1] / "assets" / "demo_model"
"""comes with the package; training/ says how it was made"""
NUM_REQUESTS = len(PROMPTS)
NUM_TOKENS = 64
EP_SIZE = 4
NUM_REDUNDANT_EXPERTS = 12
POLL_S = 0.05


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="kill ranks of a live server and watch the streams go on",
        description="Serves the small model that comes with the package (8 layers of 32 experts, trained on the Python standard library) "
        f"with {EP_SIZE} ranks, streams {NUM_REQUESTS} requests without faults, then the same requests while two ranks are killed, one of "
        "them during the first recovery, and a third is stopped. Exit status 1 if any client lost, doubled or changed a token.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    from elastic_ep.cli.demo_view import DemoView

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends, too
    with DemoView(quiet=args.json) as view:
        view.say(f"checkpoint: {CHECKPOINT}")
        outcome = asyncio.run(_demo(CHECKPOINT, view))
    report = outcome.report()
    print(json.dumps(report)) if args.json else view.summary(report, outcome.longest_stalled())
    return 1 if outcome.verdict.violations or report["failed_requests"] else 0


@dataclass
class Outcome:
    """Both runs of the same requests, what the judge says of them, and what the server recorded."""

    verdict: Verdict
    fault_free: list[StreamRecord]
    faulty: list[StreamRecord]
    recoveries: list[dict[str, Any]]

    def longest_stalled(self) -> tuple[str, str]:
        """(prompt, text) of the stream that waited longest while ranks died."""
        waits = [max(record.gaps_s, default=0.0) for record in self.faulty]
        index = waits.index(max(waits))
        return PROMPTS[index], self.faulty[index].text

    def report(self) -> dict[str, Any]:
        """The object that `--json` prints. A token is lost or doubled if a stream has fewer or more than the fault-free one."""
        pairs = list(zip(self.fault_free, self.faulty, strict=True))
        return {
            "requests": len(pairs),
            "tokens_expected": sum(len(a.token_ids) for a, _ in pairs),
            "tokens_received": sum(len(b.token_ids) for _, b in pairs),
            "lost_tokens": sum(max(0, len(a.token_ids) - len(b.token_ids)) for a, b in pairs),
            "duplicated_tokens": sum(max(0, len(b.token_ids) - len(a.token_ids)) for a, b in pairs),
            "identical_to_fault_free": not self.verdict.violations,
            "violations": self.verdict.counts,
            "failed_requests": sum(bool(r.error) or r.finish != "length" for a, b in pairs for r in (a, b)),
            "steady_itl_ms": round(median(gap for record in self.fault_free for gap in record.gaps_s) * 1e3, 3),
            "longest_gap_ms": round(max(gap for record in self.faulty for gap in record.gaps_s) * 1e3, 3),
            "recoveries": self.recoveries,
        }


async def _demo(checkpoint: Path, view: Any) -> Outcome:
    from elastic_ep.testing.client import stream_all
    from elastic_ep.testing.history import History, judge
    from elastic_ep.testing.server import ServerProcess

    view.say(f"starting {EP_SIZE} ranks")
    arguments = ("--ep-size", str(EP_SIZE), "--num-redundant-experts", str(NUM_REDUNDANT_EXPERTS))
    history = History()
    with ServerProcess(checkpoint, *arguments) as server:
        facts, prompts = server.facts, encoded_prompts(checkpoint)
        view.say(f"serving {facts['slots']} slots for {facts['experts']} experts in each of {facts['layers']} layers on {facts['url']}")
        parameters: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0.7, "seed": 7, "ignore_eos": True}
        async with _watched(server, history, view):
            view.say(f"{NUM_REQUESTS} streams of {NUM_TOKENS} tokens, no faults")
            fault_free = await stream_all(server.url, facts["model"], prompts, history, True, **parameters)
            view.say("the same requests, with faults")
            faults = asyncio.create_task(_inject(server, view))
            faulty = await stream_all(server.url, facts["model"], prompts, history, **parameters)
            await faults
        return Outcome(judge(history.events), fault_free, faulty, server.status()["recoveries"])


def texts(history: History) -> list[str]:
    """What the requests sent last have got so far, at most NUM_REQUESTS of them, in the order of PROMPTS."""
    from elastic_ep.testing.history import Kind

    got: dict[str, str] = {}
    for event in history.events:
        if event.kind is Kind.SENT:
            got[event.request] = ""
        elif event.kind is Kind.TOKENS:
            got[event.request] += event.text
    return list(got.values())[-(len(got) % NUM_REQUESTS or NUM_REQUESTS) :]


@contextlib.asynccontextmanager
async def _watched(server: ServerProcess, history: History, view: Any) -> AsyncIterator[None]:
    """Shows the server's status and the streams' text again and again meanwhile."""

    async def watch() -> None:
        while True:
            view.show(await asyncio.to_thread(server.status), list(zip(PROMPTS, texts(history), strict=False)))
            await asyncio.sleep(POLL_S)

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _inject(server: ServerProcess, view: Any) -> None:
    """kill -9 rank 0 early; kill -9 rank 2 as soon as the failure of rank 0 is known; stop rank 3 later."""
    status = await asyncio.to_thread(server.status)
    pids = {rank["rank"]: rank["pid"] for rank in status["ranks"]}
    start = status["tokens_committed"]
    share = NUM_REQUESTS * NUM_TOKENS
    await _committed(server, start + share // 5)
    os.kill(pids[0], signal.SIGKILL)
    await _until(server, lambda status: bool(status["recoveries"]))
    os.kill(pids[2], signal.SIGKILL)
    view.say("kill -9 rank 0, and rank 2 while the server recovers")
    await _committed(server, start + share * 3 // 5)
    os.kill(pids[3], signal.SIGSTOP)
    view.say("kill -STOP rank 3")


async def _committed(server: ServerProcess, tokens: int) -> None:
    await _until(server, lambda status: status["tokens_committed"] >= tokens)


async def _until(server: ServerProcess, holds: Callable[[dict[str, Any]], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds(await asyncio.to_thread(server.status)) and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S / 10)
