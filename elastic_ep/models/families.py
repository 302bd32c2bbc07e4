"""The model families that are served: one table entry each. Names and shapes only, so that a checkpoint can be judged without a framework.

A new family needs: its tensor names and shapes, where its experts' tensors go in a slot, and the attributes its config uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Config = Mapping[str, Any]
"""config.json as written"""
Shapes = dict[str, tuple[int, ...]]
"""tensor name in the checkpoint -> shape"""


class ExpertShape(NamedTuple):
    """H and I of one expert, and how many of them a MoE layer has."""

    hidden: int
    intermediate: int
    num_experts: int


class KVShape(NamedTuple):
    """Heads and head sizes of the keys and values that attention gets (for MLA: after expansion)."""

    num_heads: int
    key_dim: int
    value_dim: int


class ExpertTensor(NamedTuple):
    """One tensor that holds (a stretch of) an expert.

    Attributes:
        name: with {layer} the decoder layer, and {expert} when each expert has its own tensor; without {expert} the tensor is [E, ...].
        part: the slot part that it fills, from element `first` on.
        shape: of the expert's share.
    """

    name: str
    part: str
    first: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """How one architecture of transformers writes its checkpoints.

    Attributes:
        intermediate_keys, num_experts_keys: config keys, the first that is present counts.
        parts: the parts of a slot, in order, as the experts module of transformers lays them out.
        expert_tensors: the tensors that hold them.
        dense: every other tensor.
        moe_layers: which decoder layers have routed experts.
        renames: (in the checkpoint, in the module tree) name fragments that differ.
        kv_shape: of the keys and values of one token and layer.
        elementwise_lengths: row lengths that go through vectorised transcendental functions as one flat array.
    """

    model_type: str
    architecture: str
    intermediate_keys: tuple[str, ...]
    num_experts_keys: tuple[str, ...]
    parts: Callable[[ExpertShape], tuple[tuple[str, tuple[int, ...]], ...]]
    expert_tensors: Callable[[ExpertShape], tuple[ExpertTensor, ...]]
    dense: Callable[[Config], Shapes]
    moe_layers: Callable[[Config], tuple[int, ...]]
    kv_shape: Callable[[Config], KVShape]
    elementwise_lengths: Callable[[Config], tuple[int, ...]]
    renames: tuple[tuple[str, str], ...] = ()


def get(config: Config, *keys: str, default: Any = None) -> Any:
    """The first of `keys` that the config has with a value."""
    return next((config[key] for key in keys if config.get(key) is not None), default)


# ---- slots


def _stacked_parts(s: ExpertShape) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return (("gate_up_proj", (2 * s.intermediate, s.hidden)), ("down_proj", (s.hidden, s.intermediate)))


def _fused_parts(s: ExpertShape) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return (
        ("gate_up_proj", (s.hidden, 2 * s.intermediate)),
        ("gate_up_proj_bias", (2 * s.intermediate,)),
        ("down_proj", (s.intermediate, s.hidden)),
        ("down_proj_bias", (s.hidden,)),
    )


def _one_tensor_each(prefix: str, gate: str, up: str, down: str) -> Callable[[ExpertShape], tuple[ExpertTensor, ...]]:
    def tensors(s: ExpertShape) -> tuple[ExpertTensor, ...]:
        inward, outward = (s.intermediate, s.hidden), (s.hidden, s.intermediate)
        return (
            ExpertTensor(f"{prefix}.{{expert}}.{gate}.weight", "gate_up_proj", 0, inward),
            ExpertTensor(f"{prefix}.{{expert}}.{up}.weight", "gate_up_proj", s.intermediate * s.hidden, inward),
            ExpertTensor(f"{prefix}.{{expert}}.{down}.weight", "down_proj", 0, outward),
        )

    return tensors


def _fused_tensors(s: ExpertShape) -> tuple[ExpertTensor, ...]:
    return tuple(ExpertTensor(f"model.layers.{{layer}}.mlp.experts.{name}", name, 0, shape) for name, shape in _fused_parts(s))


# ---- dense tensors


def _frame(config: Config) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def head_dim(config: Config) -> int:
    return int(get(config, "head_dim", default=config["hidden_size"] // config["num_attention_heads"]))


def _grouped_query_attention(config: Config, bias: bool, extra: Callable[[int], Shapes] = lambda layer: {}) -> Shapes:
    hidden, dim, heads = config["hidden_size"], head_dim(config), config["num_attention_heads"]
    kv_heads = get(config, "num_key_value_heads", default=heads)
    shapes: Shapes = {}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.self_attn"
        for name, rows in (("q_proj", heads * dim), ("k_proj", kv_heads * dim), ("v_proj", kv_heads * dim), ("o_proj", hidden)):
            shapes[f"{at}.{name}.weight"] = (rows, heads * dim if name == "o_proj" else hidden)
            if bias:
                shapes[f"{at}.{name}.bias"] = (rows,)
        shapes.update({f"{at}.{name}": shape for name, shape in extra(layer).items()})
    return shapes


def _grouped_kv_shape(config: Config) -> KVShape:
    heads = get(config, "num_key_value_heads", "num_attention_heads")
    return KVShape(heads, head_dim(config), head_dim(config))


def _mlp(at: str, hidden: int, intermediate: int) -> Shapes:
    return {
        f"{at}.gate_proj.weight": (intermediate, hidden),
        f"{at}.up_proj.weight": (intermediate, hidden),
        f"{at}.down_proj.weight": (hidden, intermediate),
    }


def _all_layers(config: Config) -> tuple[int, ...]:
    return tuple(range(config["num_hidden_layers"]))


# ---- Qwen3-MoE


def _qwen3_moe_layers(config: Config) -> tuple[int, ...]:
    dense, every = set(config.get("mlp_only_layers") or ()), config.get("decoder_sparse_step", 1)
    return tuple(layer for layer in _all_layers(config) if layer not in dense and (layer + 1) % every == 0)


def _qwen3_moe(config: Config) -> Shapes:
    dim, hidden = head_dim(config), config["hidden_size"]
    norms: Shapes = {"q_norm.weight": (dim,), "k_norm.weight": (dim,)}
    shapes = _frame(config) | _grouped_query_attention(config, config.get("attention_bias", False), lambda layer: norms)
    sparse = set(_qwen3_moe_layers(config))
    for layer in _all_layers(config):
        if layer in sparse:
            shapes[f"model.layers.{layer}.mlp.gate.weight"] = (get(config, "num_local_experts", "num_experts"), hidden)
        else:
            shapes |= _mlp(f"model.layers.{layer}.mlp", hidden, config["intermediate_size"])
    return shapes


# ---- Mixtral


def _mixtral(config: Config) -> Shapes:
    shapes = _frame(config) | _grouped_query_attention(config, bias=False)
    for layer in _all_layers(config):
        shapes[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = (config["num_local_experts"], config["hidden_size"])
    return shapes


# ---- GPT-OSS


def _gpt_oss(config: Config) -> Shapes:
    experts, hidden = config["num_local_experts"], config["hidden_size"]
    sinks: Shapes = {"sinks": (config["num_attention_heads"],)}
    shapes = _frame(config) | _grouped_query_attention(config, config.get("attention_bias", True), lambda layer: sinks)
    for layer in _all_layers(config):
        shapes[f"model.layers.{layer}.mlp.router.weight"] = (experts, hidden)
        shapes[f"model.layers.{layer}.mlp.router.bias"] = (experts,)
    return shapes


# ---- DeepSeek-V3


def _deepseek_v3_layers(config: Config) -> tuple[int, ...]:
    return tuple(range(min(config.get("first_k_dense_replace", 0), config["num_hidden_layers"]), config["num_hidden_layers"]))


def _deepseek_v3(config: Config) -> Shapes:
    hidden, heads, experts = config["hidden_size"], config["num_attention_heads"], get(config, "n_routed_experts", "num_local_experts")
    q_rank, kv_rank, rope = config.get("q_lora_rank"), config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, v_dim, bias = config["qk_nope_head_dim"], config["v_head_dim"], config.get("attention_bias", False)
    sparse = set(_deepseek_v3_layers(config))
    shapes = _frame(config)
    for layer in _all_layers(config):
        at = f"model.layers.{layer}.self_attn"
        if q_rank is None:
            shapes[f"{at}.q_proj.weight"] = (heads * (nope + rope), hidden)
        else:
            shapes[f"{at}.q_a_proj.weight"] = (q_rank, hidden)
            shapes[f"{at}.q_a_layernorm.weight"] = (q_rank,)
            shapes[f"{at}.q_b_proj.weight"] = (heads * (nope + rope), q_rank)
        shapes[f"{at}.kv_a_proj_with_mqa.weight"] = (kv_rank + rope, hidden)
        shapes[f"{at}.kv_a_layernorm.weight"] = (kv_rank,)
        shapes[f"{at}.kv_b_proj.weight"] = (heads * (nope + v_dim), kv_rank)
        shapes[f"{at}.o_proj.weight"] = (hidden, heads * v_dim)
        if bias:
            shapes |= {f"{at}.kv_a_proj_with_mqa.bias": (kv_rank + rope,), f"{at}.o_proj.bias": (hidden,)}
            if q_rank is not None:
                shapes[f"{at}.q_a_proj.bias"] = (q_rank,)
        mlp = f"model.layers.{layer}.mlp"
        if layer not in sparse:
            shapes |= _mlp(mlp, hidden, config["intermediate_size"])
            continue
        shapes[f"{mlp}.gate.weight"] = (experts, hidden)
        shapes[f"{mlp}.gate.e_score_correction_bias"] = (experts,)
        shapes |= _mlp(f"{mlp}.shared_experts", hidden, config["moe_intermediate_size"] * config["n_shared_experts"])
    return shapes


# ---- the table

_QWEN_NAMES = _one_tensor_each("model.layers.{layer}.mlp.experts", "gate_proj", "up_proj", "down_proj")
_MIXTRAL_NAMES = _one_tensor_each("model.layers.{layer}.block_sparse_moe.experts", "w1", "w3", "w2")

FAMILIES = (
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        intermediate_keys=("moe_intermediate_size",),
        num_experts_keys=("num_local_experts", "num_experts"),
        parts=_stacked_parts,
        expert_tensors=_QWEN_NAMES,
        dense=_qwen3_moe,
        moe_layers=_qwen3_moe_layers,
        kv_shape=_grouped_kv_shape,
        elementwise_lengths=lambda c: (head_dim(c), c["intermediate_size"]),
    ),
    Family(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        intermediate_keys=("moe_intermediate_size",),
        num_experts_keys=("n_routed_experts", "num_local_experts"),
        parts=_stacked_parts,
        expert_tensors=_QWEN_NAMES,
        dense=_deepseek_v3,
        moe_layers=_deepseek_v3_layers,
        kv_shape=lambda c: KVShape(c["num_attention_heads"], c["qk_nope_head_dim"] + c["qk_rope_head_dim"], c["v_head_dim"]),
        elementwise_lengths=lambda c: (
            c["qk_rope_head_dim"],
            c["intermediate_size"],
            c["moe_intermediate_size"] * c["n_shared_experts"],
            get(c, "n_routed_experts", "num_local_experts"),
        ),
    ),
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        intermediate_keys=("intermediate_size",),
        num_experts_keys=("num_local_experts",),
        parts=_stacked_parts,
        expert_tensors=_MIXTRAL_NAMES,
        dense=_mixtral,
        moe_layers=_all_layers,
        kv_shape=_grouped_kv_shape,
        elementwise_lengths=lambda c: (head_dim(c),),
        renames=(("block_sparse_moe.", "mlp."),),
    ),
    Family(
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        intermediate_keys=("intermediate_size",),
        num_experts_keys=("num_local_experts",),
        parts=_fused_parts,
        expert_tensors=_fused_tensors,
        dense=_gpt_oss,
        moe_layers=_all_layers,
        kv_shape=_grouped_kv_shape,
        elementwise_lengths=lambda c: (head_dim(c) // 2,),
    ),
)
