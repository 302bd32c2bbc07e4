"""What a rebalance brings and what it costs: streams of a model with a skewed router, before and after experts move for its load.

Balance is the mean over the maximum of the ranks' expert rows, over all layers (1 is even), as the controller's records give it; the cost
is the pause of each switch and the longest gap that a client saw. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from elastic_ep.models.demo_checkpoint import ensure_demo_checkpoint
from elastic_ep.testing.client import StreamRecord, stream_all
from elastic_ep.testing.server import ServerProcess

EP_SIZE, NUM_STREAMS, INTERVAL_S = 4, 16, 6.0


def listen(url: str, events: list[dict[str, Any]]) -> None:
    """Keep what the server tells of its changes."""
    try:
        with httpx.Client(trust_env=False, timeout=None) as client, client.stream("GET", f"{url}/elastic/events") as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append({"seen": time.monotonic(), **json.loads(line[6:])})
    except httpx.HTTPError:
        pass  # the server has stopped


def measure(seconds: float) -> dict[str, Any]:
    checkpoint = ensure_demo_checkpoint(Path.home() / ".cache" / "elastic-ep" / "demo-checkpoint-1")
    arguments = ("--ep-size", str(EP_SIZE), "--num-redundant-experts", "8", "--rebalance-interval", str(INTERVAL_S))
    events: list[dict[str, Any]] = []
    with ServerProcess(checkpoint, *arguments) as server:
        threading.Thread(target=listen, args=(server.url, events), daemon=True).start()
        prompts = [[40 + i % 4] * 12 for i in range(NUM_STREAMS)]
        records: list[StreamRecord] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            records += asyncio.run(
                stream_all(server.url, server.facts["model"], prompts, max_tokens=128, temperature=0.7, seed=1, ignore_eos=True)
            )
        changes = [record for record in server.status()["recoveries"] if record["kind"] == "rebalance"]
    assert not any(record.error for record in records)
    started = [event for event in events if event["event"] == "change_started" and event["kind"] == "rebalance"]
    switched = [event["seen"] for event in events if event["event"] == "recovery" and event.get("kind") == "rebalance"]
    pairs = [(a, b) for record in records for a, b in zip(record.times, record.times[1:], strict=False)]
    around = [b - a for a, b in pairs if any(a - 0.2 <= at <= b + 0.2 for at in switched)]
    return {
        "seconds": seconds,
        "rebalances": len(started),
        "gains": [event["gain"] for event in started],
        "experts_moved": [event["loads"] for event in started],
        "skipped": [event["gain"] for event in events if event["event"] == "rebalance_skipped"],
        "switch_ms": [record["move_ms"] for record in changes],
        "rank_switch_ms": [record["rank_move_ms"] for record in changes],
        "longest_gap_at_a_switch_ms": max(around, default=0.0) * 1e3,
        "p99_gap_ms": float(np.percentile([b - a for a, b in pairs], 99)) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.seconds)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
