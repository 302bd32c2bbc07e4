"""A random Qwen3-MoE checkpoint of about 100 M parameters with a byte-level tokenizer, for the benchmarks and tests.

The demo serves a trained one that comes with the package, in `elastic_ep/assets/`.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig
from transformers.utils import logging

EOS_TOKEN = "<|end|>"
_SEED = 20


def demo_config() -> Qwen3MoeConfig:
    """Hidden 512, 8 layers of 24 experts (top 4), vocabulary of 256 bytes and one end token."""
    return Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=257,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1024,
        moe_intermediate_size=320,
        num_experts=24,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        eos_token_id=256,
        bos_token_id=None,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ids 0 to 255 as the byte's value, and the end token 256."""
    alphabet = _byte_alphabet()
    core = Tokenizer(models.BPE(vocab=dict(zip(alphabet, range(256), strict=True)), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS_TOKEN, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def ensure_demo_checkpoint(folder: str | Path) -> Path:
    """Make the checkpoint in `folder` unless it is there already. Atomic: an interrupted or parallel run leaves no half of one."""
    target = Path(folder)
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write(temporary)
        os.rename(temporary, target)
    except OSError:
        if not (target / "config.json").exists():  # otherwise another process was faster
            raise
    finally:  # nothing is left of it once renamed
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write(folder: Path) -> None:
    config = demo_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor.fill_(2.5 if "q_norm" in name else 1.0)  # sharp attention
                continue
            # 4 at the output spreads the logits, 1.4 inside lets every layer change the answer: greedy text does not fall into a loop
            gain = 4.0 if "lm_head" in name else 1.4
            tensor.normal_(std=1.0 if "embed" in name else gain / math.sqrt(tensor.shape[-1]), generator=generator)
        unprintable = [i for i in range(config.vocab_size) if not 32 <= i < 127]
        model.lm_head.weight[unprintable] *= 0.02  # the text shows in any terminal, and does not end by chance
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    if shown:
        logging.enable_progress_bar()
    byte_tokenizer().save_pretrained(folder)


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte: its own where it prints, else 256 and up in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
