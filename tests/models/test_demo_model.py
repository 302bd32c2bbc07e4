"""The model that comes with the package: small enough, whole, the tokens it is known by, and the load trace recorded from it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from elastic_ep.cli.plan_load import read_load
from elastic_ep.models.spec import inspect_checkpoint
from elastic_ep.serving.text import TextTokenizer
from tests.models.test_generate import reference
from tests.models.world import World

ASSETS = Path(str(resources.files("elastic_ep"))) / "assets"
FOLDER = ASSETS / "demo_model"
PROMPT = 'The "if" statement is used for'
CONTINUATION = (
    '\nit in the "if" statement is not a "if" statement is executed.\n\nIf the "if" statement is executed, the "if" statement is executed,'
)
"""greedy, the first 44 tokens, whose logits leave no doubt also in bfloat16"""
COUNT = 44


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_size_and_shape() -> None:
    files = list(FOLDER.iterdir())
    assert all(file.stat().st_size < 16 << 20 for file in files), "repositories and mirrors refuse larger files"
    spec = inspect_checkpoint(FOLDER)
    assert (spec.num_layers, spec.num_experts, spec.num_experts_per_tok, spec.dtype) == (8, 32, 4, "bfloat16")
    assert spec.total_bytes == 2 * 8_196_864
    assert spec.eos_token_ids == (0,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_tokens_it_is_known_by(dtype: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT).ids
    out = World(FOLDER, dtype=dtype).generate(1, ids, COUNT)
    assert tokenizer.decode(out) == CONTINUATION


def test_its_tokens_equal_generate(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("class TestList(unittest.TestCase):").ids
    assert World(FOLDER, dtype="float32").generate(1, ids, 32) == reference(FOLDER, ids, 32)


def test_the_tokenizer_keeps_every_byte(tokenizer: Tokenizer) -> None:
    text = "def grüße(世界):\r\n\treturn '\x00'  # 🙂\n"
    served = TextTokenizer(tokenizer)
    ids = served.encode(text)
    assert b"".join(served.piece(token) for token in ids).decode() == text
    assert served.label(0).text == "<|end|>"


def test_the_load_trace_is_one_of_this_model() -> None:
    """24 windows of 2,048 tokens of held-out text, top 4 of 32 in 8 layers; `plan --load` reads it."""
    trace = np.load(ASSETS / "demo_load.npz")["load"]
    assert trace.shape == (24, 8, 32)
    assert (trace.sum(2) == 2048 * 4).all()
    load = read_load(str(ASSETS / "demo_load.npz"))
    assert np.array_equal(load, trace.sum(0))
    busiest = (load.max(1) / load.mean(1)).mean()
    assert 1.3 < busiest < 2.0, "a trained router is neither even nor collapsed"
