"""`elastic-ep simulate`: check the promises over many seeds, or see what months of failures would cost a deployment."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from dataclasses import asdict, replace
from typing import Any

from elastic_ep.cli import plan_load, simulate_plot
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.links import LinkSpeeds
from elastic_ep.sim.capacity.group import Group
from elastic_ep.sim.capacity.rates import parse_rate
from elastic_ep.sim.capacity.report import figures
from elastic_ep.sim.capacity.setup import Prices, Setup
from elastic_ep.sim.check import Outcome
from elastic_ep.sim.check import run as run_schedule
from elastic_ep.sim.schedule import Schedule, draw
from elastic_ep.sim.shrink import shrink
from elastic_ep.sim.sweep import Sweep, sweep

EXIT_VIOLATION = 1
PLACE_ALL_BELOW = 500_000
"""layers x experts x ranks up to which every layer is placed. Beyond it, and with an even load, under which all are placed alike, one
stands for all: all that it moves goes over the same links, so times come out as upper bounds."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "simulate",
        help="check the promises under a seed, or see what months of failures cost",
        description="With --seed or --seeds: run schedules of faults against the controller that serves, under virtual time, and check "
        "every promise after every event (exit status 1 on a violation). With --hours: what failures cost a deployment.",
    )
    check = parser.add_argument_group("check the promises")
    check.add_argument("--seed", type=int, metavar="N", help="one schedule")
    check.add_argument("--seeds", metavar="A..B", help="schedules A up to, not including, B")
    check.add_argument("--shape", metavar="LxE", help="layers x experts of the simulated model (default: drawn by the seed)")
    check.add_argument("--shrink", action="store_true", help="make the first failing schedule shorter")
    check.add_argument("--trace-events", action="store_true", help="print what happened, event by event (with --seed)")
    check.add_argument("--processes", type=int, metavar="N", help="processes to use (default: one per core)")
    plan = parser.add_argument_group("plan a deployment")
    plan.add_argument("--hours", type=float, metavar="H", help="how long to simulate; a year is 8766")
    plan.add_argument("--failure-rate", default="meta", metavar="R", help="llama3, meta, or failures per GPU-hour (default: meta)")
    models = ", ".join(plan_load.MODELS)
    plan.add_argument("--model-shape", default="deepseek-v3", metavar="NAME|LxE", help=f"{models}, or LxE (default: deepseek-v3)")
    plan.add_argument("--expert-bytes", type=int, metavar="B", help="bytes of one expert of one layer")
    plan.add_argument("--slots-per-rank", type=int, metavar="K", help="of one layer (default: what the experts need, and one to spare)")
    plan.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="default: 8")
    plan.add_argument("--trace", metavar="FILE", help="recorded expert loads: .json, .npy, .npz or .pt (default: an even load)")
    plan.add_argument("--tokens-per-second", type=float, default=1000.0, metavar="T", help="of one rank (default: 1000)")
    for name, value in asdict(Prices()).items():
        plan.add_argument(f"--{name.replace('_s', '-s')}", type=float, default=value, metavar="S", help=f"seconds (default: {value:g})")
    for name, value in asdict(LinkSpeeds()).items():
        option = f"--{name.replace('_', '-')}-bytes-per-s"
        plan.add_argument(option, type=float, default=value, metavar="B", help=f"bandwidth (default: {value:g})")
    plan.add_argument("--plot", metavar="FILE", help="draw capacity and pauses to a .png or .svg (needs matplotlib)")
    both = parser.add_argument_group("both")
    both.add_argument("--ranks", type=int, metavar="N", help="expert-parallel ranks (default: 2 to 4 by seed; 320 with --hours)")
    both.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    asked = [name for name in ("seed", "seeds", "hours") if getattr(args, name) is not None]
    if asked != ["hours"] and asked != ["seed", "hours"] and len(asked) != 1:
        raise InvalidInputError(f"give one of --seed N, --seeds A..B and --hours H, not {' and '.join('--' + a for a in asked) or 'none'}")
    if args.ranks is not None and not 1 <= args.ranks <= 4096:
        raise InvalidInputError(f"--ranks is {args.ranks}; give 1 to 4096")
    if args.processes is not None and args.processes < 1:
        raise InvalidInputError(f"--processes is {args.processes}; give 1 or more")
    if args.trace_events and (args.seed is None or args.hours is not None):
        raise InvalidInputError("--trace-events shows one schedule; say which by --seed N")
    if args.hours is not None:
        return _plan(args)
    return _check(args)


# ---- checking


def _check(args: argparse.Namespace) -> int:
    seeds = range(args.seed, args.seed + 1) if args.seed is not None else parse_seeds(args.seeds)
    shape = parse_small_shape(args.shape)
    started = time.monotonic()
    if args.seed is not None:
        outcome = run_schedule(draw(args.seed, args.ranks or 0, shape), with_trace=args.trace_events)
        for line in outcome.trace:
            print(line, file=sys.stderr if args.json else sys.stdout)
        found = Sweep(1, outcome.events, outcome.epochs, outcome.tokens, outcome.virtual_s, int(bool(outcome.predicate)))
        found.failures = [outcome] if outcome.predicate else []
    else:
        processes = args.processes or os.cpu_count() or 1
        found = sweep(seeds, ep_size=args.ranks or 0, shape=shape, processes=processes)
    seconds = time.monotonic() - started
    short = None
    if found.failures and args.shrink:
        first = found.failures[0]
        short = shrink(draw(first.seed, args.ranks or 0, shape), first.predicate)
    digest = outcome.digest if args.seed is not None else None
    _print_check(args, found, seconds, digest, short)
    return EXIT_VIOLATION if found.violations else 0


def _print_check(args: argparse.Namespace, found: Sweep, seconds: float, digest: str | None, short: Schedule | None) -> None:
    if args.json:
        totals = {name: getattr(found, name) for name in ("schedules", "events", "epochs", "tokens", "virtual_s", "violations")}
        failures = [{"seed": f.seed, "predicate": f.predicate, "what": f.what, "trace_hash": f.digest} for f in found.failures]
        answer: dict[str, Any] = {**totals, "seconds": seconds, "failures": failures}
        if digest is not None:
            answer["trace_hash"] = digest
        if short is not None:
            answer["shrunk"] = repr(short)
        print(json.dumps(answer))
        return
    rate = found.schedules / seconds if seconds else 0.0
    print(
        f"{found.schedules} schedules, {found.events} events, {found.epochs} epochs, {found.tokens} tokens, {found.virtual_s:.0f} s of "
        f"virtual time in {seconds:.1f} s ({rate:.0f} schedules/s): {found.violations} violations"
    )
    if digest is not None:
        print(f"trace {digest}")
    for failure in found.failures:
        print(_failure_line(failure))
    if short is not None:
        print(f"shrunk to {len(short.faults)} faults and {len(short.requests)} requests:\n  {short}")


def _failure_line(failure: Outcome) -> str:
    return f"seed {failure.seed}: {failure.predicate}: {failure.what} (trace {failure.digest})"


def parse_seeds(text: str) -> range:
    """Seeds from ``A..B``, B not included."""
    match = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise InvalidInputError(f"--seeds is {text!r}; give A..B with A below B, for example 0..1000")
    return range(int(match[1]), int(match[2]))


def parse_small_shape(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not int(match[1]) or not int(match[2]):
        raise InvalidInputError(f"--shape is {text!r}; give layers x experts, for example 2x6")
    return int(match[1]), int(match[2])


# ---- planning


def _plan(args: argparse.Namespace) -> int:
    if not 0 < args.hours <= 1e6:
        raise InvalidInputError(f"--hours is {args.hours:g}; give up to a million, a year is 8766")
    if args.plot is not None:
        simulate_plot.check_plot(args.plot)
    rate, setup = parse_rate(args.failure_rate), make_setup(args)
    started = time.monotonic()
    history = Group(setup, rate, args.seed or 0).run(args.hours)
    found = figures(setup, history, args.hours)
    found |= {"failure_rate": rate, "seed": args.seed or 0, "seconds": time.monotonic() - started}
    if args.plot is not None:
        simulate_plot.draw(setup, history, found, args.plot)
    print(json.dumps(found) if args.json else simulate_plot.as_text(found))
    return 0


def make_setup(args: argparse.Namespace) -> Setup:
    """The deployment that the options describe. Raises InvalidInputError."""
    shape, ranks = plan_load.parse_shape(args.model_shape, args.expert_bytes), args.ranks or 320
    slots = args.slots_per_rank or -(-shape.num_experts // ranks) + 1
    for name in ("slots_per_rank", "ranks_per_node", "tokens_per_second", *(f"{n}_bytes_per_s" for n in asdict(LinkSpeeds()))):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise InvalidInputError(f"--{name.replace('_', '-')} is {value:g}; give more than 0")
    prices = Prices(**{name: getattr(args, name) for name in asdict(Prices())})
    for name, value in asdict(prices).items():
        if not 0 <= value < float("inf"):
            raise InvalidInputError(f"--{name.replace('_', '-')} is {value:g}; give 0 seconds or more")
    speeds = LinkSpeeds(**{name: getattr(args, f"{name}_bytes_per_s") for name in asdict(LinkSpeeds())})
    everything = shape.num_layers * shape.num_experts * ranks <= PLACE_ALL_BELOW
    setup = Setup(
        ranks,
        slots,
        args.ranks_per_node,
        shape.num_layers,
        shape.num_experts,
        shape.expert_bytes,
        shape.num_layers if everything or args.trace else 1,
        speeds=speeds,
        prices=prices,
        tokens_per_s=args.tokens_per_second,
    )
    if args.trace is None:
        return setup
    load = plan_load.read_load(args.trace)
    if load.shape != (shape.num_layers, shape.num_experts):
        raise InvalidInputError(
            f"--trace {args.trace!r} holds loads of {load.shape}; the model has {shape.num_layers} x {shape.num_experts}"
        )
    return replace(setup, load=load)
