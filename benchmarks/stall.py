"""What a client sees of a death: from `kill -9` of a random rank to the client's next token, for every stream of a busy server.

Every expert has a replica on another rank, so no bytes have to move. A fresh server per kill. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from elastic_ep.testing.client import StreamRecord, stream_completion
from elastic_ep.testing.server import ServerProcess

EP_SIZE, NUM_STREAMS, NUM_TOKENS = 4, 16, 80
ALLOWANCE_MS = 250.0


def prompts(rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(32, 127) for _ in range(rng.randint(8, 96))] for _ in range(NUM_STREAMS)]


async def one_kill(server: ServerProcess, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    parameters = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), trust_env=False) as client:
        model = server.facts["model"]
        streams = [asyncio.create_task(stream_completion(client, server.url, model, prompt, **parameters)) for prompt in prompts(rng)]
        goal = rng.uniform(0.4, 0.7) * NUM_STREAMS * NUM_TOKENS
        while (await asyncio.to_thread(server.status))["tokens_committed"] < goal:
            await asyncio.sleep(0.02)
        victim = rng.randrange(EP_SIZE)
        pid = server.rank_pid(victim)
        homes = await asyncio.to_thread(server.status)
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        records: list[StreamRecord] = await asyncio.gather(*streams)
    assert not any(record.error for record in records), [record.error for record in records]
    moved = homes["ranks"][victim]["running_requests"]
    stalls = [min((t - killed) * 1e3 for t in record.times if t > killed) for record in records if record.times[-1] > killed]
    steady = [b - a for r in records for a, b in zip(r.times, r.times[1:], strict=False) if b < killed and len(r.times) > 1]
    recovery = server.status()["recoveries"][0]
    return {"stalls_ms": stalls, "steady_ms": float(np.median(steady)) * 1e3, "moved": moved, "recovery": recovery}


def main() -> None:
    from elastic_ep.models.demo_checkpoint import ensure_demo_checkpoint

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("serve_arguments", nargs="*", help="passed on to `elastic-ep serve`, after --")
    args = parser.parse_args()
    checkpoint = ensure_demo_checkpoint(Path.home() / ".cache" / "elastic-ep" / "demo-checkpoint-1")
    rows = []
    for seed in range(args.kills):
        with ServerProcess(checkpoint, "--ep-size", str(EP_SIZE), "--num-redundant-experts", "24", *args.serve_arguments) as server:
            rows.append(asyncio.run(one_kill(server, seed)))
    stalls = [ms for row in rows for ms in row["stalls_ms"]]
    steady = float(np.median([row["steady_ms"] for row in rows]))
    p50, p95 = np.percentile(stalls, [50, 95])
    aim = 2 * steady + ALLOWANCE_MS
    recorded = {key: float(np.median([row["recovery"][key] for row in rows])) for key in rows[0]["recovery"] if key.endswith("_ms")}
    result = {"kills": len(rows), "steady_ms": steady, "p50_ms": p50, "p95_ms": p95, "max_ms": max(stalls), "aim_ms": aim}
    result["recorded"] = recorded
    if args.json:
        print(json.dumps(result))
        return
    print(f"{len(rows)} kills under {NUM_STREAMS} streams: steady step {steady:.0f} ms")
    print(f"kill to next token: p50 {p50:.0f} ms, p95 {p95:.0f} ms, max {max(stalls):.0f} ms")
    print(f"aim for p95 (two steps + {ALLOWANCE_MS:.0f} ms): {aim:.0f} ms")
    print("recorded phases, medians: " + ", ".join(f"{key.removesuffix('_ms')} {value:.1f}" for key, value in recorded.items()))


if __name__ == "__main__":
    main()
