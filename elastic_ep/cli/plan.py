"""`elastic-ep plan`: where experts would go, what that survives, and what a failure would cost, without any server."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_ep.cli import plan_load, plan_report
from elastic_ep.cli.plan_plot import check_plot, draw
from elastic_ep.cli.plan_report import Case, Report
from elastic_ep.core.eplb.resilient import PlacementPlan, solve_placement
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.load import drift_load
from elastic_ep.core.survivability import required_slots, survives
from elastic_ep.core.topology import Topology

TIMED_RUNS, TIMED_SECONDS = 5, 0.5


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="plan a placement and ask what it survives",
        description="Place the experts of a model over ranks: the balance beside its bound, what failures lose, what killing ranks or a "
        "change of load would move. With --survive, how many redundant experts a guarantee takes.",
    )
    shape = parser.add_argument_group("model and load")
    models = ", ".join(plan_load.MODELS)
    shape.add_argument("--model-shape", metavar="NAME|LxE", help=f"{models}, or layers x experts such as 58x256")
    shape.add_argument("--layers", type=int, metavar="L", help="MoE layers")
    shape.add_argument("--experts", type=int, metavar="E", help="routed experts per layer")
    shape.add_argument("--expert-bytes", type=int, metavar="B", help="bytes of one expert of one layer (default: DeepSeek-V3's in fp8)")
    load_help = "uniform, lognormal[:SIGMA], zipf[:EXPONENT], bursty[:FACTOR], or a .json, .npy, .npz or .pt file (default: lognormal:1)"
    shape.add_argument("--load", default="lognormal:1", metavar="SPEC", help=load_help)
    shape.add_argument("--seed", type=int, default=0, help="of the generators (default: 0)")
    where = parser.add_argument_group("topology")
    where.add_argument("--ranks", type=int, required=True, metavar="N", help="expert-parallel ranks")
    where.add_argument("--slots", type=int, metavar="P", help="physical slots per layer over all ranks (default: one per rank to spare)")
    where.add_argument("--nodes", type=int, metavar="N", help="nodes that the ranks are spread over in equal, contiguous parts")
    where.add_argument("--domain", action="append", default=[], metavar="LEVEL=N", help="another level of N equal parts, e.g. rack=2")
    rules = parser.add_argument_group("rules")
    rules.add_argument("--min-replicas", type=int, default=1, metavar="M", help="replicas of each expert on distinct domains (default: 1)")
    rules.add_argument("--spread", default="rank", metavar="LEVEL", help="the level of those domains (default: rank)")
    rules.add_argument("--tolerance", type=float, default=0.02, metavar="T", help="a repair leaves layers this close to the bound (0.02)")
    rules.add_argument("--max-moves", type=int, metavar="N", help="moves of a repair at most, those that cover lost experts apart")
    ask = parser.add_argument_group("questions")
    ask.add_argument("--kill", metavar="RANKS", help="these ranks die, e.g. 5,6 or node=2")
    ask.add_argument("--drift", type=float, metavar="SIGMA", help="each load changes by a lognormal factor of this sigma, e.g. 0.1")
    ask.add_argument("--survive", metavar="LEVEL=N", help="how many slots surviving any N of them takes, e.g. ranks=2 or node=1")
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print one JSON object")
    out.add_argument("--out", metavar="FILE.npz", help="write load, maps and quotas")
    out.add_argument("--plot", metavar="FILE", help="draw the rank loads to a .png or .svg (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    if args.plot:
        check_plot(args.plot)
    if args.out and Path(args.out).suffix != ".npz":
        raise InvalidInputError(f"cannot write {args.out!r}; give a name that ends in .npz")
    load, expert_bytes = _load(args)
    if args.survive:
        return _answer_survive(args, load, expert_bytes)
    topology = _topology(args, load.shape[1])
    report = _report(args, load, topology, expert_bytes)
    if args.out:
        _write(report, args.out)
    if args.plot:
        draw(report, args.plot)
    print(json.dumps(plan_report.to_json(report)) if args.json else plan_report.to_text(report))
    return 0


def _load(args: argparse.Namespace) -> tuple[NDArray[np.float64], int]:
    """The load, and the bytes of an expert."""
    shape = plan_load.parse_shape(args.model_shape or "deepseek-v3", args.expert_bytes)
    num_layers, num_experts = args.layers, args.experts
    if args.model_shape:
        num_layers, num_experts = num_layers or shape.num_layers, num_experts or shape.num_experts
    if not plan_load.is_generator(args.load):
        load = plan_load.read_load(args.load)
        for name, given, found in (("layers", num_layers, load.shape[0]), ("experts", num_experts, load.shape[1])):
            if given is not None and given != found:
                raise InvalidInputError(f"load file {args.load!r} has {found} {name}, not {given}")
        return load, shape.expert_bytes
    if num_layers is None or num_experts is None:
        raise InvalidInputError("the size of the model is missing; give --model-shape, or --layers and --experts, or a load file")
    if num_layers < 1 or num_experts < 1:
        raise InvalidInputError(f"{num_layers} layers x {num_experts} experts; give at least one of each")
    return plan_load.make_load(args.load, num_layers, num_experts, args.seed), shape.expert_bytes


def _topology(args: argparse.Namespace, num_experts: int, num_slots: int | None = None) -> Topology:
    if args.ranks < 1:
        raise InvalidInputError(f"--ranks is {args.ranks}; give at least 1")
    if num_slots is None:
        num_slots = args.slots
    if num_slots is None:
        num_slots = (-(-num_experts * max(1, args.min_replicas) // args.ranks) + 1) * args.ranks
    domains = {}
    for level, count in ([("node", args.nodes)] if args.nodes is not None else []) + [_level(text) for text in args.domain]:
        if count < 1 or args.ranks % count:
            raise InvalidInputError(f"{args.ranks} ranks do not divide over {count} {level} domains; give a number that divides them")
        domains[level] = tuple(str(rank // (args.ranks // count)) for rank in range(args.ranks))
    return Topology(Topology.uniform(args.ranks, num_slots).slots_per_rank, domains)


def _level(text: str) -> tuple[str, int]:
    """LEVEL=N; a plural is the same level."""
    level, _, count = text.partition("=")
    if not level or not count.isdigit():
        raise InvalidInputError(f"{text!r} is not LEVEL=NUMBER; write for example node=1")
    return {"ranks": "rank", "nodes": "node"}.get(level, level), int(count)


def _killed(text: str, topology: Topology) -> list[int]:
    """Ranks named one by one, or by a domain."""
    killed: set[int] = set()
    for part in text.split(","):
        level, equals, label = part.strip().partition("=")
        if equals:
            ranks = [r for r, found in enumerate(topology.labels(level)) if found == label]
            if not ranks:
                raise InvalidInputError(f"no {level} is named {label!r}; there are {', '.join(dict.fromkeys(topology.labels(level)))}")
            killed.update(ranks)
        elif not level.isdigit() or int(level) >= topology.ep_size:
            raise InvalidInputError(f"cannot kill rank {part.strip()!r}; ranks are 0 to {topology.ep_size - 1}")
        else:
            killed.add(int(level))
    if len(killed) == topology.ep_size:
        raise InvalidInputError("killing every rank leaves nothing to plan; spare one")
    return sorted(killed)


def _timed(solve: Callable[[], PlacementPlan]) -> tuple[PlacementPlan, float]:
    """The plan, and the best time of up to five warm runs, in milliseconds."""
    plan, best, spent, runs = solve(), float("inf"), 0.0, 0
    while runs < TIMED_RUNS and (runs == 0 or spent < TIMED_SECONDS):
        start = time.perf_counter()
        plan = solve()
        elapsed = time.perf_counter() - start
        best, spent, runs = min(best, elapsed), spent + elapsed, runs + 1
    return plan, best * 1e3


def _with_moves(plan: PlacementPlan) -> PlacementPlan:
    """The plan with its moves in order, which belongs to the time of a repair."""
    assert plan.move_table.shape[1] == 3
    return plan


def _report(args: argparse.Namespace, load: NDArray[np.float64], topology: Topology, expert_bytes: int) -> Report:
    rules: dict[str, Any] = {"min_replicas": args.min_replicas, "spread": args.spread, "tolerance": args.tolerance}
    active = np.ones(topology.ep_size, dtype=np.int64)
    plan, solve_ms = _timed(lambda: solve_placement(load, topology, active, **rules))
    first = Case(load, active, plan, solve_ms)
    repair = None
    if args.kill or args.drift is not None:
        later, left = load, active.copy()
        if args.drift is not None:
            if args.drift < 0:
                raise InvalidInputError(f"--drift is {args.drift}; give 0 or more")
            later = drift_load(load, args.drift, args.seed + 1)
        if args.kill:
            left[_killed(args.kill, topology)] = 0
        rules["max_moves"] = args.max_moves
        plan, solve_ms = _timed(lambda: _with_moves(solve_placement(later, topology, left, first.plan.placement, **rules)))
        repair = Case(later, left, plan, solve_ms)
    return Report(topology, first, repair, survives(first.plan.placement, topology), expert_bytes)


def _answer_survive(args: argparse.Namespace, load: NDArray[np.float64], expert_bytes: int) -> int:
    level, failures = _level(args.survive)
    need = required_slots(load.shape[1], _topology(args, load.shape[1], args.ranks), failures, level)
    topology = _topology(args, load.shape[1], need.num_slots)
    plan = solve_placement(load, topology, np.ones(args.ranks), min_replicas=need.min_replicas, spread=level)
    found = survives(plan.placement, topology)
    if found.any_domains[level] < failures:
        raise AssertionError(f"{need} was not enough: {found.any_domains}")
    if args.json:
        answer = {
            "level": level,
            "failures": failures,
            "min_replicas": need.min_replicas,
            "slots": need.num_slots,
            "redundant_experts": need.num_redundant,
            "slots_per_rank": need.slots_per_rank,
            "expert_bytes_per_rank": need.slots_per_rank * load.shape[0] * expert_bytes,
            "balance": plan.balance,
            "balance_with_quotas": plan.balance_with_quotas,
            "survives": {"any_ranks": found.any_ranks, "domains": found.domains},
        }
        print(json.dumps(answer))
    else:
        print(plan_report.requirement_text(need, expert_bytes, load.shape[0], plan.balance_with_quotas))
    return 0


def _write(report: Report, path: str) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "load": report.first.load,
        "physical_to_logical_map": report.first.plan.placement.physical_to_logical_map,
        "quotas": report.first.plan.quotas,
        "slots_per_rank": np.array(report.topology.slots_per_rank),
    }
    if report.repair is not None:
        arrays["repaired_load"] = report.repair.load
        arrays["repaired_active_ranks"] = report.repair.active
        arrays["repaired_physical_to_logical_map"] = report.repair.plan.placement.physical_to_logical_map
        arrays["repaired_quotas"] = report.repair.plan.quotas
    try:
        np.savez_compressed(path, allow_pickle=False, **arrays)
    except OSError as error:
        raise InvalidInputError(f"cannot write {path!r}: {error.strerror}") from error
