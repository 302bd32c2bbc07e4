"""A position's logits are the same bits however it was computed: promise 1 rests on this."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from elastic_ep.brain.messages import SequenceWork
from elastic_ep.models.demo_checkpoint import ensure_demo_checkpoint
from tests.checkpoints import FAMILIES
from tests.models.gpu_world import GpuWorld, needs_gpu
from tests.models.world import GREEDY, World

DTYPES = ("float32", "bfloat16")


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("ELASTIC_EP_TEST_SEED", 0)) or random.SystemRandom().randrange(1 << 32)
    print(f"ELASTIC_EP_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=needs_gpu)])
def make_world(request: pytest.FixtureRequest) -> type[World]:
    return GpuWorld if request.param == "gpu" else World


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(160) for _ in range(count)]


def random_cuts(rng: random.Random, count: int) -> list[int]:
    """Ends of random chunks, many of them small."""
    cuts = [0]
    while cuts[-1] < count:
        cuts.append(min(count, cuts[-1] + rng.choice([1, 1, 2, 3, 5, 8, 13, 30, 64, 65, 100])))
    return cuts[1:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
class TestBits:
    def test_chunking(self, family: str, dtype: str, checkpoint: Callable[..., Path], rng: random.Random, make_world: type[World]) -> None:
        world = make_world(checkpoint(family, dtype))
        tokens = random_tokens(rng, 150)
        one_by_one = world.logits_at(1, tokens, range(1, 151))
        for cuts in ([150], [64, 128, 150], [7, 71, 149, 150], random_cuts(rng, 150), random_cuts(rng, 150)):
            for position, logits in world.logits_at(2, tokens, cuts).items():
                assert torch.equal(logits, one_by_one[position]), f"position {position} with chunks ending at {cuts}"

    def test_company(self, family: str, dtype: str, checkpoint: Callable[..., Path], rng: random.Random, make_world: type[World]) -> None:
        """Sequences in random chunks beside random others, in random order, against each alone."""
        world = make_world(checkpoint(family, dtype))
        sequences = {i: random_tokens(rng, rng.randrange(1, 110)) for i in range(7)}
        alone = {i: world.logits_at(i, tokens, range(1, len(tokens) + 1)) for i, tokens in sequences.items()}
        ends = {i: [0, *random_cuts(rng, len(tokens))] for i, tokens in sequences.items()}
        while ends:
            chosen = rng.sample(sorted(ends), rng.randrange(1, len(ends) + 1))
            work = [SequenceWork(i, ends[i][0], tuple(sequences[i][ends[i][0] : ends[i][1]]), GREEDY) for i in chosen]
            world.step(work)
            for item in work:
                position = item.start + len(item.tokens) - 1
                assert torch.equal(world.engine.logits[item.seq_id], alone[item.seq_id][position]), f"{item.seq_id} at {position}"
                ends[item.seq_id].pop(0)
                if len(ends[item.seq_id]) == 1:
                    del ends[item.seq_id]

    def test_slots_and_streaming(
        self, family: str, dtype: str, checkpoint: Callable[..., Path], rng: random.Random, make_world: type[World]
    ) -> None:
        """Experts in other slots, twice, or in no slot at all."""
        folder = checkpoint(family, dtype)
        world = make_world(folder)
        spec = world.engine.spec
        tokens = random_tokens(rng, 40)
        expected = world.logits_at(1, tokens, [11, 12, 13, 40])
        every = list(range(spec.num_experts))
        shuffled = [rng.sample(every + every[:3], len(every) + 3) for _ in range(spec.num_layers)]
        partly = [rng.sample(every, len(every) - 3) for _ in range(spec.num_layers)]
        for slots in (shuffled, partly, [[] for _ in range(spec.num_layers)]):
            for position, logits in make_world(folder, slots, num_spare=2).logits_at(1, tokens, [11, 12, 13, 40]).items():
                assert torch.equal(logits, expected[position]), f"position {position} with slots {slots}"

    def test_a_void_step_leaves_no_trace(
        self, family: str, dtype: str, checkpoint: Callable[..., Path], rng: random.Random, make_world: type[World]
    ) -> None:
        """Positions computed from other tokens, then computed again: overwritten."""
        world = make_world(checkpoint(family, dtype))
        tokens, others = random_tokens(rng, 90), random_tokens(rng, 90)
        expected = world.logits_at(1, tokens, [50, 90])
        world.step([SequenceWork(2, 0, tuple(tokens[:50]), GREEDY)])
        world.step([SequenceWork(2, 50, tuple(others[50:]), GREEDY)])
        world.step([SequenceWork(2, 50, tuple(tokens[50:]), GREEDY)])
        assert torch.equal(world.engine.logits[2], expected[89])


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes(dtype: str, tmp_path_factory: pytest.TempPathFactory, rng: random.Random, make_world: type[World]) -> None:
    """The demo's model: a prompt of 600 tokens at once, in chunks beside decodes, and its last tokens one by one."""
    world = make_world(ensure_demo_checkpoint(tmp_path_factory.getbasetemp() / "demo"), dtype=dtype)
    tokens = [rng.randrange(256) for _ in range(600)]
    at_once = world.logits_at(1, tokens, [600])[599]
    assert torch.equal(world.logits_at(1, tokens, [*random_cuts(rng, 592), *range(593, 601)])[599], at_once)
    others = [SequenceWork(10 + i, 0, tuple(rng.randrange(256) for _ in range(rng.randrange(1, 9))), GREEDY) for i in range(20)]
    world.step([SequenceWork(1, 0, tuple(tokens[:577]), None)])
    world.step([*others, SequenceWork(1, 577, tuple(tokens[577:]), GREEDY)])
    assert torch.equal(world.engine.logits[1], at_once)


def test_the_company_test_can_fail(checkpoint: Callable[..., Path]) -> None:
    """Without padding a lone decode takes another matrix kernel than a prefill: the comparison above would see it."""
    world = World(checkpoint("qwen3_moe"), fast_math=True)
    tokens = random_tokens(random.Random(5), 60)
    one_by_one, at_once = world.logits_at(1, tokens, range(1, 61)), world.logits_at(2, tokens, [60])
    assert not torch.equal(one_by_one[59], at_once[59])
    assert torch.allclose(one_by_one[59], at_once[59], atol=1e-3)
