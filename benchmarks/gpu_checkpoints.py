"""Checkpoints of published shapes with random weights, written as fast as the memory takes them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3Config, PretrainedConfig, Qwen3MoeConfig

from elastic_ep.models.families import FAMILIES, ExpertShape, get

SHAPES = ("qwen3-30b-a3b", "deepseek-v3-slice")


def config_of(shape: str, layers: int | None = None) -> PretrainedConfig:
    """The published sizes; `layers` cuts it down. An expert of DeepSeek-V3 is half as wide: in bfloat16 it then has the bytes of a whole
    one in fp8, 44 MB."""
    if shape == "qwen3-30b-a3b":
        return Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=layers or 48,
            num_experts=128, num_experts_per_tok=8, num_attention_heads=32, num_key_value_heads=4, head_dim=128, norm_topk_prob=True,
            max_position_embeddings=40960, eos_token_id=None, bos_token_id=None, architectures=["Qwen3MoeForCausalLM"],
        )  # fmt: skip
    return DeepseekV3Config(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=1024, num_hidden_layers=layers or 3,
        n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, num_attention_heads=128, num_key_value_heads=128,
        first_k_dense_replace=0, max_position_embeddings=4096, eos_token_id=None, bos_token_id=None,
        architectures=["DeepseekV3ForCausalLM"],
    )  # fmt: skip


def write(folder: Path, config: PretrainedConfig, device: str = "cuda", threads: int = 8) -> int:
    """One bfloat16 file for each decoder layer and one for the rest. Returns the bytes written."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    family = next(family for family in FAMILIES if family.architecture in config.architectures)
    expert = ExpertShape(raw["hidden_size"], get(raw, *family.intermediate_keys), get(raw, *family.num_experts_keys))
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in [*family.dense(raw).items(), *_experts(family, raw, expert)]:
        layer = name.split("layers.")[1].split(".")[0] if "layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    with ThreadPoolExecutor(threads) as pool:
        written = sum(pool.map(lambda item: _write_file(folder / item[0], item[1], device), files.items()))
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return written


def _experts(family: Any, raw: dict[str, Any], expert: ExpertShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in family.moe_layers(raw):
        for tensor in family.expert_tensors(expert):
            for e in range(expert.num_experts):
                yield tensor.name.format(layer=layer, expert=e), tensor.shape


def _write_file(path: Path, shapes: dict[str, tuple[int, ...]], device: str) -> int:
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            file.write(_values(name, shape, device).view(torch.int16).cpu().numpy().data)
    return at


def _values(name: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Activations stay near 1, routers tell tokens apart, logits are some units apart."""
    if len(shape) == 1:
        values = torch.zeros(shape, device=device) if "bias" in name else torch.ones(shape, device=device)
    else:
        scale = 1.0 if "embed_tokens" in name else (4.0 if "lm_head" in name else 1.0) / math.sqrt(shape[-1])
        values = torch.randn(shape, device=device, dtype=torch.bfloat16) * scale
    return values.to(torch.bfloat16)
