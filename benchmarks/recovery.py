"""How long lost experts take to come back, beside what their bytes need: a rank of a busy server is killed, again and again.

checkpoint, host: there are just enough slots for three ranks to hold all experts, so the survivors read those that had no replica
before the next step, from the checkpoint's files or from the host's memory. peer: every expert has a replica, and the killed rank's
successor is filled from the others' slots while they serve. The floor is detection + agreement + bytes / bandwidth; the bandwidth of
each source is measured in the same run by the same number of processes reading the same experts with nothing else to do. The bar:
detection + agreement + 1.5 x bytes / bandwidth + 50 ms. Nobody waits for a peer's bytes, which are read beside the traffic: for them a
second bar has the bandwidth that the same raw reader gets beside the same traffic, and a second row is of a server without any. `--json`
prints one object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import elastic_ep
from elastic_ep.models.spec import ModelSpec, inspect_checkpoint
from elastic_ep.testing.client import stream_all
from elastic_ep.testing.server import ServerProcess

EP_SIZE, NUM_STREAMS = 4, 4
ALLOWANCE_MS, FACTOR = 50.0, 1.5
SURVIVORS = EP_SIZE - 1


def large_checkpoint(folder: Path) -> Path:
    """A Qwen3-MoE with 2.4 GB of experts in bfloat16, weights at random: what they say does not matter here."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    if not (folder / "config.json").exists():
        config = Qwen3MoeConfig(
            vocab_size=512, hidden_size=1024, intermediate_size=1024, moe_intermediate_size=1024, num_hidden_layers=6, num_experts=64,
            num_experts_per_tok=4, num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device("meta"):
            model = Qwen3MoeForCausalLM(config)
        model = model.to_empty(device="cpu").to(torch.bfloat16)
        for parameter in model.parameters():
            parameter.data.view(torch.int16).random_(0x3C00, 0x3D00)  # small positive numbers, quickly made
        model.save_pretrained(folder, max_shard_size="500MB")
    return folder


# ---- the sources on their own


def _reader(kind: str, slots: Any, address: str, places: list[tuple[int, int]], memories: Any) -> Callable[[int, int, Any], object]:
    """Reads an expert from a source as plainly as can be: no digest, no pieces, memory that is there."""
    from elastic_ep.runtime.weights import peer
    from elastic_ep.runtime.weights.host import HostBackup

    if kind == "checkpoint":
        source = slots.checkpoint

        def read(layer: int, expert: int, memory: Any) -> None:
            parts = source._layout.views(memory)
            for piece in source._pieces(layer, expert):
                into = parts[piece.part].view(-1)[piece.first : piece.first + int(np.prod(piece.shape))]
                source._reader.read_into(piece.tensor, piece.item, into)

        return read
    if kind == "host":
        backup = HostBackup(HostBackup.create(*slots.shape), *slots.shape)
        for (layer, expert), memory in zip(places, memories, strict=True):
            backup.write(layer, expert, memory, 0)
        return lambda layer, expert, memory: np.copyto(memory.numpy(), backup.view(layer, expert))
    pid, raw = peer.PeerSource(1, "unix:/none", 0, address, "token").addresses()
    lies_at = np.frombuffer(raw, np.uint64).reshape(slots.shape[:2])
    system = ctypes.CDLL(None, use_errno=True)

    def copy(layer: int, expert: int, memory: Any) -> None:
        here, there = _Stretch(memory.data_ptr(), len(memory)), _Stretch(int(lies_at[layer, expert]), len(memory))
        assert system.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) == len(memory), ctypes.get_errno()

    return copy


def _read_share(kind: str, checkpoint: str, share: int, readers: int, count: int, address: str, barrier: Any, seconds: Any) -> None:
    """One of `readers`: its share of `count` experts into as many slots, which have been written before."""
    import torch

    from elastic_ep.models.engine import ElasticEngine
    from elastic_ep.runtime.weights.base import zeroed

    torch.set_num_threads(1)
    engine = ElasticEngine(checkpoint, 0, 0, kv_tokens=64)
    engine.make_slots()
    engine.load_dense()
    layers, experts, slot_bytes = engine.slots.shape
    places = [divmod(i, experts) for i in range(layers * experts)][share:count:readers]
    memories = zeroed(len(places) * slot_bytes).view(len(places), slot_bytes).fill_(1)
    read = _reader(kind, engine.slots, address, places, memories)
    barrier.wait()
    started = time.perf_counter()
    for (layer, expert), memory in zip(places, memories, strict=True):
        read(layer, expert, memory)
    seconds[share] = time.perf_counter() - started
    barrier.wait()


class _Stretch(ctypes.Structure):
    """The system's `struct iovec`."""

    _fields_ = (("base", ctypes.c_void_p), ("num_bytes", ctypes.c_size_t))


def _peer(address: str, count: int, slot_bytes: int, layers: int, experts: int) -> None:
    """A peer that holds what a rank holds: the first `count` experts."""
    from elastic_ep.runtime.weights.base import zeroed
    from elastic_ep.runtime.weights.peer import PeerServer

    server = PeerServer(0, address, "token")
    memories = zeroed(count * slot_bytes).view(count, slot_bytes).fill_(1)
    lie_at = np.zeros(layers * experts, np.uint64)
    lie_at[:count] = [memory.data_ptr() for memory in memories]
    server.addresses = lambda: lie_at.reshape(layers, experts)
    server.start()
    signal.pause()


def bandwidth(kind: str, checkpoint: Path, spec: ModelSpec, count: int) -> float:
    """Bytes per second that `SURVIVORS` readers of `count` experts get together (one for a peer: the rank that comes back reads alone)."""
    spawn = multiprocessing.get_context("spawn")
    readers = 1 if kind == "peer" else SURVIVORS
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        address = f"unix:{folder}/peer"
        if kind == "peer":
            shape = (count, spec.slot_bytes(None), spec.num_layers, spec.num_experts)
            peer = spawn.Process(target=_peer, args=(address, *shape), daemon=True)
            peer.start()
            stack.callback(peer.join)
            stack.callback(peer.kill)
        barrier, seconds = spawn.Barrier(readers + 1), spawn.Array("d", SURVIVORS)
        workers = [
            spawn.Process(target=_read_share, args=(kind, str(checkpoint), i, readers, count, address, barrier, seconds))
            for i in range(readers)
        ]
        for worker in workers:
            worker.start()
        barrier.wait(300)
        barrier.wait(300)
        for worker in workers:
            worker.join()
    return count * spec.slot_bytes(None) / max(seconds)


# ---- the server


@contextlib.contextmanager
def busy(server: ServerProcess) -> Iterator[None]:
    """Streams that run all the while, in a process of their own."""
    process = multiprocessing.get_context("spawn").Process(target=_streams, args=(server.url, server.facts["model"]), daemon=True)
    process.start()
    try:
        server.wait_status(lambda status: status["requests"]["running"] == NUM_STREAMS)
        yield
    finally:
        process.kill()
        process.join()


def _streams(url: str, model: str) -> None:
    with contextlib.suppress(httpx.HTTPError):
        while True:
            prompts = [[(7 * i) % 200 + 1] * 8 for i in range(NUM_STREAMS)]
            asyncio.run(stream_all(url, model, prompts, max_tokens=2000, temperature=0, ignore_eos=True))


def whole(status: dict[str, Any]) -> bool:
    return sum(status["active_ranks"]) == EP_SIZE and status["streamed_experts"] == 0 and status["phase"] == "serving"


def kill_and_wait(server: ServerProcess, rank: int) -> list[dict[str, Any]]:
    """The records of one kill: the recovery, and what restores the group."""
    before = len(server.status()["recoveries"])
    incarnation = server.status()["ranks"][rank]["incarnation"]
    server.signal_rank(rank)
    server.wait_status(lambda s: whole(s) and s["ranks"][rank]["incarnation"] > incarnation, timeout_s=120)
    time.sleep(1.0)
    server.wait_status(whole, timeout_s=120)
    records: list[dict[str, Any]] = server.status()["recoveries"][before:]
    return records


def measure(kind: str, checkpoint: Path, spec: ModelSpec, kills: int, *, is_busy: bool = True) -> dict[str, Any]:
    arguments = ["--ep-size", str(EP_SIZE), "--restart", "always", "--rebalance-interval", "0", "--scrub-bytes-per-second", "0"]
    if kind == "host":
        arguments += ["--host-backup", "experts"]
    redundant = spec.num_experts if kind == "peer" else -(-spec.num_experts // SURVIVORS)  # three ranks can hold all of them
    arguments += ["--num-redundant-experts", str(redundant)]
    found = []
    count, beside_traffic = spec.num_layers * spec.num_experts // EP_SIZE * (2 if kind == "peer" else 1), 0.0  # what a rank held
    with ServerProcess(checkpoint, *arguments) as server, busy(server) if is_busy else contextlib.nullcontext():
        if kind == "host":
            server.wait_status(lambda s: s["host_backup"]["experts"] == s["host_backup"]["of"], timeout_s=300)
        for number in range(kills):
            records = kill_and_wait(server, number % EP_SIZE)
            if kind == "peer":
                found += _staged(server, records)
            else:
                found.append(records[0])
        if kind == "peer" and is_busy:
            beside_traffic = float(np.median([bandwidth(kind, checkpoint, spec, count) for _ in range(3)]))
    rate = float(np.median([bandwidth(kind, checkpoint, spec, count) for _ in range(3)]))
    rows = [_row(record, kind, rate) for record in found]
    middle: Callable[[str], float] = lambda key: float(np.median([row[key] for row in rows]))  # noqa: E731
    keys = ("detect_ms", "agree_ms", "plan_ms", "move_ms", "mbytes", "measured_ms", "floor_ms", "bar_ms", "ratio_to_floor")
    out = {"kills": kills, "bandwidth_mb_s": rate / 1e6, **{key: middle(key) for key in keys}}
    if beside_traffic:
        out["busy_bandwidth_mb_s"] = beside_traffic / 1e6
        out["busy_bar_ms"] = FACTOR * out["mbytes"] / out["busy_bandwidth_mb_s"] * 1e3 + ALLOWANCE_MS
    return out


def _staged(server: ServerProcess, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The filling of a rank that came back: `stage_ms` in place of a move that nobody waited for."""
    return [dict(record, move_ms=record["stage_ms"], detect_ms=0.0, agree_ms=0.0) for record in records if record["kind"] == "rejoin"][:1]


def _row(record: dict[str, Any], kind: str, rate: float) -> dict[str, float]:
    num_bytes = sum(record["bytes_moved"].values()) if kind == "peer" else record["bytes_moved"][kind]
    assert num_bytes, f"nothing came from {kind}: {record}"
    bytes_ms = num_bytes / rate * 1e3
    noticed_ms = record["detect_ms"] + record["agree_ms"]
    measured = noticed_ms + record["plan_ms"] + record["move_ms"]
    phases = {name: record[name] for name in ("detect_ms", "agree_ms", "plan_ms", "move_ms")}
    bar = noticed_ms + FACTOR * bytes_ms + ALLOWANCE_MS
    floor = noticed_ms + bytes_ms
    times = {"measured_ms": measured, "floor_ms": floor, "bar_ms": bar, "ratio_to_floor": measured / floor}
    return {**phases, "mbytes": num_bytes / 1e6, **times}


def main() -> None:
    from elastic_ep.models.demo_checkpoint import ensure_demo_checkpoint

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5, help="per source and model")
    parser.add_argument("--sources", nargs="+", default=["checkpoint", "host", "peer"], choices=["checkpoint", "host", "peer"])
    sizes = ["demo", "100M", "2.4GB"]
    parser.add_argument("--models", nargs="+", default=sizes, choices=sizes, help="the demo's, and generated ones of more bytes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cache = Path.home() / ".cache" / "elastic-ep"
    makers: dict[str, Callable[[], Path]] = {
        "demo": lambda: Path(elastic_ep.__file__).parent / "assets" / "demo_model",
        "100M": lambda: ensure_demo_checkpoint(cache / "demo-checkpoint-1"),
        "2.4GB": lambda: large_checkpoint(cache / "benchmark-recovery-1"),
    }
    results: dict[str, Any] = {}
    for name in args.models:
        checkpoint = makers[name]()
        spec = inspect_checkpoint(checkpoint)
        results[name] = {kind: measure(kind, checkpoint, spec, args.kills) for kind in args.sources}
        if "peer" in args.sources:
            results[name]["peer, idle"] = measure("peer", checkpoint, spec, args.kills, is_busy=False)
    if args.json:
        print(json.dumps(results))
        return
    for name, sources in results.items():
        print(f"{name}: medians")
        for kind, row in sources.items():
            phases = " + ".join(f"{row[p]:.1f} {p.removesuffix('_ms')}" for p in ("detect_ms", "agree_ms", "plan_ms", "move_ms"))
            print(
                f"  {kind:>10}: {row['mbytes']:7.1f} MB at {row['bandwidth_mb_s']:.0f} MB/s: {row['measured_ms']:.0f} ms ({phases}), "
                f"{row['ratio_to_floor']:.2f} x the floor of {row['floor_ms']:.0f} ms, bar {row['bar_ms']:.0f} ms"
                + (f"; beside the traffic {row['busy_bandwidth_mb_s']:.0f} MB/s: bar {row['busy_bar_ms']:.0f} ms" if kind == "peer" else "")
            )


if __name__ == "__main__":
    main()
