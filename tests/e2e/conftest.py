"""Checkpoints for whole servers, made once a session, and what transformers itself generates from them."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import config_of, save_checkpoint

Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """family -> folder of a small float32 checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda family: save_checkpoint(root / family, config_of(family)))


COUNT = 60
VOCABULARY = 160


@cache
def prompts(count: int) -> list[list[int]]:
    """Prompts of 1 to 40 tokens."""
    rng = random.Random(5)
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40))] for _ in range(count)]


@cache
def reference(folder: Path, count: int) -> list[list[int]]:
    """Greedy tokens of transformers' own `generate()` for the first `count` prompts, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = []
    for prompt in prompts(count):
        ids = torch.tensor([prompt])
        full = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False, pad_token_id=0)
        out.append(full[0, len(prompt) :].tolist())
    return out
