"""Dispatch + combine of the socket and MPI backends beside gloo's `all_to_all_single`: same rows, same grouping, same sum, in one run.

The gloo peer is the plain form: exchange counts, then the (row, expert) pairs, then the rows; the outputs come back with counts
that are known by then. All use the same planning and summing code, so what differs is how bytes move. They take turns; a
repetition lasts as long as its slowest rank, and medians are compared. MPI is left out where the extra `mpi` is not installed.

    python benchmarks/dispatch.py [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist

from elastic_ep.core.placement import ExpertPlacement
from elastic_ep.core.routing import RoutingTable
from elastic_ep.core.topology import Topology
from elastic_ep.runtime.dispatch.base import DispatchHandle, StepPoint
from elastic_ep.runtime.dispatch.grouping import distinct_rows, plan_arrival, plan_departure
from elastic_ep.runtime.dispatch.mpi import MpiDispatcher
from elastic_ep.runtime.dispatch.mpi_link import load_mpi
from elastic_ep.runtime.dispatch.rows import RowBuffer, as_array, gather, weighted_sum
from elastic_ep.runtime.dispatch.socket import SocketDispatcher

RANKS = 4
HIDDEN = 2048
EXPERTS = 32
TOP_K = 8
TOKENS = (1, 8, 32, 128, 512)
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS = 4
BLOCK_S = 0.3
"""how long each side runs per round and size"""


class GlooPeer:
    """The same exchange over a gloo process group."""

    def __init__(self, rank: int, folder: str):
        self.rank = rank
        self._buffers = {name: RowBuffer() for name in ("leaving", "rows", "grouped")}
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)

    def dispatch(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, routing: RoutingTable, at: StepPoint) -> DispatchHandle:
        topk = ids.numpy()
        plan = plan_departure(topk, routing.destination_ranks(at.layer, topk, self.rank, at.step), RANKS)
        sends = [distinct_rows(plan.pairs_for(r)) for r in range(RANKS)]
        sent = torch.tensor([[len(s.tokens), len(s.pairs)] for s in sends])
        came = torch.empty_like(sent)
        dist.all_to_all_single(came, sent)
        rows_in, pairs_in = came.T.tolist()
        rows_out, pairs_out = sent.T.tolist()
        pairs = torch.empty((sum(pairs_in), 2), dtype=torch.int32)
        dist.all_to_all_single(pairs, torch.from_numpy(np.concatenate([s.pairs for s in sends])), pairs_in, pairs_out)
        leaving = self._buffers["leaving"].take(sum(rows_out), x.shape[1], x.dtype)
        np.take(as_array(x), np.concatenate([s.tokens for s in sends]), axis=0, out=leaving[1], mode="clip")
        rows = self._buffers["rows"].take(sum(rows_in), x.shape[1], x.dtype)
        dist.all_to_all_single(rows[0], leaving[0], rows_in, rows_out)
        arrival = plan_arrival(np.split(pairs.numpy(), np.cumsum(pairs_in)[:-1]), rows_in, np.ones(EXPERTS, dtype=bool))
        grouped, array = self._buffers["grouped"].take(len(pairs), x.shape[1], x.dtype)
        gather(array, np.split(rows[1], np.cumsum(rows_in)[:-1]), arrival.source_of, arrival.row_of)
        return DispatchHandle(grouped, arrival.groups, (plan, arrival, weights, pairs_in, pairs_out))

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        plan, arrival, weights, pairs_in, pairs_out = handle.state
        leaving = self._buffers["leaving"].take(*y.shape, y.dtype)
        np.take(as_array(y), arrival.back, axis=0, out=leaving[1], mode="clip")
        back = self._buffers["rows"].take(len(plan.pairs), y.shape[1], y.dtype)
        dist.all_to_all_single(back[0], leaving[0], pairs_out, pairs_in)
        order = np.arange(len(plan.pairs), dtype=np.int32)
        return weighted_sum([back[1]], np.zeros_like(order), order, plan.position, weights, y.shape[1], y.dtype)


def routing_table() -> RoutingTable:
    topology = Topology.uniform(RANKS, EXPERTS)
    return RoutingTable.build(1, ExpertPlacement(np.arange(EXPERTS)[None, :], EXPERTS), topology)


def one_exchange(side: Any, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], routing: RoutingTable, step: int) -> float:
    """Seconds of one dispatch + combine (the experts return their input)."""
    begin = time.perf_counter()
    handle = side.dispatch(*batch, routing, StepPoint(1, step, 0))
    out = side.combine(handle.rows, handle)
    seconds = time.perf_counter() - begin
    assert isinstance(out, torch.Tensor), out
    return seconds


def measure(rank: int, sides: dict[str, Any], num_tokens: int, dtype: torch.dtype, first_step: int) -> tuple[dict[str, list[float]], int]:
    """This rank's seconds per repetition and side. All ranks run the same number: rank 0 sizes the blocks."""
    rng = np.random.default_rng(rank)
    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(num_tokens)])
    batch = (
        torch.from_numpy(rng.standard_normal((num_tokens, HIDDEN))).to(dtype),
        torch.from_numpy(ids),
        torch.from_numpy(rng.random((num_tokens, TOP_K), dtype=np.float32)),
    )
    routing, step = routing_table(), first_step
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name, side in sides.items():
        warm = []
        for _ in range(4):
            warm.append(one_exchange(side, batch, routing, step))
            step += 1
        size = torch.tensor([max(3, min(400, int(BLOCK_S / min(warm))))])
        dist.broadcast(size, 0)
        times[name + " block"] = [float(size)]
    for _ in range(ROUNDS):
        for name, side in sides.items():
            dist.barrier()
            for _ in range(int(times[name + " block"][0])):
                times[name].append(one_exchange(side, batch, routing, step))
                step += 1
    return {name: times[name] for name in sides}, step


def rank_main(rank: int, folder: str, with_mpi: bool) -> None:
    """Measure every size and leave this rank's times in a file."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results = []
    with contextlib.ExitStack() as open_sides:
        mesh = open_sides.enter_context(SocketDispatcher(rank, f"unix:{folder}/r{rank}", token="benchmark", deadline_s=60))
        sides: dict[str, Any] = {"socket": mesh}
        failed = [mesh.connect({r: f"unix:{folder}/r{r}" for r in range(RANKS)}, 30)]
        if with_mpi:
            sides["mpi"] = open_sides.enter_context(MpiDispatcher(rank, deadline_s=60))
            failed.append(sides["mpi"].connect({r: f"mpi:{r}" for r in range(RANKS)}, 30, epoch=1))
        assert not any(failed), failed
        sides["gloo"] = GlooPeer(rank, folder)
        step = 0
        for dtype in DTYPES:
            for num_tokens in TOKENS:
                times, step = measure(rank, sides, num_tokens, dtype, step)
                results.append({"dtype": str(dtype).removeprefix("torch."), "tokens_per_rank": num_tokens, "times": times})
        dist.barrier()
    dist.destroy_process_group()
    Path(f"{folder}/{rank}.json").write_text(json.dumps(results))


def start_ranks(folder: str) -> list[subprocess.Popen[bytes]]:
    """The rank processes, or the mpirun that starts them."""
    own = [sys.executable, __file__, "--folder", folder]
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        return [subprocess.Popen([*own, "--rank", str(rank)]) for rank in range(RANKS)]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    options = ["--with-ft", "ulfm", "--oversubscribe", "--bind-to", "none", "--mca", "pml", "ob1", "-n", str(RANKS)]
    return [subprocess.Popen([mpirun, *options, *own, "--mpi"], env=environment, stdin=subprocess.DEVNULL)]


def run() -> list[dict[str, Any]]:
    """One row per dtype and size."""
    folder = tempfile.mkdtemp(prefix="eepbench")
    processes = start_ranks(folder)
    try:
        for process in processes:
            if process.wait(600):
                raise SystemExit(f"a rank ended with status {process.returncode}")
        per_rank = [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(RANKS)]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        shutil.rmtree(folder, ignore_errors=True)
    rows = []
    for same in zip(*per_rank, strict=True):
        row = {name: same[0][name] for name in ("dtype", "tokens_per_rank")}
        for side in same[0]["times"]:
            slowest = map(max, zip(*(one["times"][side] for one in same), strict=True))
            row[f"{side}_ms"] = round(statistics.median(slowest) * 1e3, 4)
        rows.append({**row, "ratio": round(row["gloo_ms"] / row["socket_ms"], 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--mpi", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        rank_main(load_mpi().COMM_WORLD.rank if options.mpi else options.rank, options.folder, options.mpi)
        return
    begin = time.monotonic()
    rows = run()
    report = {"ranks": RANKS, "hidden": HIDDEN, "experts": EXPERTS, "top_k": TOP_K, "cores": len(os.sched_getaffinity(0)), "rows": rows}
    if options.json:
        print(json.dumps(report))
        return
    print(f"dispatch + combine, {RANKS} ranks on {report['cores']} cores, hidden {HIDDEN}, top-{TOP_K} of {EXPERTS} experts; medians")
    sides = [name.removesuffix("_ms") for name in rows[0] if name.endswith("_ms")]
    print(f"{'dtype':>9} {'tokens':>7}" + "".join(f"{side + ' ms':>11}" for side in sides) + f" {'gloo/socket':>12}")
    for row in rows:
        times = "".join(f"{row[side + '_ms']:>11.3f}" for side in sides)
        print(f"{row['dtype']:>9} {row['tokens_per_rank']:>7}{times} {row['ratio']:>11.2f}x")
    print(f"{time.monotonic() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
