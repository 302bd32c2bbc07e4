"""What it costs that a row's bits do not depend on its batch: the engine with and without that promise, beside transformers' own forward.

One process, one thread, the demo checkpoint (100 M parameters). Contenders take turns within each round, so that a busy machine slows
all alike; times are medians over the rounds. `transformers` runs its best implementation of the experts and a DynamicCache, prefilled to
the same context; it gets a batch of equal lengths, which is its easiest case.

    python benchmarks/models.py [--dtype bfloat16] [--checkpoint DIR] [--rounds 15] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from elastic_ep.brain.messages import SamplingParams, SequenceWork
from elastic_ep.core.placement import ExpertPlacement
from elastic_ep.core.routing import RoutingTable
from elastic_ep.core.topology import Topology
from elastic_ep.models.demo_checkpoint import ensure_demo_checkpoint
from elastic_ep.models.engine import ElasticEngine
from elastic_ep.models.spec import inspect_checkpoint
from elastic_ep.runtime.dispatch.local import LocalDispatcher
from elastic_ep.runtime.engine import SlotLoad

CONTEXT = 128
GREEDY = SamplingParams(temperature=0)


class Engine:
    """All experts on one rank."""

    def __init__(self, folder: Path, dtype: str, fast_math: bool):
        spec = inspect_checkpoint(folder)
        self.engine = ElasticEngine(folder, 0, spec.num_experts, kv_tokens=40 * 256, dtype=dtype, fast_math=fast_math)
        self.engine.make_slots()
        self.engine.load_dense()
        for layer in range(spec.num_layers):
            for expert in range(spec.num_experts):
                self.engine.slots.load(SlotLoad(layer, expert, expert))
        placement = ExpertPlacement(np.tile(np.arange(spec.num_experts), (spec.num_layers, 1)), spec.num_experts)
        self.routing = RoutingTable.build(0, placement, Topology((spec.num_experts,)))
        self.dispatcher = LocalDispatcher()

    def step(self, work: list[SequenceWork], release: list[int]) -> None:
        self.engine.run_step(work, release, self.routing, self.dispatcher, 0)

    def decode(self, prompts: torch.Tensor) -> Callable[[], None]:
        batch = range(len(prompts))
        for i in batch:
            self.step([SequenceWork(i, 0, tuple(prompts[i].tolist()), GREEDY)], [])
        work = [SequenceWork(i, CONTEXT, (65 + i,), GREEDY) for i in batch]
        return lambda: self.step(work, [])

    def prefill(self, prompts: torch.Tensor) -> Callable[[], None]:
        work = [SequenceWork(0, 0, tuple(prompts[0].tolist()), GREEDY)]
        return lambda: self.step(work, [0])

    def clear(self, batch: int) -> None:
        self.step([], list(range(batch)))


class Transformers:
    """The library's own forward."""

    def __init__(self, folder: Path, dtype: str, attention: str):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation=attention)

    def decode(self, prompts: torch.Tensor) -> Callable[[], None]:
        cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            self.model(prompts, past_key_values=cache, logits_to_keep=1)
        last = torch.arange(65, 65 + len(prompts)).unsqueeze(1)

        def run() -> None:
            with torch.inference_mode():
                self.model(last, past_key_values=cache, logits_to_keep=1).logits.argmax(-1).tolist()
            cache.crop(-1)

        return run

    def prefill(self, prompts: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                cache = DynamicCache(config=self.model.config)
                self.model(prompts, past_key_values=cache, logits_to_keep=1).logits.argmax(-1).tolist()

        return run

    def clear(self, batch: int) -> None:
        pass


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    folder = args.checkpoint or ensure_demo_checkpoint(Path(tempfile.gettempdir()) / "elastic-ep-benchmark-model")
    contenders = {
        "invariant": Engine(folder, args.dtype, fast_math=False),
        "fast_math": Engine(folder, args.dtype, fast_math=True),
        "transformers_eager": Transformers(folder, args.dtype, "eager"),
        "transformers_sdpa": Transformers(folder, args.dtype, "sdpa"),
    }
    cases = [("decode", 1), ("decode", 8), ("decode", 32), ("prefill", 128), ("prefill", 512)]
    rows = []
    generator = torch.Generator().manual_seed(1)
    for kind, size in cases:
        shape = (size, CONTEXT) if kind == "decode" else (1, size)
        prompts = torch.randint(32, 127, shape, generator=generator)
        seconds = measure({name: getattr(c, kind)(prompts) for name, c in contenders.items()}, args.rounds)
        for contender in contenders.values():
            contender.clear(size if kind == "decode" else 1)
        best = min(seconds["transformers_eager"], seconds["transformers_sdpa"])
        row = {"case": f"{kind} {size}", "tokens_per_s": {name: round(size / s, 1) for name, s in seconds.items()}}
        row["invariant_over_fast_math"] = round(seconds["fast_math"] / seconds["invariant"], 3)
        row["invariant_over_transformers"] = round(best / seconds["invariant"], 3)
        rows.append(row)
        if not args.json:
            speeds = "  ".join(f"{name} {value:8.1f}" for name, value in row["tokens_per_s"].items())
            print(f"{row['case']:12} tokens/s: {speeds}   invariant is {row['invariant_over_fast_math']:.2f} x fast math, ", end="")
            print(f"{row['invariant_over_transformers']:.2f} x transformers' best", flush=True)
    if args.json:
        print(json.dumps({"dtype": args.dtype, "threads": 1, "cases": rows}))


if __name__ == "__main__":
    main()
