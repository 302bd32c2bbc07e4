"""The module tree of transformers with dense weights only: built on the meta device, filled from the checkpoint.

No routed expert is ever allocated here.
"""

from __future__ import annotations

import json

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from elastic_ep.core.errors import CheckpointError
from elastic_ep.models.linear import RouterWeight, RowNorm
from elastic_ep.models.spec import ModelSpec
from elastic_ep.runtime.weights.checkpoint import TensorReader
from elastic_ep.runtime.weights.digest import Digest

IMPLEMENTATION = "elastic_ep"
"""the name under which our attention and experts functions are registered with transformers"""


def build_model(spec: ModelSpec, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, in eval mode, its experts' parameters removed, its computed buffers real."""
    raw = json.loads((spec.directory / "config.json").read_text()) | {"model_type": spec.family.model_type}
    try:
        config = AutoConfig.for_model(**raw)
    except Exception as error:  # its validators raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"transformers refuses {spec.directory / 'config.json'}: {reason}; download it again") from error
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=IMPLEMENTATION, experts_implementation=IMPLEMENTATION
        )
    model.train(False).requires_grad_(False)
    for layer in spec.moe_layers:
        experts_module(model, layer)._parameters.clear()
    for name, module in list(model.named_modules()):
        if module._non_persistent_buffers_set:  # computed from the config when built (rotary frequencies): build it again, for real
            fresh = type(module)(config=module.config)
            for buffer in module._non_persistent_buffers_set:
                assert fresh._buffers[buffer].device.type == "cpu", f"{name}.{buffer}"
                module._buffers[buffer] = fresh._buffers[buffer]
    return model


def load_dense(model: PreTrainedModel, spec: ModelSpec, reader: TensorReader, dtype: torch.dtype) -> int:
    """Fill every parameter and buffer that is not an expert's. Returns a digest of the configuration and of what they hold now. Raises
    CheckpointError."""
    keep_float32 = set(model._keep_in_fp32_modules_strict or ())
    digest = Digest(json.dumps(spec.config, sort_keys=True).encode())
    for name in spec.family.dense(spec.config):
        path = name
        for written, built in spec.family.renames:
            path = path.replace(written, built)
        parent, leaf = path.rpartition(".")[::2]
        module = model.get_submodule(parent)
        target = torch.float32 if keep_float32.intersection(path.split(".")) else dtype
        tensor = torch.empty(spec.tensors[name].shape, dtype=target)
        reader.read_into(name, None, tensor)
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    if spec.config.get("tie_word_embeddings", False):
        model.lm_head.weight = model.model.embed_tokens.weight
    unfilled = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if unfilled:
        raise CheckpointError(f"{spec.directory} has no tensor for {unfilled[0]}, which this version of transformers wants; use 5.23")
    return digest.intdigest()


def experts_module(model: PreTrainedModel, layer: int) -> nn.Module:
    """The experts module of a decoder layer."""
    module: nn.Module = model.model.layers[layer].mlp.experts
    return module


def use_row_kernels(model: PreTrainedModel, linear: type[nn.Linear], norm: type[RowNorm] = RowNorm) -> None:
    """Make every nn.Linear one of `linear` (a subclass that adds no state), and every root mean square norm one of `norm`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = linear
        elif type(module).__name__.endswith("RMSNorm"):
            rounds_last = type(module).__name__ == "GptOssRMSNorm"
            module.__class__ = norm
            module.rounds_last = rounds_last  # type: ignore[assignment]


def use_router_weights(model: PreTrainedModel, kind: type[RouterWeight] = RouterWeight) -> None:
    """Make every router's matrix one of `kind`."""
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            module._parameters["weight"] = module.weight.detach().as_subclass(kind)  # type: ignore
