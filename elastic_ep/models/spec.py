"""What a checkpoint folder is, found out from its config and file headers before anything is loaded. Imports no framework."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_ep.core.errors import CheckpointError, InvalidInputError
from elastic_ep.models.families import FAMILIES, ExpertShape, ExpertTensor, Family, get
from elastic_ep.runtime.weights.headers import ITEM_BYTES, TensorEntry, read_headers
from elastic_ep.runtime.weights.layout import part_offsets

DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_STATIC_ROPE = ("default", "linear", "yarn", "llama3", "proportional")


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint whose every tensor was found with the right shape, in files that are long enough.

    Attributes:
        architecture: the class name of transformers.
        moe_layers: decoder layers that have routed experts; L is their number, and layer ids elsewhere count among them.
        num_experts, num_experts_per_tok, hidden_size, intermediate_size: E, K, H and I (of one expert).
        vocab_size, max_positions: what the config says.
        eos_token_ids: tokens that end a text, possibly none.
        dtype: of the expert tensors, "float32", "bfloat16" or "float16".
        expert_bytes, dense_bytes: as stored: one expert, and everything that is not a routed expert.
        tensors: where each needed tensor lies.
        config: config.json without its nulls.
    """

    directory: Path
    family: Family
    architecture: str
    moe_layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    expert_bytes: int
    dense_bytes: int
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)

    @property
    def num_layers(self) -> int:
        """L: layers with routed experts."""
        return len(self.moe_layers)

    @property
    def total_bytes(self) -> int:
        return self.dense_bytes + self.num_layers * self.num_experts * self.expert_bytes

    def slot_bytes(self, dtype: str | None) -> int:
        """Bytes of one expert in a slot, when computing in `dtype` ("float32", "bfloat16"; None: the checkpoint's)."""
        return part_offsets(self.family.parts(self.expert_shape), 2 if (dtype or self.dtype) == "bfloat16" else 4)[1]

    @property
    def expert_shape(self) -> ExpertShape:
        return ExpertShape(self.hidden_size, self.intermediate_size, self.num_experts)


def inspect_checkpoint(directory: str | Path) -> ModelSpec:
    """Read config.json and the headers of all weight files, and check names, shapes and file sizes.

    Raises CheckpointError (a file or tensor is missing, truncated or mis-shaped) or InvalidInputError (a model that is not supported).
    """
    folder = Path(directory)
    config = _read_config(folder)
    family = _family_of(config, folder)
    _refuse_unsupported(config, folder)
    try:
        shape = ExpertShape(
            config["hidden_size"], _required(config, *family.intermediate_keys), _required(config, *family.num_experts_keys)
        )
        dense, moe_layers = family.dense(config), family.moe_layers(config)
        top_k, vocab, positions = config["num_experts_per_tok"], config["vocab_size"], config["max_position_embeddings"]
    except KeyError as error:
        raise CheckpointError(f"{folder / 'config.json'} lacks {error.args[0]!r}; use the one that save_pretrained wrote") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder / 'config.json'} holds a value of the wrong kind ({error}); download it again") from error
    if not moe_layers:
        raise InvalidInputError(f"{folder} has no layer with routed experts; serve it with a dense engine")
    entries = read_headers(folder)
    for name, expected in dense.items():
        _check(folder, entries, name, expected)
    dtypes = {_check_expert(folder, entries, t, layer, shape) for layer in moe_layers for t in family.expert_tensors(shape)}
    expert_dtype = dtypes.pop()
    if dtypes:
        raise CheckpointError(f"{folder} stores experts as {expert_dtype} and {dtypes.pop()}; convert it to one dtype")
    return ModelSpec(
        directory=folder,
        family=family,
        architecture=family.architecture,
        moe_layers=moe_layers,
        num_experts=shape.num_experts,
        num_experts_per_tok=top_k,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        vocab_size=vocab,
        max_positions=positions,
        eos_token_ids=_eos_token_ids(folder, config),
        dtype=DTYPE_NAMES[expert_dtype],
        expert_bytes=sum(math.prod(t.shape) for t in family.expert_tensors(shape)) * ITEM_BYTES[expert_dtype],
        dense_bytes=sum(entries[name].end - entries[name].begin for name in dense),
        tensors=entries,
        config=config,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again")
    return {key: value for key, value in config.items() if value is not None}


def _family_of(config: Mapping[str, Any], folder: Path) -> Family:
    names = config.get("architectures") or [config.get("model_type")]
    for family in FAMILIES:
        if family.architecture in names or (config.get("architectures") is None and family.model_type in names):
            return family
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise InvalidInputError(f"{folder} is a {', '.join(map(str, names))}; supported architectures: {supported}")


def _refuse_unsupported(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise InvalidInputError(f"{folder} is quantized ({method}); save it as float32 or bfloat16 first")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _STATIC_ROPE:
        raise InvalidInputError(
            f"{folder} uses rope type {kind!r}, whose angles depend on the longest sequence of the batch; "
            f"supported: {', '.join(_STATIC_ROPE)}"
        )


def _required(config: Mapping[str, Any], *keys: str) -> int:
    value = get(config, *keys)
    if value is None:
        raise KeyError(keys[0])
    return int(value)


def _check(folder: Path, entries: Mapping[str, TensorEntry], name: str, expected: tuple[int, ...]) -> TensorEntry:
    entry = entries.get(name)
    if entry is None:
        raise CheckpointError(f"{folder} lacks tensor {name} {list(expected)}; the files do not match config.json, download them again")
    if entry.shape != expected:
        raise CheckpointError(f"{name} in {entry.file} has shape {list(entry.shape)}, config.json asks for {list(expected)}")
    if entry.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{name} in {entry.file} is {entry.dtype}; save the model as float32 or bfloat16")
    return entry


def _check_expert(folder: Path, entries: Mapping[str, TensorEntry], tensor: ExpertTensor, layer: int, shape: ExpertShape) -> str:
    """Check one expert tensor over all experts of a layer. Returns its dtype."""
    if "{expert}" not in tensor.name:
        return _check(folder, entries, tensor.name.format(layer=layer), (shape.num_experts, *tensor.shape)).dtype
    dtype = ""
    for expert in range(shape.num_experts):
        name = tensor.name.format(layer=layer, expert=expert)
        if name not in entries:
            raise CheckpointError(f"{folder} lacks {name}: config.json says {shape.num_experts} experts a layer; download the files again")
        dtype = _check(folder, entries, name, tensor.shape).dtype
    return dtype


def _eos_token_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    try:
        generation = json.loads((folder / "generation_config.json").read_text())
        value = generation.get("eos_token_id", value)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder / 'generation_config.json'}: {error}; download it again") from error
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)
