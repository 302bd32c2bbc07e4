"""How soon a dead or stopped rank is known: the real controller, launcher and processes, with ranks that carry no model.

Each fault is sent at a random moment under load; the time from the signal to the controller's knowing is measured. `heartbeat alone`
hides the process from the controller, as that of another host is. `--overload-minutes M` runs a server with 5 busy processes per core
and counts deaths that were none. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from elastic_ep.brain.events import FailureCause, GenerationRequest
from elastic_ep.brain.messages import SamplingParams
from elastic_ep.runtime.launch.launcher import ProcessEvent
from elastic_ep.serving.config import ServeConfig

sys.path.insert(0, str(Path(__file__).parent))
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # the launcher's processes import the stubs, too
from stub_ranks import StubProcessController, StubRanks, spec

RANKS = 41
KV_TOKENS = 1 << 20
AIMS_MS = {"SIGKILL": 10.0, "SIGSTOP": 50.0, "heartbeat alone": 1000.0}
BUSY_PER_CORE = 5


class FarRanks(StubRanks):
    def _on_event(self, event: ProcessEvent) -> None:
        if event.kind == "spawned":
            super()._on_event(event)


class RemoteController(StubProcessController):
    """As if the ranks ran on another host: no process to look at, no news from a launcher."""

    ranks_class = FarRanks

    def _probe(self, rank: int, incarnation: int) -> None:
        self._fail(rank, incarnation, FailureCause.HEARTBEAT, "silent")


async def faults(controller_class: type[StubProcessController], number: signal.Signals, count: int, seed: int) -> list[float]:
    """Milliseconds from signal to detection, one per fault."""
    rng = random.Random(seed)
    config = ServeConfig("stub", RANKS, num_redundant_experts=RANKS, kv_tokens=KV_TOKENS, restart="never")
    async with controller_class(config, spec(2 * RANKS)) as controller:
        await controller.wait_serving()
        found: dict[int, float] = {}
        publish = controller.eventlog.publish

        def note(kind: str, data: dict[str, Any]) -> None:
            if kind == "rank_failed":
                found[data["rank"]] = time.monotonic()
            publish(kind, data)

        controller.eventlog.publish = note  # type: ignore[method-assign]
        streams = [asyncio.create_task(consume(controller, i)) for i in range(RANKS)]
        delays = []
        for rank in rng.sample(range(RANKS), count):
            await asyncio.sleep(rng.uniform(0.02, 0.06))
            pid = controller.status()["ranks"][rank]["pid"]
            sent = time.monotonic()
            os.kill(pid, number)
            while rank not in found:
                await asyncio.sleep(0.002)
            delays.append((found[rank] - sent) * 1e3)
        for task in streams:
            task.cancel()
        controller.stopped.set()
    return delays


async def consume(controller: StubProcessController, i: int) -> None:
    async for _ in controller.submit(GenerationRequest(f"r{i}", tuple(range(8)), 1 << 19, SamplingParams(temperature=0.0))):
        pass


def burn() -> None:
    while True:
        pass


async def overload(minutes: float) -> dict[str, Any]:
    """Every core busy fivefold: deaths counted that were none."""
    cores = os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    busy = [spawn.Process(target=burn, daemon=True) for _ in range(BUSY_PER_CORE * cores)]
    for process in busy:
        process.start()
    try:
        config = ServeConfig("stub", 8, num_redundant_experts=8, kv_tokens=KV_TOKENS, restart="never")
        async with StubProcessController(config, spec(16)) as controller:
            await controller.wait_serving()
            streams = [asyncio.create_task(consume(controller, i)) for i in range(8)]
            await asyncio.sleep(minutes * 60)
            status = controller.status()
            for task in streams:
                task.cancel()
            controller.stopped.set()
    finally:
        for process in busy:
            process.kill()
            process.join()
    return {"minutes": minutes, "busy_processes": len(busy), "false_deaths": len(status["recoveries"]), "steps": status["steps"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help=f"servers per fault, {RANKS - 1} faults each (8 for heartbeat alone)")
    parser.add_argument("--overload-minutes", type=float, default=0.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cases = {
        "SIGKILL": (StubProcessController, signal.SIGKILL, RANKS - 1),
        "SIGSTOP": (StubProcessController, signal.SIGSTOP, RANKS - 1),
        "heartbeat alone": (RemoteController, signal.SIGSTOP, 8),
    }
    result: dict[str, Any] = {}
    for name, (controller_class, number, count) in cases.items():
        delays = [ms for i in range(args.rounds) for ms in uvloop.run(faults(controller_class, number, count, seed=i))]
        p50, p99 = np.percentile(delays, [50, 99])
        result[name] = {"faults": len(delays), "p50_ms": float(p50), "p99_ms": float(p99), "max_ms": max(delays), "aim_ms": AIMS_MS[name]}
    if args.overload_minutes:
        result["overload"] = uvloop.run(overload(args.overload_minutes))
    if args.json:
        print(json.dumps(result))
        return
    print(f"{'fault':16} {'count':>6} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8} {'aim (p99)':>10}")
    for name in cases:
        row = result[name]
        print(f"{name:16} {row['faults']:6} {row['p50_ms']:8.2f} {row['p99_ms']:8.2f} {row['max_ms']:8.2f} {row['aim_ms']:10.0f}")
    if "overload" in result:
        row = result["overload"]
        busy = f"{row['busy_processes']} busy processes, {row['steps']} steps"
        print(f"overload: {row['false_deaths']} false deaths in {row['minutes']:g} minutes beside {busy}")


if __name__ == "__main__":
    main()
