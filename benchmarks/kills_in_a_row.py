"""Kill a rank, wait until redundancy is whole again, kill the next: 50 times under load. What clients got is compared with a quiet run;
memory and descriptors of the controller and the ranks are noted after each round.

Every expert has a replica. A tiny checkpoint, so that the time goes into recoveries. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from elastic_ep.testing.chaos import Sample, resources, take_sample
from elastic_ep.testing.client import stream_all
from elastic_ep.testing.history import History, judge
from elastic_ep.testing.server import ServerProcess

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.checkpoints import config_of, save_checkpoint

EP_SIZE, NUM_STREAMS, NUM_TOKENS = 4, 8, 60


def prompts(rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(160) for _ in range(rng.randint(1, 40))] for _ in range(NUM_STREAMS)]


def is_whole(status: dict[str, Any]) -> bool:
    return sum(status["active_ranks"]) == EP_SIZE and status["survives"]["any_ranks"] >= 1 and status["phase"] == "serving"


async def rounds(server: ServerProcess, kills: int, rng: random.Random, history: History, samples: list[Sample]) -> list[float]:
    """Seconds from each kill until redundancy was whole."""
    asked = prompts(rng)
    parameters = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    await stream_all(server.url, server.facts["model"], asked, history, reference=True, **parameters)
    stop = asyncio.Event()

    async def load() -> None:
        while not stop.is_set():
            await stream_all(server.url, server.facts["model"], asked, history, **parameters)

    loads = asyncio.create_task(load())
    began, waits = time.monotonic(), []
    for number in range(kills):
        rank = rng.randrange(EP_SIZE)
        before = (await asyncio.to_thread(server.status))["ranks"][rank]["incarnation"]
        killed = time.monotonic()
        await asyncio.to_thread(server.signal_rank, rank)

        def restored(status: dict[str, Any], rank: int = rank, before: int = before) -> bool:
            return is_whole(status) and status["ranks"][rank]["incarnation"] > before

        status = await asyncio.to_thread(server.wait_status, restored, 60.0)
        waits.append(time.monotonic() - killed)
        sample = take_sample(status, time.monotonic() - began)
        if sample is not None:
            samples.append(sample)
        if number % 10 == 9:
            print(f"{number + 1} kills", file=sys.stderr, flush=True)
    stop.set()
    await loads
    return waits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--host-backup", choices=["off", "experts"], default="experts")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    history, samples, rng = History(), list[Sample](), random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of("qwen3_moe")
        checkpoint = save_checkpoint(Path(folder) / "tiny", config)
        arguments = ("--ep-size", str(EP_SIZE), "--num-redundant-experts", str(config.num_experts), "--host-backup", args.host_backup)
        with ServerProcess(checkpoint, *arguments) as server:
            waits = asyncio.run(rounds(server, args.kills, rng, history, samples))
            failed = server.status()["requests"]["failed"]
    verdict = judge(history.events)
    result = {
        "kills": args.kills,
        "seed": args.seed,
        "verdict": verdict.as_json(),
        "failed_requests": failed,
        "restored_s": {"median": sorted(waits)[len(waits) // 2], "max": max(waits)},
        "resources": resources(samples),
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{args.kills} kills: {verdict.checked} streams compared, {len(verdict.violations)} violations, {failed} failed requests")
        print(f"redundancy whole again after {result['restored_s']['median']:.2f} s (median), {max(waits):.2f} s at most")
        for name, figures in result["resources"].items():
            print(f"  {name}: " + ", ".join(f"{key} {value:,.1f}" for key, value in figures.items()))
    return int(bool(verdict.violations or failed))


if __name__ == "__main__":
    sys.exit(main())
