"""Ranks on GPUs: throughput beside transformers, what a death costs with and without replicas, what a rejoin costs.

python benchmarks/gpu_serving.py [--shape qwen3-30b-a3b] [--layers N] [--ranks N] [--parts one-graphs,transformers,replicas,lost] [--json]

Ranks take the GPUs that there are by turns. Those that share one do so through NVIDIA's multi-process service, which is started here if the
machine has it (`--share slices`: as the driver shares a GPU by default, one process after the other; also where each has its own).

The checkpoint is random and written to `folder` first: 1.3 GB for each layer of qwen3-30b-a3b, as many as two copies of the experts leave
room for on the GPU. The host needs the room twice in the parts lost and rejoin, which have a backup, too. Streams are greedy; what every
client got is compared with an undisturbed run.
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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_checkpoints import SHAPES, config_of, write
from gpu_dispatch import multi_process_service

from elastic_ep.models.spec import ModelSpec, inspect_checkpoint
from elastic_ep.testing.client import StreamRecord, stream_all
from elastic_ep.testing.server import ServerProcess

ALONE = ("one", "one-graphs", "one-fast", "transformers")
"""parts with one process on the GPU"""
NUM_STREAMS, PROMPT_TOKENS = 32, 64
REJOIN_STREAMS = 16
SETTLED_S = 0.4
"""after a kill, when the pause of the recovery itself is over; a rejoin comes later"""
RANKS_TO_KILL = 8
"""in the part `random`: some live while others are replaced"""
REGISTERED_BYTES_PER_S = 10e9
"""by all ranks of a host together, with their pauses: no fewer"""
PCIE_BYTES_PER_S = 55e9
"""registered host memory to one H200 (docs/gpu.md)"""


def prompts(vocab: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocab) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_STREAMS)]


def arguments(redundant: int, *more: str) -> list[str]:
    quiet = ["--rebalance-interval", "0", "--scrub-bytes-per-second", "0"]
    sizes = ["--num-redundant-experts", str(redundant), "--kv-tokens", "8192", "--max-num-batched-tokens", "512"]
    return ["--device", "cuda", *sizes, *quiet, *more]


def run(server: ServerProcess, spec: ModelSpec, tokens: int, streams: int = NUM_STREAMS) -> tuple[list[StreamRecord], float]:
    """All streams at once; what came, and the seconds that it took."""
    began = time.monotonic()
    asked = prompts(spec.vocab_size)[:streams]
    records = asyncio.run(stream_all(server.url, server.facts["model"], asked, max_tokens=tokens, temperature=0, ignore_eos=True))
    errors = [record.error for record in records if record.error]
    assert not errors, errors[0]
    return records, time.monotonic() - began


async def _with_kill(server: ServerProcess, asked: list[list[int]], tokens: int, rank: int, after: int) -> tuple[list[StreamRecord], float]:
    streams = asyncio.create_task(stream_all(server.url, server.facts["model"], asked, max_tokens=tokens, temperature=0, ignore_eos=True))
    start = (await asyncio.to_thread(server.status))["tokens_committed"]
    pid = server.rank_pid(rank)
    while (await asyncio.to_thread(server.status))["tokens_committed"] < start + after:
        await asyncio.sleep(0.02)
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    return await streams, killed


def kill(server: ServerProcess, spec: ModelSpec, tokens: int, expected: list[StreamRecord], rank: int) -> dict[str, Any]:
    """kill -9 of a rank amid the streams, and what came of it until the last one ended."""
    before = len(server.status()["recoveries"])
    records, killed = asyncio.run(_with_kill(server, prompts(spec.vocab_size), tokens, rank, NUM_STREAMS * tokens // 4))
    differing = sum(a.token_ids != b.token_ids for a, b in zip(records, expected, strict=True))
    recovery = next(r for r in server.status()["recoveries"][before:] if rank in r["ranks"] and r["tier"] < 2)
    quiet = [gap for record in expected for gap in record.gaps_s[1:]]
    resumed = killed + recovery["stall_ms"] / 1e3
    later = [b - a for r in records for a, b in zip(r.times, r.times[1:], strict=False) if a > resumed + 0.05]
    return {
        "step_ms": 1e3 * float(np.median(quiet)),
        "longest_quiet_gap_ms": 1e3 * max(quiet),
        "kill_to_next_token_ms": _stalls(records, killed, float(np.median(quiet))),
        "kind": recovery["kind"],
        "longest_later_gap_ms": 1e3 * max(later, default=0.0),
        "differing_streams": differing,
        "floor_ms": 1e3 * sum(recovery["bytes_moved"].values()) / PCIE_BYTES_PER_S,
        "recovery": {
            key: value for key, value in recovery.items() if key.endswith("_ms") or key in ("tier", "experts_lost", "bytes_moved")
        },
    }


def _stalls(records: list[StreamRecord], killed: float, step_s: float) -> dict[str, float]:
    """From the kill to each stream's next token. What comes within a quarter of a step was computed before the kill."""
    stalls = [min(t - killed for t in r.times if t > killed + step_s / 4) * 1e3 for r in records if r.times[-1] > killed + step_s / 4]
    return {"first": min(stalls), "median": float(np.median(stalls)), "last": max(stalls)}


def wait_for_backup(server: ServerProcess, spec: ModelSpec, ranks: int) -> None:
    """Until it is full, and each rank has had the time to register its pages with the driver."""
    server.wait_status(lambda s: s["host_backup"]["experts"] == s["host_backup"]["of"], 300)
    time.sleep(ranks * spec.num_layers * spec.num_experts * spec.slot_bytes(None) / REGISTERED_BYTES_PER_S)


def deaths(
    folder: Path, spec: ModelSpec, ranks: int, tokens: int, kills: int, *, replicas: bool, dispatch: str = "socket", backup: str = "off"
) -> dict[str, Any]:
    """With a replica of every expert, or just enough slots for all ranks but one to hold all: lost ones come from `backup`, or files."""
    redundant = spec.num_experts if replicas else -(-spec.num_experts // (ranks - 1)) * ranks - spec.num_experts
    more = ["--host-backup", backup]
    began = time.monotonic()
    more = ["--ep-size", str(ranks), "--dispatch", dispatch, *more]
    with ServerProcess(folder, *arguments(redundant, *more), start_timeout_s=500) as server:
        started = time.monotonic() - began
        if backup == "experts":
            wait_for_backup(server, spec, ranks)
        run(server, spec, tokens)
        expected, seconds = run(server, spec, tokens)
        survives, found = server.status()["survives"], []
        for number in range(kills):
            found.append(kill(server, spec, tokens, expected, (1 + number) % ranks))
            server.wait_status(lambda s: sum(s["active_ranks"]) == ranks and s["phase"] == "serving", 120)
            server.wait_status(lambda s: not replicas or s["survives"] == survives, 120)
            time.sleep(1.0)
        rejoins = [r for r in server.status()["recoveries"] if r["kind"] == "rejoin"]
    quiet = {"start_s": started, "tokens_per_s": NUM_STREAMS * tokens / seconds}
    return {**quiet, "kills": found, "rejoin_stalls_ms": [r["stall_ms"] for r in rejoins]}


def rejoin(folder: Path, spec: ModelSpec, ranks: int, tokens: int) -> dict[str, Any]:
    """kill -9 under a few long streams, which go on while the replacement starts, enters and takes its experts back: their longest gap."""
    redundant = -(-spec.num_experts // (ranks - 1)) * ranks - spec.num_experts
    room = str(REJOIN_STREAMS * (PROMPT_TOKENS + tokens))  # a rank may have to hold all of them
    more = ("--ep-size", str(ranks), "--host-backup", "experts", "--kv-tokens", room)
    with ServerProcess(folder, *arguments(redundant, *more), start_timeout_s=500) as server:
        wait_for_backup(server, spec, ranks)
        expected, _ = run(server, spec, tokens, REJOIN_STREAMS)
        asked = prompts(spec.vocab_size)[:REJOIN_STREAMS]
        records, killed = asyncio.run(_with_kill(server, asked, tokens, 1, REJOIN_STREAMS * tokens // 20))
        status = server.status()
    step_s = float(np.median([gap for record in expected for gap in record.gaps_s[1:]]))
    gaps = [(b - a, a - killed) for r in records for a, b in zip(r.times, r.times[1:], strict=False) if a > killed + SETTLED_S]
    longest, at = max(gaps)
    return {
        "step_ms": 1e3 * step_s,
        "longest_quiet_gap_ms": 1e3 * max(gap for record in expected for gap in record.gaps_s[1:]),
        "longest_gap_ms": 1e3 * longest,
        "longest_gap_steps": longest / step_s,
        "longest_gap_s_after_kill": at,
        "streams_ended_s_after_kill": max(record.times[-1] for record in records) - killed,
        "active_when_streams_ended": sum(status["active_ranks"]),
        "rejoin_stalls_ms": [r["stall_ms"] for r in status["recoveries"] if r["kind"] == "rejoin"],
        "differing_streams": sum(a.token_ids != b.token_ids for a, b in zip(records, expected, strict=True)),
    }


def random_kills(folder: Path, spec: ModelSpec, runs: int, seconds: float) -> dict[str, Any]:
    """Each run: all streams at once, a rank that lives killed at a random moment; the next run begins whoever is back by then."""
    rng, tokens, differing, waits, done = random.Random(7), 24, 0, 0, 0
    end = time.monotonic() + seconds
    more = ("--ep-size", str(RANKS_TO_KILL), "--restart-backoff", "0.05")
    with ServerProcess(folder, *arguments(spec.num_experts, *more), start_timeout_s=300) as server:
        expected, _ = run(server, spec, tokens)
        while done < runs and time.monotonic() < end:
            done += 1
            status = server.status()
            if sum(status["active_ranks"]) < 2:
                waits += 1
                status = server.wait_status(lambda s: sum(s["active_ranks"]) >= 2, 60)
            rank = rng.choice([r for r, active in enumerate(status["active_ranks"]) if active])
            records, _ = asyncio.run(
                _with_kill(server, prompts(spec.vocab_size), tokens, rank, rng.randrange(NUM_STREAMS * tokens * 3 // 4))
            )
            assert not any(record.error for record in records), [record.error for record in records]
            differing += sum(a.token_ids != b.token_ids for a, b in zip(records, expected, strict=True))
        status = server.status()
    recoveries = [r for r in status["recoveries"] if r["kind"] != "rejoin"]
    stalls = [r["stall_ms"] for r in recoveries if r["stall_ms"] is not None]
    return {
        "runs": done,
        "streams": done * NUM_STREAMS,
        "differing_streams": differing,
        "failed_requests": status["requests"]["failed"],
        "recoveries_kept": len(recoveries),
        "stall_ms": {"median": float(np.median(stalls)), "p95": float(np.percentile(stalls, 95)), "max": max(stalls)},
        "waited_for_a_second_rank": waits,
    }


def throughput(folder: Path, spec: ModelSpec, tokens: int, *more: str) -> dict[str, float]:
    with ServerProcess(folder, *arguments(0, *more), start_timeout_s=500) as server:
        run(server, spec, tokens)
        taken = [run(server, spec, tokens) for _ in range(3)]
        steps = [gap for records, _ in taken for record in records for gap in record.gaps_s[1:]]
    return {"tokens_per_s": NUM_STREAMS * tokens / float(np.median([s for _, s in taken])), "step_ms": 1e3 * float(np.median(steps))}


def _transformers(folder: str, tokens: int, pipe: Any) -> None:
    """One process, the same sizes, `generate` over one batch of equal lengths: its easiest case."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="grouped_mm")
    model = model.to_empty(device="cuda").eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    for buffer in model.buffers():
        buffer.zero_()  # what corrects a router's choice, in some families
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).cuda()
    ids = torch.tensor(prompts(config.vocab_size), device="cuda")
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.monotonic()
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    pipe.send(seconds[1:])


def peer(folder: Path, tokens: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_transformers, args=(str(folder), tokens, theirs), daemon=True)
    process.start()
    theirs.close()  # so that its death is seen
    if not ours.poll(300):
        process.kill()
        raise TimeoutError("transformers was not done after 300 s")
    seconds = float(np.median(ours.recv()))
    process.join()
    return {"tokens_per_s": NUM_STREAMS * tokens / seconds, "step_ms": 1e3 * seconds / tokens}


def shared(measure: Callable[[], Any]) -> Any:
    """Measure under the multi-process service, or as the driver shares a GPU where there is none; says which."""
    with tempfile.TemporaryDirectory() as folder, multi_process_service(folder) as there:
        return {"shared_by": "service" if there else "slices", **measure()}


def layers_that_fit(shape: str) -> int:
    """So that all experts are there twice, beside what ranks need for themselves."""
    most, gigabytes = (48, 1.3) if shape == SHAPES[0] else (3, 12.0)
    return max(1, min(most, int((torch.cuda.get_device_properties(0).total_memory / 1e9 - 20) / (2 * gigabytes))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0])
    parser.add_argument("--layers", type=int, help="of the model; by default as many as fit")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/elastic-ep"), help="where the checkpoint goes; memory, best")
    parser.add_argument("--checkpoint", type=Path, help="use this one, whatever its shape")
    parser.add_argument("--ranks", type=int, default=4, help="of the parts that have several")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--rejoin-tokens", type=int, default=1024, help="of each stream in the part `rejoin`: enough to outlast it")
    parser.add_argument("--runs", type=int, default=200, help="of the part `random`")
    parser.add_argument("--seconds", type=float, default=600.0, help="after so long the part `random` begins no further run")
    parser.add_argument("--share", choices=("service", "slices"), default="service", help="how ranks share the GPU")
    parser.add_argument("--parts", default="one-graphs,transformers,throughput,replicas,lost")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.ranks < 2:
        parser.error(f"--ranks is {args.ranks}; give 2 or more, and --parts one for a single one")
    if not torch.version.cuda or not torch.cuda.device_count():
        print("nothing measured: torch sees no GPU")
        return
    folder = args.checkpoint or args.folder / args.shape
    if args.checkpoint is None:
        began = time.monotonic()
        num_bytes = write(folder, config_of(args.shape, args.layers or layers_that_fit(args.shape)))
        print(f"wrote {num_bytes / 1e9:.1f} GB in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    spec = inspect_checkpoint(folder)
    report: dict[str, Any] = {
        "share": args.share,
        "layers": spec.num_layers,
        "experts": spec.num_experts,
        "slot_bytes": spec.slot_bytes(None),
    }
    ranks = ("--ep-size", str(args.ranks))
    kills: tuple[Any, ...] = (folder, spec, args.ranks, args.tokens, args.kills)
    parts: dict[str, Any] = {
        "throughput": lambda: throughput(folder, spec, args.tokens, *ranks),
        "fast": lambda: throughput(folder, spec, args.tokens, *ranks, "--fast-math"),
        "one": lambda: throughput(folder, spec, args.tokens, "--ep-size", "1"),
        "one-graphs": lambda: throughput(folder, spec, args.tokens, "--ep-size", "1", "--dispatch", "cuda"),
        "one-fast": lambda: throughput(folder, spec, args.tokens, "--ep-size", "1", "--dispatch", "cuda", "--fast-math"),
        "graphs": lambda: throughput(folder, spec, args.tokens, *ranks, "--dispatch", "cuda"),
        "replicas-graphs": lambda: deaths(*kills, replicas=True, dispatch="cuda"),
        "lost-graphs": lambda: deaths(*kills, replicas=False, dispatch="cuda", backup="experts"),
        "random": lambda: random_kills(folder, spec, args.runs, args.seconds),
        "transformers": lambda: peer(folder, args.tokens),
        "replicas": lambda: deaths(*kills, replicas=True),
        "lost": lambda: deaths(*kills, replicas=False, backup="experts"),
        "lost-files": lambda: deaths(*kills, replicas=False),
        "rejoin": lambda: rejoin(folder, spec, args.ranks, args.rejoin_tokens),
    }
    for part in args.parts.split(","):
        began = time.monotonic()
        try:
            report[part] = shared(parts[part]) if args.share == "service" and part not in ALONE else parts[part]()
        except Exception as error:  # the other parts are measured all the same
            report[part] = {"error": f"{type(error).__name__}: {error}"[-2000:]}
        print(f"{part}: {time.monotonic() - began:.0f} s\n{json.dumps(report[part])}", file=sys.stderr, flush=True)
    print(json.dumps(report, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
