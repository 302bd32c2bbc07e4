"""The engine's greedy tokens are those of transformers' own generate(), and its bfloat16 logits those of the same weights in float32."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_ep.brain.messages import SequenceWork
from tests.checkpoints import FAMILIES, config_of, save_checkpoint
from tests.models.world import GREEDY, World


def prompts(rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(160) for _ in range(length)] for length in (1, 7, 33, 70, 130)]


def reference(folder: Path, prompt: list[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generate(family: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(family)
    world = World(folder)
    for seq_id, prompt in enumerate(prompts(random.Random(11))):
        tokens = world.generate(seq_id, prompt, 32)
        assert tokens == reference(folder, prompt, 32)
        assert len(set(tokens)) > 4, "the checkpoint repeats itself and shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_math_gives_the_same_tokens_here(family: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(family)
    prompt = prompts(random.Random(12))[2]
    assert World(folder, fast_math=True).generate(1, prompt, 32) == reference(folder, prompt, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits_are_near(family: str, checkpoint: Callable[..., Path]) -> None:
    """The same bfloat16 weights computed in bfloat16 here and in float32 by transformers: most logits agree to the rounding."""
    folder = checkpoint(family, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = prompts(random.Random(13))[3]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    world = World(folder)
    got = torch.stack(list(world.logits_at(1, tokens, range(1, len(tokens) + 1)).values()))
    error = (got - expected).abs().median() / expected.std()
    assert error < 0.03, f"median error is {error:.3f} of the spread"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_moe", {"attention_bias": True, "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": []}),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "n_shared_experts": 2, "attention_bias": True}),
        ("mixtral", {"sliding_window": None, "num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("gpt_oss", {"attention_bias": False, "num_attention_heads": 8, "hidden_size": 48, "intermediate_size": 36}),
    ],
)
def test_variants(family: str, changes: dict, tmp_path: Path) -> None:
    """Config options that change tensors, shapes or positions."""
    folder = save_checkpoint(tmp_path / "model", config_of(family, **changes))
    world = World(folder)
    prompt = prompts(random.Random(14))[3]
    tokens = world.generate(1, prompt, 24)
    assert tokens == reference(folder, prompt, 24)
    alone = world.logits_at(1, prompt, [50, 51, 70])
    assert torch.equal(world.logits_at(1, prompt, [70])[69], alone[69])


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_sharded_files_and_another_dtype(stored: str, tmp_path: Path) -> None:
    """An index over many files; half-precision weights served as float32."""
    folder = save_checkpoint(tmp_path / "model", config_of("qwen3_moe"), stored, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    prompt = prompts(random.Random(15))[1]
    assert World(folder, dtype="float32").generate(1, prompt, 32) == reference(folder, prompt, 32)


def test_decodes_and_prefills_share_a_step(checkpoint: Callable[..., Path]) -> None:
    """32 decodes and a chunk of a prompt in one step, with sequences that come and go, give the tokens of each alone."""
    folder = checkpoint("gpt_oss")
    world = World(folder)
    seed = int(os.environ.get("ELASTIC_EP_TEST_SEED", 0)) or random.SystemRandom().randrange(1 << 32)
    print(f"ELASTIC_EP_TEST_SEED={seed}")
    rng = random.Random(seed)
    texts = {i: [rng.randrange(160) for _ in range(rng.randrange(1, 90))] for i in range(12)}
    expected = {i: world.generate(1000 + i, text, 20) for i, text in texts.items()}
    done: dict[int, list[int]] = {i: [] for i in texts}
    filled = dict.fromkeys(texts, 0)
    waiting, running, finished = sorted(texts), [], []
    while waiting or running:
        if waiting and (not running or rng.random() < 0.5):
            running.append(waiting.pop())
        work = []
        for i in running:
            text = texts[i] + done[i]
            end = min(len(text), filled[i] + 16)
            work.append(SequenceWork(i, filled[i], tuple(text[filled[i] : end]), GREEDY if end == len(text) else None))
            filled[i] = end
        tokens = world.step(work, finished)
        finished = []
        for i, token in tokens.items():
            done[i].append(token)
            if len(done[i]) == 20:
                running.remove(i)
                finished.append(i)
    assert done == expected
    world.step([], finished)
    assert world.engine.kv.num_free_pages == world.engine.kv.num_pages
