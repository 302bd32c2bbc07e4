"""The placement solver: time, balance, moves and what failures lose, beside the bars it is held to and peers in the same run.

Peers are timed where they can be had: vLLM's default policy and SGLang's elastic one if they can be imported, DeepSeek's file or any of
these by path. They get the same loads; every side takes turns; medians of wall time on one thread are compared.

    python benchmarks/placement.py [--json] [--peer-path deepseek=eplb.py] [--peer-path vllm=default.py] [--peer-path sglang=FILE]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from elastic_ep.core.eplb import kernels
from elastic_ep.core.eplb.resilient import PlacementPlan, solve_placement
from elastic_ep.core.load import drift_load, generate_load
from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.quotas import balance_of, level_quotas, rank_loads
from elastic_ep.core.survivability import survives
from elastic_ep.core.topology import Topology

ROUNDS = 15
SEEDS = (1, 2, 3)
MODULES = {
    "vllm": "vllm.distributed.eplb.policy.default",
    "sglang": "sglang.srt.eplb.eplb_algorithms.elasticity_aware",
    "deepseek": "eplb",
}
COLD = """
import time; start = time.perf_counter()
import numpy as np
loaded = time.perf_counter()
from elastic_ep.core.eplb.resilient import solve_placement
from elastic_ep.core.topology import Topology
solve_placement(np.random.default_rng(1).lognormal(0, 1, (58, 256)), Topology.uniform(32, 288), np.ones(32))
print(time.perf_counter() - loaded)
"""


@dataclass
class Row:
    """One line of the table. bars: what is measured -> (figure, bar, whether it is met)."""

    case: str
    figures: dict[str, Any]
    bars: dict[str, tuple[float, str, bool]] = field(default_factory=dict)

    def hold(self, name: str, value: float, bar: float, at_least: bool) -> None:
        met = value >= bar if at_least else value <= bar
        self.bars[name] = (value, f"{'>=' if at_least else '<='} {bar}", met)


def medians(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each side; they take turns. A side that is slow is run less often."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for index in range(rounds):
        for name, run in sides.items():
            if index >= 3 and sum(times[name]) > 3.0:
                continue
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


# ---- peers


def load_peers(paths: list[str]) -> dict[str, ModuleType]:
    """Modules by name: those that can be imported, and those given by path."""
    found: dict[str, ModuleType] = {}
    for name, module in MODULES.items():
        try:
            found[name] = importlib.import_module(module)
        except Exception:  # whatever an engine's import fails with, it is not there
            continue
    for text in paths:
        name, _, path = text.partition("=")
        if name not in MODULES or not Path(path).is_file():
            sys.exit(f"--peer-path {text!r}: give NAME=FILE with a name of {', '.join(MODULES)} and a file that exists")
        package = f"peer_{name}"
        parent = ModuleType(package)
        parent.__path__ = [str(Path(path).resolve().parent)]
        sys.modules[package] = parent
        found[name] = importlib.import_module(f"{package}.{Path(path).stem}")
    return found


def full_peers(peers: dict[str, ModuleType], load: np.ndarray, slots: int, ranks: int) -> dict[str, Callable[[], np.ndarray]]:
    """How each peer solves from nothing: a call that gives physical_to_logical_map."""
    if not peers:
        return {}
    import torch

    torch.set_num_threads(1)
    weight, alive = torch.from_numpy(load), torch.ones(ranks, dtype=torch.int32)
    calls: dict[str, Callable[[], np.ndarray]] = {}
    if "deepseek" in peers:
        calls["deepseek"] = lambda: peers["deepseek"].rebalance_experts(weight, slots, 1, 1, ranks)[0].numpy()
    if "vllm" in peers:
        policy = peers["vllm"].DefaultEplbPolicy
        calls["vllm"] = lambda: policy.rebalance_experts(weight, slots, 1, 1, ranks).numpy()
    if "sglang" in peers:
        calls["sglang"] = lambda: peers["sglang"].rebalance_experts(weight, slots, 1, 1, ranks, False, alive)[0].numpy()
    return calls


def even_balance(load: np.ndarray, rows: np.ndarray, topology: Topology, ranks: np.ndarray) -> float:
    return balance_of(rank_loads(load, ExpertPlacement(rows, load.shape[1]), topology), ranks)


def duplicates(rows: np.ndarray, ranks: int) -> int:
    ordered = np.sort(rows.reshape(len(rows), ranks, -1), axis=2)
    return int(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != EMPTY)).sum())


# ---- cases


def full_solve(case: str, load: np.ndarray, slots: int, ranks: int, peers: dict[str, ModuleType]) -> tuple[Row, PlacementPlan]:
    topology, alive = Topology.uniform(ranks, slots), np.ones(ranks)
    plan = solve_placement(load, topology, alive)
    calls = full_peers(peers, load, slots, ranks)
    times = medians({"ours": lambda: solve_placement(load, topology, alive), **calls}, ROUNDS)
    figures = {
        "solve_ms": times["ours"],
        "balance": plan.balance,
        "with_quotas": plan.balance_with_quotas,
        "bound": plan.bound,
        "duplicates": duplicates(plan.placement.physical_to_logical_map, ranks),
    }
    for name, call in calls.items():
        figures[f"{name}_ms"] = times[name]
        figures[f"{name}_ratio"] = times[name] / times["ours"]
        figures[f"{name}_balance"] = even_balance(load, call(), topology, np.arange(ranks))
    row = Row(case, figures)
    row.hold("duplicates", figures["duplicates"], 0, at_least=False)
    return row, plan


def repair(case: str, seed: int, kill: list[int], peers: dict[str, ModuleType]) -> Row:
    load, topology = generate_load("lognormal", 58, 256, seed), Topology.uniform(32, 288)
    first = solve_placement(load, topology, np.ones(32))
    alive = np.ones(32)
    alive[kill] = 0

    def solve() -> PlacementPlan:
        plan = solve_placement(load, topology, alive, first.placement)
        assert len(plan.move_table)
        return plan

    plan, ms = solve(), medians({"ours": lambda: solve()}, ROUNDS)["ours"]
    figures = {
        "solve_ms": ms,
        "lost": len(plan.lost),
        "mandatory": plan.num_mandatory,
        "moves": len(plan.move_table),
        "balance": plan.balance,
        "with_quotas": plan.balance_with_quotas,
    }
    if "sglang" in peers:
        import torch

        mask = torch.from_numpy(alive.astype(np.int32))
        rows = peers["sglang"].rebalance_experts(torch.from_numpy(load), 288, 1, 1, 32, False, mask)[0].numpy()
        live = topology.live_slot_mask(alive)
        figures["sglang_moves"] = int((rows != first.placement.physical_to_logical_map)[:, live].sum())
    row = Row(case, figures)
    row.hold("mandatory - lost", plan.num_mandatory - len(plan.lost), 0, at_least=False)
    row.hold("moves", len(plan.move_table), 2200, at_least=False)
    row.hold("solve_ms", ms, 8.0, at_least=False)
    row.hold("balance", plan.balance, 0.98, at_least=True)
    row.hold("with_quotas", plan.balance_with_quotas, 0.985, at_least=True)
    return row


def node_safe(seed: int) -> Row:
    """Every rank and every node in turn is lost; quotas are levelled anew and nothing is moved."""
    load = generate_load("lognormal", 58, 256, seed)
    topology = Topology.uniform(32, 544, nodes=[str(r // 8) for r in range(32)])
    everyone = np.ones(32)
    plan = solve_placement(load, topology, everyone, min_replicas=2, spread="node")
    ms = medians({"ours": lambda: solve_placement(load, topology, everyone, min_replicas=2, spread="node")}, 5)["ours"]
    after: dict[str, list[float]] = {"rank": [], "node": []}
    lost = mandatory = 0
    for level, groups in (("rank", [[r] for r in range(32)]), ("node", [list(range(8 * n, 8 * n + 8)) for n in range(4)])):
        for group in groups:
            alive = everyone.copy()
            alive[group] = 0
            left = plan.placement.masked(topology, alive)
            lost += len(left.missing_experts())
            quotas = level_quotas(load, left, topology)
            after[level].append(balance_of(rank_loads(load, left, topology, quotas), np.flatnonzero(alive)))
            rules: dict[str, Any] = {"min_replicas": 2, "spread": "node", "max_moves": 0}
            mandatory += solve_placement(load, topology, alive, plan.placement, **rules).num_mandatory
    found = survives(plan.placement, topology)
    figures = {
        "solve_ms": ms,
        "lost": lost,
        "mandatory": mandatory,
        "with_quotas": plan.balance_with_quotas,
        "least_with_quotas_after_rank": min(after["rank"]),
        "least_with_quotas_after_node": min(after["node"]),
        "any_ranks": found.any_ranks,
        "losing_pairs": f"{found.worst_sets[1].losing_sets} of {found.worst_sets[1].num_sets}",
    }
    row = Row(f"544/32 on 4 nodes, two replicas on distinct nodes, seed {seed}", figures)
    row.hold("lost", lost, 0, at_least=False)
    row.hold("mandatory", mandatory, 0, at_least=False)
    for name in ("with_quotas", "least_with_quotas_after_rank", "least_with_quotas_after_node"):
        row.hold(name, figures[name], 0.99, at_least=True)
    return row


def drift(seed: int) -> Row:
    load, topology = generate_load("lognormal", 58, 256, seed), Topology.uniform(32, 288)
    first = solve_placement(load, topology, np.ones(32))
    later = drift_load(load, 0.1, seed + 100)
    before = even_balance(later, first.placement.physical_to_logical_map, topology, np.arange(32))
    plan = solve_placement(later, topology, np.ones(32), first.placement)
    ms = medians({"ours": lambda: solve_placement(later, topology, np.ones(32), first.placement)}, ROUNDS)["ours"]
    figures = {"solve_ms": ms, "balance_before": before, "moves": len(plan.move_table), "balance": plan.balance}
    row = Row(f"load drifts 10 %, 288/32 lognormal, seed {seed}", {**figures, "with_quotas": plan.balance_with_quotas})
    row.hold("moves", len(plan.move_table), 1300, at_least=False)
    row.hold("balance", plan.balance, 0.98, at_least=True)
    return row


def short_of_slots() -> Row:
    load = generate_load("lognormal", 58, 256, 1)
    topology = Topology.uniform(32, 288, nodes=[str(r // 8) for r in range(32)])
    first = solve_placement(load, topology, np.ones(32))
    alive = np.ones(32)
    alive[8:16] = 0
    plan = solve_placement(load, topology, alive, first.placement)
    ms = medians({"ours": lambda: solve_placement(load, topology, alive, first.placement)}, 5)["ours"]
    share = sum(load[layer, expert] for layer, expert in plan.streamed) / load.sum()
    row = Row("an 8-rank node dies, 288/32: 216 slots for 256 experts", {"solve_ms": ms, "streamed": len(plan.streamed)})
    row.figures |= {"streamed_share_of_load": float(share), "moves": len(plan.move_table), "balance": plan.balance, "bound": plan.bound}
    row.hold("streamed", len(plan.streamed), 40 * 58, at_least=False)
    return row


def growth() -> list[Row]:
    rows = []
    for ranks, slots in ((32, 288), (64, 320), (128, 384), (320, 640), (1024, 2048)):
        load, topology = generate_load("lognormal", 58, 256, 1), Topology.uniform(ranks, slots)
        plan = solve_placement(load, topology, np.ones(ranks))
        alive = np.ones(ranks)
        alive[3] = 0
        after = solve_placement(load, topology, alive, plan.placement)
        sides = {
            "solve": partial(solve_placement, load, topology, np.ones(ranks)),
            "repair": partial(solve_placement, load, topology, alive, plan.placement),
        }
        times = medians(sides, 5)
        figures = {"solve_ms": times["solve"], "balance": plan.balance, "bound": plan.bound, "repair_ms": times["repair"]}
        rows.append(Row(f"{ranks} ranks, 58x256, {slots} slots", {**figures, "repair_moves": len(after.move_table)}))
    return rows


def cold_start() -> Row:
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    runs = [subprocess.run([sys.executable, "-c", COLD], env=environment, capture_output=True, text=True, check=True) for _ in range(3)]
    seconds = statistics.median(float(run.stdout) for run in runs)
    row = Row("first solve of a new process, 288/32", {"seconds": seconds, "compiled": kernels.native is not None})
    row.hold("seconds", seconds, 1.0, at_least=False)
    return row


def all_rows(peers: dict[str, ModuleType], all_peers: bool) -> list[Row]:
    rows = [cold_start()]
    for kind in ("lognormal", "zipf"):
        row, _ = full_solve(f"full solve 288/32 {kind}(1)", generate_load(kind, 58, 256, 1), 288, 32, peers)
        row.hold("solve_ms", row.figures["solve_ms"], 5.0, at_least=False)
        row.hold("balance", row.figures["balance"], 0.995, at_least=True)
        for peer, bar in (("vllm", 8), ("deepseek", 100)):
            if peer in peers:
                row.hold(f"{peer}_ratio", row.figures[f"{peer}_ratio"], bar, at_least=True)
        rows.append(row)
    for layers, experts, slots, ranks, bar in (
        (58, 256, 288, 72, 0.99),
        (58, 256, 512, 32, 0.995),
        (94, 128, 160, 32, 0.991),
        (60, 384, 416, 32, 0.997),
    ):
        load = generate_load("lognormal", layers, experts, 1)
        row, _ = full_solve(f"{layers}x{experts} {slots}/{ranks}", load, slots, ranks, peers if all_peers else {})
        row.hold("balance", row.figures["balance"], bar, at_least=True)
        row.hold("solve_ms", row.figures["solve_ms"], 12.0, at_least=False)
        rows.append(row)
    rows += [repair(f"rank {5 * seed} dies, 288/32 lognormal, seed {seed}", seed, [5 * seed], peers if seed == 1 else {}) for seed in SEEDS]
    rows += [node_safe(seed) for seed in SEEDS]
    rows += [drift(seed) for seed in SEEDS]
    return [*rows, short_of_slots(), *growth()]


def show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and abs(value) >= 1.5 else f"{value:.4f}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of a table")
    parser.add_argument(
        "--peer-path", action="append", default=[], metavar="NAME=FILE", help="a peer's file; names: vllm, sglang, deepseek"
    )
    parser.add_argument("--all-peers", action="store_true", help="time peers in every full solve, not only in the first ones")
    args = parser.parse_args()
    rows = all_rows(load_peers(args.peer_path), args.all_peers)
    if args.json:
        print(json.dumps([{"case": r.case, **r.figures, "bars": {k: list(v) for k, v in r.bars.items()}} for r in rows]))
    else:
        for row in rows:
            print(row.case)
            print("    " + "  ".join(f"{name} {show(value)}" for name, value in row.figures.items()))
            for name, (value, bar, met) in row.bars.items():
                print(f"    {'ok  ' if met else 'MISS'} {name} {show(value)} ({bar})")
    return 0 if all(met for row in rows for _, _, met in row.bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
