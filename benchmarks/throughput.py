"""Tokens per second of elastic-ep over 2 ranks (one thread each) beside transformers' own continuous batching in one process (two
threads), on the same checkpoint and requests, greedy, in one run, in rotating order. Also elastic-ep with failure detection off: what being
elastic costs. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import time
from pathlib import Path
from typing import Any

import uvloop

NUM_REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 32, 64, 48
EP_SIZE = 2
VARIANTS = ("elastic-ep", "elastic-ep --fast-math", "elastic-ep, detection off", "transformers")


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(32, 127) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_REQUESTS)]


def serve_elastic(checkpoint: str, options: dict[str, Any], pipe: Any) -> None:
    """A process that runs the requests through the controller's own interface each time it is told to."""
    from elastic_ep.brain.events import GenerationRequest
    from elastic_ep.brain.messages import SamplingParams
    from elastic_ep.models.spec import inspect_checkpoint
    from elastic_ep.serving.config import ServeConfig
    from elastic_ep.serving.controller import Controller

    async def run() -> None:
        config = ServeConfig(checkpoint, EP_SIZE, **options)
        async with Controller(config, inspect_checkpoint(checkpoint)) as controller:
            await controller.wait_serving()

            async def one(name: str, prompt: list[int]) -> list[int]:
                request = GenerationRequest(name, tuple(prompt), NEW_TOKENS, SamplingParams(temperature=0.0))
                return [event.token.token async for event in controller.submit(request) if event.token]

            pipe.send("ready")
            turn = 0
            while await asyncio.to_thread(pipe.recv):
                start = time.perf_counter()
                tokens = await asyncio.gather(*(one(f"{turn}.{i}", p) for i, p in enumerate(prompts())))
                pipe.send((time.perf_counter() - start, tokens))
                turn += 1
            controller.stopped.set()

    uvloop.run(run())


def serve_transformers(checkpoint: str, pipe: Any) -> None:
    """The peer: `generate_batch` of one process over all cores."""
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(EP_SIZE)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    generation = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=512, page_size=32)
    pipe.send("ready")
    while pipe.recv():
        start = time.perf_counter()
        outputs = model.generate_batch(prompts(), generation_config=generation, continuous_batching_config=batching, progress_bar=False)
        took = time.perf_counter() - start
        pipe.send((took, [list(output.generated_tokens) for output in outputs.values()]))


def start(variant: str, checkpoint: str) -> tuple[Any, Any]:
    options = {"elastic-ep --fast-math": {"fast_math": True}, "elastic-ep, detection off": {"detect": False}}.get(variant, {})
    ours, theirs = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")
    if variant == "transformers":
        process = spawn.Process(target=serve_transformers, args=(checkpoint, theirs))
    else:
        process = spawn.Process(target=serve_elastic, args=(checkpoint, options, theirs))
    process.start()
    assert ours.recv() == "ready"
    return process, ours


def main() -> None:
    from elastic_ep.models.demo_checkpoint import ensure_demo_checkpoint

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="default: a generated one of 100 M parameters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    checkpoint = str(args.checkpoint or ensure_demo_checkpoint(Path.home() / ".cache" / "elastic-ep" / "demo-checkpoint-1"))
    running = {variant: start(variant, checkpoint) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    tokens: dict[str, Any] = {}
    for turn in range(args.rounds + 1):
        order = VARIANTS[turn % len(VARIANTS) :] + VARIANTS[: turn % len(VARIANTS)]  # nobody always runs after the same one
        for variant in order:
            pipe = running[variant][1]
            pipe.send(True)
            took, tokens[variant] = pipe.recv()
            if turn:
                times[variant].append(took)
    for process, pipe in running.values():
        pipe.send(False)
        process.join(30)
    total = NUM_REQUESTS * NEW_TOKENS
    rate = {variant: total / statistics.median(took) for variant, took in times.items()}
    paired = {v: statistics.median(b / a for a, b in zip(times[v], times["transformers"], strict=True)) for v in VARIANTS}
    cost = statistics.median(a / b for a, b in zip(times["elastic-ep"], times["elastic-ep, detection off"], strict=True)) - 1
    same = sum(a == b for a, b in zip(tokens["elastic-ep"], tokens["transformers"], strict=True))
    result = {"tokens_per_s": rate, "ratio_to_transformers": paired, "cost_of_detection": cost, "streams_equal_to_transformers": same}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{NUM_REQUESTS} requests, {PROMPT_TOKENS} prompt + {NEW_TOKENS} new tokens, medians of {args.rounds} rounds")
    for variant in VARIANTS:
        print(f"  {variant:28} {rate[variant]:8.0f} tokens/s   {paired[variant]:5.2f} x transformers")
    print(f"  failure detection costs {cost * 100:+.1f} % time; {same} of {NUM_REQUESTS} streams equal transformers' to the token")


if __name__ == "__main__":
    main()
