"""Dispatch + combine of the cuda backend, beside the floor of bytes over the bandwidth measured in the same run.

A step is 16 MoE layers captured in one CUDA graph per rank, so nothing of the host is in it; a layer before it brings the ranks level.
Time is a step's, by events, over 16: the slowest rank's median. Experts do not run: their outputs lie ready. The floor counts what must
cross the GPU's memory on any path: a rank's tokens read and its sums written once, each received row written once, each expert output
read once. Between GPUs it counts what a rank must read from its peers, over the bandwidth of a copy from one GPU to another, where that
takes longer.

Ranks are placed four ways: `gpus`, each on a GPU of its own, where there are several. The others share one: `mps`, processes that run at
the same time through NVIDIA's multi-process service (started and ended here, if the machine has it), also with two ranks; `streams`, all
ranks in one process; `slices`, processes as the driver shares a GPU by default, one after the other. Beside it runs torch's own gather and
weighted sum over the same rows in one process, which exchanges nothing.

    python benchmarks/gpu.py
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import statistics
import subprocess
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from elastic_ep.core.placement import ExpertPlacement
from elastic_ep.core.routing import RoutingTable
from elastic_ep.core.topology import Topology
from elastic_ep.runtime.dispatch.cuda.build import build_kernels
from elastic_ep.runtime.dispatch.cuda.dispatcher import CudaDispatcher
from elastic_ep.runtime.dispatch.cuda.region import Capacity

RANKS, HIDDEN, TOP_K, EXPERTS, LAYERS = 4, 7168, 8, 256, 16
TOKENS = (8, 128, 512)
SPARE = 8
DTYPE = torch.bfloat16
WAIT_S = 120.0


class Batch(NamedTuple):
    """One rank's tokens."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def make_routing(num_ranks: int, num_seats: int) -> RoutingTable:
    """64 experts and 8 replicas of the neighbour's per rank, quotas even; seats beyond `num_ranks` hold nothing."""
    home = EXPERTS // num_ranks
    slots = np.full((num_seats, home + SPARE), -1, dtype=np.int64)
    for rank in range(num_ranks):
        slots[rank, :home] = np.arange(rank * home, (rank + 1) * home)
        slots[rank, home:] = np.arange(SPARE) + (rank + 1) % num_ranks * home if num_ranks > 1 else -1
    p2l = np.tile(slots.reshape(-1), (LAYERS + 1, 1))
    return RoutingTable.build(1, ExpertPlacement(p2l, EXPERTS), Topology.uniform(num_seats, slots.size))


def link_bytes(rank: int, num_ranks: int, tokens: int) -> int:
    """Bytes that a rank must read from the others in one layer: rows wanted here, once each, and outputs of its own pairs computed there.
    Of experts that have two replicas none is counted."""
    home = EXPERTS // num_ranks
    ids = {r: np.where(batch_ids(r, tokens) % home < SPARE, -1, batch_ids(r, tokens) // home) for r in range(num_ranks)}
    rows = sum(int((ids[peer] == rank).any(1).sum()) for peer in ids if peer != rank)
    return (rows + int(((ids[rank] >= 0) & (ids[rank] != rank)).sum())) * HIDDEN * DTYPE.itemsize


def batch_ids(rank: int, tokens: int) -> np.ndarray:
    rng = np.random.default_rng((rank, tokens))
    return np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :TOP_K].copy()


def make_batch(rank: int, tokens: int) -> Batch:
    ids = torch.from_numpy(batch_ids(rank, tokens)).cuda()
    x = torch.randn(tokens, HIDDEN, device="cuda", generator=torch.Generator("cuda").manual_seed(rank)).to(DTYPE)
    return Batch(x, ids, torch.rand(tokens, TOP_K, device="cuda"))


def floor_bytes(num_ranks: int, tokens: int) -> int:
    """Bytes that all ranks together must read and write in one layer."""
    return num_ranks * tokens * HIDDEN * DTYPE.itemsize * (2 + 2 * TOP_K)


class Side:
    """One rank's dispatcher and what it replays."""

    def __init__(self, rank: int, num_ranks: int, num_seats: int, folder: str, split: bool | None = None, in_place: bool = True):
        capacity = Capacity(num_seats, EXPERTS, LAYERS + 1, max_tokens=max(TOKENS), top_k=TOP_K, hidden=HIDDEN)
        address = f"unix:{folder}/{num_seats}-{num_ranks}-{in_place}-{rank}"
        options: dict[str, Any] = {"token": "benchmark", "deadline_s": 20.0, "cache": Path(folder), "split": split}
        options["device"] = torch.cuda.current_device()
        self.dispatcher = CudaDispatcher(rank, address, capacity, **options)
        self.peers = {r: f"unix:{folder}/{num_seats}-{num_ranks}-{in_place}-{r}" for r in range(num_ranks)}
        self.in_place = in_place
        self.routing = make_routing(num_ranks, num_seats)
        self.stream = torch.cuda.Stream()
        self.rank, self.step = rank, 0

    def connect(self) -> None:
        with torch.cuda.stream(self.stream):
            failed = self.dispatcher.connect(self.peers, 30.0)
            assert failed is None, failed

    def layer(self, layer: int) -> torch.Tensor:
        handle = self.dispatcher.enqueue_dispatch(*self.batch, layer)
        return self.dispatcher.enqueue_combine(handle)

    def capture(self, batch: Batch) -> None:
        """Graph of 16 layers. Nothing runs."""
        self.batch = batch
        if self.in_place:  # as an engine does, whose norm writes there
            rows = self.dispatcher.token_buffer(*batch.x.shape, DTYPE)
            self.batch = batch._replace(x=rows.copy_(batch.x))
        with torch.cuda.stream(self.stream):
            self.step += 1
            self.dispatcher.begin_step(self.routing, 1, self.step)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            for layer in range(1, LAYERS + 1):
                self.layer(layer)

    def enqueue(self) -> tuple[Any, Any]:
        """One step, with the events around its 16 layers."""
        self.step += 1
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            self.dispatcher.begin_step(self.routing, 1, self.step)
            self.layer(0)
            begin.record()
            self.graph.replay()
            end.record()
        return begin, end

    def wait(self) -> None:
        with torch.cuda.stream(self.stream):
            failed = self.dispatcher.wait()
        assert failed is None, failed


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever synchronises with the device through torch in here raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def in_turns(parts: dict[str, Any], repeat: int) -> list[tuple[str, Any]]:
    """Every other time in the opposite order, so that none always comes first."""
    return list(parts.items())[:: -1 if repeat % 2 else 1]


def layer_us(events: tuple[Any, Any]) -> float:
    return events[0].elapsed_time(events[1]) * 1e3 / LAYERS


def fill(sides: list[Side]) -> None:
    """Expert outputs that are no zeros."""
    for side in sides:
        memory = side.dispatcher._memory.outputs.view(DTYPE)
        for part in memory.split(1 << 26):
            part.normal_()


# ---- ranks as processes


def rank_main(
    rank: int, num_ranks: int, folder: str, repeats: int, sizes: tuple[int, ...], num_gpus: int, level: Any, results: Any
) -> None:
    """Plain and with a masked seat, in turns; (name, tokens, rank, us per layer of each repetition) to `results`."""
    torch.cuda.set_device(rank % num_gpus)
    torch.zeros(1, device="cuda")
    results.put(rank)
    sides = {"plain": Side(rank, num_ranks, num_ranks, folder), "masked": Side(rank, num_ranks, num_ranks + 1, folder)}
    for side in sides.values():
        side.connect()
    fill(list(sides.values()))
    for tokens in sizes:
        batch = make_batch(rank, tokens)
        for side in sides.values():
            side.capture(batch)
        times: dict[str, list[float]] = {name: [] for name in sides}
        torch.cuda.synchronize()
        level.wait(WAIT_S)
        for repeat in range(repeats + 2):
            for name, side in in_turns(sides, repeat):
                with no_waiting():
                    events = side.enqueue()
                side.wait()
                if repeat >= 2:
                    times[name].append(layer_us(events))
        for name, values in times.items():
            results.put((name, tokens, rank, values))
    level.wait(WAIT_S)
    for side in sides.values():
        side.dispatcher.close()


def run_processes(
    num_ranks: int, folder: str, repeats: int, sizes: tuple[int, ...] = TOKENS, num_gpus: int = 1
) -> dict[tuple[str, int], float]:
    """(name, tokens) -> us per layer, the slowest rank's median."""
    context = multiprocessing.get_context("spawn")
    results, level = context.Queue(), context.Barrier(num_ranks)
    shared = (num_ranks, folder, repeats, sizes, num_gpus, level, results)
    ranks = [context.Process(target=rank_main, args=(r, *shared), daemon=True) for r in range(num_ranks)]
    try:
        for process in ranks:
            process.start()
            next_result(results, ranks)
        found: dict[tuple[str, int], float] = {}
        for _ in range(2 * num_ranks * len(sizes)):
            name, tokens, _, values = next_result(results, ranks)
            found[name, tokens] = max(found.get((name, tokens), 0.0), statistics.median(values))
        for process in ranks:
            process.join(30)
        return found
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()


def next_result(results: Any, ranks: list[Any]) -> Any:
    """What a rank measured. Raises RuntimeError once one of them has died, or after too long."""
    for _ in range(int(WAIT_S)):
        try:
            return results.get(timeout=1)
        except queue.Empty:
            if any(process.exitcode for process in ranks if process.pid):
                break
    raise RuntimeError(f"ranks ended with exit codes {[process.exitcode for process in ranks]}")


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """For processes that are started within."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def multi_process_service(folder: str) -> Iterator[bool]:
    """Run NVIDIA's multi-process service for the processes started within. Yields False where there is none."""
    daemon = shutil.which("nvidia-cuda-mps-control", path=os.environ.get("PATH", "") + ":/usr/local/nvidia/bin:/usr/bin")
    if daemon is None:
        yield False
        return
    place = tempfile.mkdtemp(prefix="mps", dir=folder)
    with environment(CUDA_MPS_PIPE_DIRECTORY=place, CUDA_MPS_LOG_DIRECTORY=place):
        os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)  # queues are counted over all its clients
        try:
            yield subprocess.run([daemon, "-d"], check=False, timeout=30, capture_output=True).returncode == 0
        finally:
            subprocess.run([daemon], input="quit\n", text=True, check=False, timeout=60, capture_output=True)


# ---- ranks as streams of one process


def in_own_process(call: Callable[..., Any], *args: Any) -> Any:
    """The call's result, from a process that ends with it: this one must not hold the GPU."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply_async(call, args).get(timeout=2 * WAIT_S)


def run_streams(folder: str, repeats: int) -> dict[tuple[str, int], float]:
    worlds = {
        "plain": [Side(r, RANKS, RANKS, folder) for r in range(RANKS)],
        "masked": [Side(r, RANKS, RANKS + 1, folder) for r in range(RANKS)],
        "rows copied from elsewhere": [Side(r, RANKS, RANKS, folder, in_place=False) for r in range(RANKS)],
        "one rank alone": [Side(0, 1, 1, folder)],
        "one rank alone, split": [Side(0, 1, 2, folder, split=True)],
    }
    for sides in worlds.values():
        threads = [threading.Thread(target=side.connect) for side in sides]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        fill(sides)
    found = {}
    for tokens in TOKENS:
        for sides in worlds.values():
            for side in sides:
                side.capture(make_batch(side.rank, tokens))
        times: dict[str, list[float]] = {name: [] for name in worlds}
        torch.cuda.synchronize()
        for repeat in range(repeats + 2):
            for name, sides in in_turns(worlds, repeat):
                events = [side.enqueue() for side in sides]
                for side in sides:
                    side.wait()
                if repeat >= 2:
                    times[name].append(max(map(layer_us, events)))
        found.update({(name, tokens): statistics.median(values) for name, values in times.items()})
    for sides in worlds.values():
        for side in sides:
            side.dispatcher.close()
    return found


# ---- the ceiling, and torch


def median_ms(call: Callable[[], Any], repeats: int = 20) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def run_ceiling() -> dict[str, Any]:
    """The GPU's name, bytes per second of a large copy (read + written), us of torch's gather and weighted sum for each size."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source))
    torch_us = {}
    for tokens in TOKENS:
        batches = [make_batch(rank, tokens) for rank in range(RANKS)]
        x, ids, weights = (torch.cat(parts) for parts in zip(*batches, strict=True))
        order = ids.flatten().argsort(stable=True)
        token, back = order // TOP_K, order.argsort()
        y = torch.randn(len(order), HIDDEN, device="cuda").to(DTYPE)
        scale = weights.to(DTYPE)[:, None, :]

        def both(
            x: torch.Tensor = x, y: torch.Tensor = y, token: torch.Tensor = token, back: torch.Tensor = back, scale: torch.Tensor = scale
        ) -> Any:
            return x[token], torch.bmm(scale, y[back].view(len(x), TOP_K, HIDDEN))

        torch_us[tokens] = median_ms(both) * 1e3
    report = {"gpu": torch.cuda.get_device_name(), "bytes_per_s": 2 * len(source) / ms * 1e3, "torch_us": torch_us}
    if torch.cuda.device_count() > 1:
        elsewhere = torch.empty_like(source, device="cuda:1")
        report["link_bytes_per_s"] = len(source) / median_ms(lambda: target.copy_(elsewhere)) * 1e3
    return report


def run(repeats: int = 40) -> dict[str, Any]:
    """Everything; see `print_report`."""
    folder = tempfile.mkdtemp(prefix="eepgpu")
    report: dict[str, Any] = {"hidden": HIDDEN, "top_k": TOP_K, "experts": EXPERTS, "layers": LAYERS, "modes": []}
    try:
        report |= in_own_process(run_ceiling)
        in_own_process(build, folder)
        for (mode, num_ranks), measure in modes().items():
            try:
                report["modes"].append({"mode": mode, "ranks": num_ranks, "us": measure(num_ranks, folder, repeats)})
            except Exception as error:
                traceback.print_exc()
                report["modes"].append({"mode": mode, "ranks": num_ranks, "us": {}, "failed": f"{type(error).__name__}: {error}"})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def run_with_service(num_ranks: int, folder: str, repeats: int) -> dict[tuple[str, int], float]:
    with multi_process_service(folder) as there:
        if not there:
            raise RuntimeError("nvidia-cuda-mps-control is not here or does not start")
        return run_processes(num_ranks, folder, repeats)


def run_in_one_process(num_ranks: int, folder: str, repeats: int) -> dict[tuple[str, int], float]:
    assert num_ranks == RANKS
    with environment(CUDA_DEVICE_MAX_CONNECTIONS="32"):  # streams that wait for each other must not share a queue
        return in_own_process(run_streams, folder, repeats)


def run_sliced(num_ranks: int, folder: str, repeats: int) -> dict[tuple[str, int], float]:
    return run_processes(num_ranks, folder, 3, (8, 512))


def run_on_gpus(num_ranks: int, folder: str, repeats: int) -> dict[tuple[str, int], float]:
    return run_processes(num_ranks, folder, repeats, num_gpus=num_ranks)


def modes() -> dict[tuple[str, int], Callable[[int, str, int], dict[tuple[str, int], float]]]:
    apart = {("gpus", n): run_on_gpus for n in (2, 4, 8) if n <= torch.cuda.device_count()}
    return {
        **apart,
        ("mps", RANKS): run_with_service,
        ("mps", 2): run_with_service,
        ("streams", RANKS): run_in_one_process,
        ("slices", RANKS): run_sliced,
    }


def floor_us(report: dict[str, Any], mode: str, num_ranks: int, tokens: int) -> float:
    """Microseconds that the bytes of one layer take at least, in that placement."""
    if mode != "gpus":
        return floor_bytes(num_ranks, tokens) / report["bytes_per_s"] * 1e6
    links = max(link_bytes(r, num_ranks, tokens) for r in range(num_ranks)) / report["link_bytes_per_s"]
    return max(links, floor_bytes(1, tokens) / report["bytes_per_s"]) * 1e6


def build(folder: str) -> None:
    build_kernels(torch.cuda.get_device_capability(), Path(folder))


def print_report(report: dict[str, Any]) -> None:
    print(
        f"dispatch + combine, {report['gpu']}, hidden {HIDDEN}, top-{TOP_K} of {EXPERTS} experts, bfloat16\n"
        f"copy bandwidth {report['bytes_per_s'] / 1e12:.2f} TB/s read + written, from GPU to GPU "
        f"{report.get('link_bytes_per_s', 0) / 1e12:.2f} TB/s; host synchronisations per step: 0 (one graph per step)"
    )
    print(f"{'ranks':>5} {'as':>8} {'tokens':>7} {'us':>9} {'floor us':>9} {'x floor':>9} {'masked us':>10} {'mask costs':>11}")
    for row in report["modes"]:
        if "failed" in row:
            print(f"{row['ranks']:>5} {row['mode']:>8} not measured: {row['failed']}")
        for (name, tokens), us in row["us"].items():
            if name != "plain":
                continue
            floor = floor_us(report, row["mode"], row["ranks"], tokens)
            masked = row["us"]["masked", tokens]
            print(
                f"{row['ranks']:>5} {row['mode']:>8} {tokens:>7} {us:>9.1f} {floor:>9.1f} {us / floor:>8.2f}x "
                f"{masked:>10.1f} {masked - us:>+11.2f}"
            )
        for (name, tokens), us in row["us"].items():
            if name not in ("plain", "masked"):
                print(f"{name}, {tokens} tokens: {us:.1f} us")
    for tokens, us in report["torch_us"].items():
        print(f"torch gather and weighted sum, the tokens of {RANKS} ranks in one process, {tokens} tokens per rank: {us:.1f} us")
