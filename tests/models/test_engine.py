"""What the rank process relies on: failures come back as values, a wrong expert is fatal, an idle rank still serves."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_ep.brain.messages import SamplingParams, SequenceWork
from elastic_ep.core.errors import InvalidInputError, WrongExpertError
from elastic_ep.models.demo_checkpoint import ensure_demo_checkpoint
from elastic_ep.models.engine import ElasticEngine
from elastic_ep.models.linear import RouterWeight
from elastic_ep.models.rows import padded_rows, row_multiple
from elastic_ep.runtime.dispatch.base import DispatchHandle, FailureKind, Interrupted, PeerFailed
from elastic_ep.runtime.dispatch.local import LocalDispatcher
from elastic_ep.runtime.engine import StepOutput
from tests.checkpoints import FAMILIES
from tests.models.world import GREEDY, World


class FailingDispatcher(LocalDispatcher):
    """Fails the n-th call of one kind, counted from 0."""

    def __init__(self, method: str, nth: int, outcome: PeerFailed | Interrupted):
        super().__init__()
        self.method, self.left, self.outcome = method, nth, outcome

    def _due(self, method: str) -> bool:
        if method != self.method:
            return False
        self.left -= 1
        return self.left < 0

    def dispatch(self, *args: Any) -> Any:
        return self.outcome if self._due("dispatch") else super().dispatch(*args)

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> Any:
        return self.outcome if self._due("combine") else super().combine(y, handle)


class IdleDispatcher(LocalDispatcher):
    """A peer's tokens arrive though this rank has none; keeps what this rank computed for them."""

    def __init__(self, rows: torch.Tensor, groups: tuple[tuple[int, int, int], ...]):
        super().__init__()
        self.rows, self.groups, self.computed = rows, groups, []

    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor, *args: Any) -> DispatchHandle:
        assert x.shape == (0, self.rows.shape[1])
        return DispatchHandle(self.rows, self.groups, topk_ids)

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        self.computed.append(y)
        return y[:0]


@pytest.mark.parametrize("outcome", [PeerFailed({3: FailureKind.CLOSED}), Interrupted()])
@pytest.mark.parametrize("method", ["dispatch", "combine"])
@pytest.mark.parametrize("nth", [0, 1])
def test_a_failed_exchange_voids_the_step(
    method: str, nth: int, outcome: PeerFailed | Interrupted, checkpoint: Callable[..., Path]
) -> None:
    """The very outcome is returned, and the same step run again gives what it would have given."""
    world = World(checkpoint("deepseek_v3"))
    prompt = list(range(20))
    expected = world.generate(1, prompt, 8)
    done: list[int] = []
    work = SequenceWork(2, 0, tuple(prompt), GREEDY)
    for i in range(8):
        failing = FailingDispatcher(method, nth, outcome)
        assert world.engine.run_step([work], [], world.routing, failing, 7) is outcome
        done.append(world.step([work])[2])
        work = SequenceWork(2, len(prompt) + i, (done[-1],), GREEDY)
    assert done == expected


def test_a_step_without_tokens_serves_experts(checkpoint: Callable[..., Path]) -> None:
    world = World(checkpoint("qwen3_moe"))
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    idle = IdleDispatcher(rows, ((2, 0, 1), (7, 1, 5)))
    out = world.engine.run_step([], [], world.routing, idle, 0)
    assert isinstance(out, StepOutput)
    assert out.tokens == []
    assert out.expert_counts is not None
    assert out.expert_counts.tolist() == [[0] * 8] * 2
    assert len(idle.computed) == 2
    alone = IdleDispatcher(rows[3:4], ((7, 0, 1),))
    world.engine.run_step([], [], world.routing, alone, 1)
    for layer in range(2):
        assert torch.equal(alone.computed[layer][0], idle.computed[layer][3])


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_expert_is_fatal(family: str, checkpoint: Callable[..., Path]) -> None:
    """Tokens for an expert that no slot holds and that the routing does not stream here."""
    world = World(checkpoint(family), [[0, 1]] * (2 if family in ("qwen3_moe", "deepseek_v3") else 3))
    width = world.engine.spec.hidden_size
    for expert, epoch_tables in ((3, World(checkpoint(family)).routing),):
        with pytest.raises(WrongExpertError, match=f"expert {expert} of MoE layer 0 in epoch 1"):
            world.engine.run_step([], [], epoch_tables, IdleDispatcher(torch.zeros(1, width), ((expert, 0, 1),)), 0)


def test_expert_counts(checkpoint: Callable[..., Path]) -> None:
    world = World(checkpoint("mixtral"))
    out = world.engine.run_step([SequenceWork(1, 0, tuple(range(11)), None)], [], world.routing, world.dispatcher, 0)
    assert isinstance(out, StepOutput)
    assert out.tokens == []
    assert out.expert_counts is not None
    assert out.expert_counts.sum(axis=1).tolist() == [22, 22, 22], "padding is not counted"
    quiet = World(checkpoint("mixtral"), count_experts=False)
    out = quiet.engine.run_step([SequenceWork(1, 0, (1,), GREEDY)], [], quiet.routing, quiet.dispatcher, 0)
    assert isinstance(out, StepOutput)
    assert out.expert_counts is None


def test_seeded_sampling_does_not_depend_on_company(checkpoint: Callable[..., Path]) -> None:
    seed = int(os.environ.get("ELASTIC_EP_TEST_SEED", 0)) or random.SystemRandom().randrange(1 << 32)
    print(f"ELASTIC_EP_TEST_SEED={seed}")
    rng = random.Random(seed)
    world = World(checkpoint("qwen3_moe", "bfloat16"))
    sampling = {i: SamplingParams(temperature=9.0, top_p=0.95, seed=rng.getrandbits(64), top_logprobs=2) for i in range(5)}
    prompt = tuple(rng.randrange(160) for _ in range(12))
    alone = {i: world.generate(i, prompt, 10, s) for i, s in sampling.items()}
    together: dict[int, list[int]] = {i: [] for i in sampling}
    work = [SequenceWork(i, 0, prompt, s) for i, s in sampling.items()]
    for step in range(10):
        for i, token in world.step(work).items():
            together[i].append(token)
        work = [SequenceWork(i, 12 + step, (together[i][-1],), s) for i, s in sampling.items()]
        rng.shuffle(work)
    assert together == alone
    assert len({tuple(tokens) for tokens in alone.values()}) >= 4, "the seed matters"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float64"}, "float64"),
        ({"kv_tokens": 0}, "kv_tokens 0"),
        ({"local_slots": -1}, "local_slots -1"),
        ({"num_threads": 2}, "more than 1 needs fast math"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=words):
        ElasticEngine(tmp_path, **({"rank": 0, "local_slots": 1, "kv_tokens": 64} | options))


@pytest.mark.parametrize(
    ("tokens", "words"),
    [((), "has no tokens"), ((3, 160, 4), "token 160; the vocabulary has ids 0 to 159"), ((5, -1), "token -1")],
)
def test_impossible_work(tokens: tuple[int, ...], words: str, checkpoint: Callable[..., Path]) -> None:
    world = World(checkpoint("mixtral"))
    with pytest.raises(InvalidInputError, match=f"sequence 4 has {words}|sequence 4 {words}"):
        world.step([SequenceWork(4, 0, tokens, GREEDY)])


def test_close_twice(checkpoint: Callable[..., Path]) -> None:
    world = World(checkpoint("gpt_oss"))
    world.engine.close()
    world.engine.close()
    ElasticEngine(checkpoint("gpt_oss"), 0, 1, 64).close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "hidden", "has_bias"), [(6, 64, False), (6, 64, True), (32, 128, False)])
def test_a_routers_product_knows_no_other_row(num_experts: int, hidden: int, has_bias: bool, dtype: torch.dtype) -> None:
    """The library's bfloat16 product of up to 8 rows had other bits than that of 16, in one of 24,000 elements."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, hidden, generator=generator).to(dtype)
    scale = 1.0 if has_bias else 0.1  # so that the library fails here
    weight = (torch.randn(num_experts, hidden, generator=generator) * scale).to(dtype).as_subclass(RouterWeight)
    bias = torch.randn(num_experts, generator=generator).to(dtype) if has_bias else None
    every = torch.nn.functional.linear(x, weight, bias)
    assert type(every) is torch.Tensor
    for rows in (1, 8, 96):
        parts = [torch.nn.functional.linear(part, weight, bias) for part in x.split(rows)]
        assert torch.equal(torch.cat(parts), every)


def test_row_padding() -> None:
    assert row_multiple([64, 128]) == 1
    assert row_multiple([24, 96]) == 8
    assert row_multiple([40, 7]) == 64
    assert [padded_rows(n, 8) for n in (1, 8, 9)] == [8, 8, 16]
    assert [padded_rows(n, 1) for n in (1, 4, 5)] == [1, 4, 5]


def test_demo_checkpoint(tmp_path: Path) -> None:
    """Made once, whole, of about 100 M parameters; its text varies and its tokenizer is one of bytes."""
    from transformers import AutoTokenizer

    folder = ensure_demo_checkpoint(tmp_path / "cache" / "demo")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert ensure_demo_checkpoint(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [p.name for p in folder.parent.iterdir()] == ["demo"]
    world = World(folder)
    assert 90e6 < world.engine.spec.total_bytes / 4 < 110e6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Grüße,\n 世界 \x00"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == world.engine.spec.eos_token_ids[0] == 256
    out = world.generate(1, list(b"The ranks may die, but the stream"), 48)
    assert len(set(out)) > 8
    assert bytes(out).decode().isprintable()
