"""Small random checkpoints of the four families, as `save_pretrained` writes them, with logits spread so that greedy tokens vary."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from elastic_ep.models.families import FAMILIES as TABLE
from elastic_ep.models.families import ExpertShape, get
from elastic_ep.runtime.weights.headers import ITEM_BYTES

FAMILIES = ("qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss")
_SIZES = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512}


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    """A tiny config: dense first layers, shared experts, tied embeddings, sliding windows and sinks, wherever the family has them."""
    special: dict[str, dict[str, Any]] = {
        "qwen3_moe": {
            "num_key_value_heads": 2,
            "head_dim": 24,
            "intermediate_size": 96,
            "moe_intermediate_size": 40,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "tie_word_embeddings": True,
        },
        "deepseek_v3": {
            "num_key_value_heads": 4,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 48,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 20,
            "num_nextn_predict_layers": 0,
        },
        "mixtral": {
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 40,
        },
        "gpt_oss": {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 32,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
        },
    }
    classes = {"qwen3_moe": Qwen3MoeConfig, "deepseek_v3": DeepseekV3Config, "mixtral": MixtralConfig, "gpt_oss": GptOssConfig}
    return classes[family](**(_SIZES | special[family] | {"eos_token_id": None, "bos_token_id": None} | changes))


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights that keep activations near 1 and logits several units apart."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            if tensor.ndim == 1 or name.endswith("_bias"):
                is_norm = "norm" in name
                normal(tensor, 0.1, 1.0 if is_norm else 0.0)
                if tied and name == "model.norm.weight":
                    tensor *= 30  # makes up for the small embeddings
            elif "embed_tokens" in name:
                normal(tensor, 0.1 if tied else 1.0)  # tied and large, every token would predict itself
            else:
                fan_in = tensor.shape[-2] if tensor.ndim == 3 and model.config.model_type == "gpt_oss" else tensor.shape[-1]
                normal(tensor, (4.0 if "lm_head" in name else 1.4) / math.sqrt(fan_in))


def save_checkpoint(folder: Path, config: PretrainedConfig, dtype: str = "float32", seed: int = 1, **save: Any) -> Path:
    """Write a random model of this config to `folder`."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    keep = {name: b for name, b in model.named_buffers() if "e_score_correction_bias" in name}
    model.to(getattr(torch, dtype))
    for name, buffer in keep.items():
        parent, leaf = name.rpartition(".")[::2]
        setattr(model.get_submodule(parent), leaf, buffer)
    model.save_pretrained(folder, **save)
    return folder


def save_sparse(folder: Path, config: PretrainedConfig, dtype: str = "F32") -> Path:
    """A checkpoint of zeros as large as the config says, that takes no time and no disk: the file is a header and a hole."""
    folder.mkdir(parents=True)
    config.architectures = [family.architecture for family in TABLE if family.model_type == config.model_type]
    config.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    family = next(family for family in TABLE if family.model_type == config.model_type)
    shapes = family.dense(raw)
    expert = ExpertShape(raw["hidden_size"], get(raw, *family.intermediate_keys), get(raw, *family.num_experts_keys))
    for layer in family.moe_layers(raw):
        for tensor in family.expert_tensors(expert):
            if "{expert}" not in tensor.name:
                shapes[tensor.name.format(layer=layer)] = (expert.num_experts, *tensor.shape)
                continue
            for e in range(expert.num_experts):
                shapes[tensor.name.format(layer=layer, expert=e)] = tensor.shape
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + at)
    return folder
