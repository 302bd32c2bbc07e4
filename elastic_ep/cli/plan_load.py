"""Where `elastic-ep plan` gets its loads and shapes from: generators, files of engines and of this command, known models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.load import GENERATORS, as_array, as_load, generate_load

KEYS = ("load", "logical_count", "expert_load", "tokens_per_expert", "weight")
"""names under which files keep their loads, first found first taken (``logical_count`` is SGLang's)"""


class ModelShape(NamedTuple):
    """MoE layers, routed experts per layer, and bytes of one expert of one layer."""

    num_layers: int
    num_experts: int
    expert_bytes: int


MODELS = {
    "deepseek-v3": ModelShape(58, 256, 3 * 7168 * 2048),
    "qwen3-235b": ModelShape(94, 128, 3 * 4096 * 1536 * 2),
    "kimi-k2": ModelShape(60, 384, 3 * 7168 * 2048),
}
"""three matrices per expert; fp8 for DeepSeek-V3 and Kimi K2, bfloat16 for Qwen3-235B"""


def parse_shape(text: str, expert_bytes: int | None) -> ModelShape:
    """A model's name, or layers x experts such as ``58x256``."""
    match = re.fullmatch(r"(\d+)\s*[x×]\s*(\d+)", text)
    if match:
        shape = ModelShape(int(match[1]), int(match[2]), MODELS["deepseek-v3"].expert_bytes)
    elif text in MODELS:
        shape = MODELS[text]
    else:
        raise InvalidInputError(f"unknown model shape {text!r}; give {', '.join(MODELS)}, or layers x experts such as 58x256")
    if expert_bytes is None:
        return shape
    if expert_bytes < 1:
        raise InvalidInputError(f"--expert-bytes is {expert_bytes}; give 1 or more")
    return shape._replace(expert_bytes=expert_bytes)


def is_generator(text: str) -> bool:
    return text.partition(":")[0] in GENERATORS


def make_load(text: str, num_layers: int, num_experts: int, seed: int) -> NDArray[np.float64]:
    """A generated load from ``kind`` or ``kind:parameter``, such as ``lognormal:1``."""
    kind, colon, parameter = text.partition(":")
    try:
        value = float(parameter) if colon else None
    except ValueError:
        raise InvalidInputError(f"load {text!r}: {parameter!r} is not a number; write for example {kind}:1") from None
    return generate_load(kind, num_layers, num_experts, seed, value)


def read_load(path: str) -> NDArray[np.float64]:
    """float64 [L, E] from a file: ``.json``, ``.npy``, ``.npz`` or ``.pt``.

    The file holds [L, E] or [T, L, E] snapshots, which are summed; or a mapping with one under a name in `KEYS`; or one row per layer
    number.
    """
    file = Path(path)
    if not file.is_file():
        known = ", ".join(GENERATORS)
        raise InvalidInputError(f"load {path!r} is neither a file nor one of the generators {known}")
    readers = {".json": _read_json, ".npy": _read_numpy, ".npz": _read_numpy, ".pt": _read_torch}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise InvalidInputError(f"load file {path!r} ends in {file.suffix!r}; known are {', '.join(readers)}")
    try:
        content = reader(file)
    except InvalidInputError:
        raise
    except Exception as error:  # the parsers of other libraries raise whatever comes to mind for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInputError(f"cannot read load file {path!r}: {reason}") from error
    return as_load(_unwrap(content, path))


def _unwrap(content: Any, path: str) -> Any:
    if not isinstance(content, Mapping):
        return as_array(content)
    for key in KEYS:
        if key in content:
            return as_array(content[key])
    if content and all(str(key).isdigit() for key in content):
        return as_array([content[key] for key in sorted(content, key=int)])
    names = ", ".join(sorted(str(key) for key in content)[:8])
    raise InvalidInputError(f"load file {path!r} has {names}; expected one of {', '.join(KEYS)}, or one row per layer number")


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def _read_numpy(file: Path) -> Any:
    with_arrays = np.load(file, allow_pickle=False)
    return dict(with_arrays) if isinstance(with_arrays, np.lib.npyio.NpzFile) else with_arrays


def _read_torch(file: Path) -> Any:
    import pickle

    try:
        import torch
    except ModuleNotFoundError as error:
        raise InvalidInputError(f"reading {str(file)!r} needs torch; install it, or save the load as .npy") from error
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(str(error)) from error
