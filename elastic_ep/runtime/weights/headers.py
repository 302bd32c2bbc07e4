"""What a safetensors checkpoint says it holds, read from the headers alone: no framework, no tensor byte.

The format: 8 bytes little-endian header length, a JSON object name -> {dtype, shape, data_offsets}, then the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from elastic_ep.core.errors import CheckpointError

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""the dtypes whose size is checked; another one is refused where it is needed"""
_MAX_HEADER_BYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class TensorEntry(NamedTuple):
    """Where one tensor lies: bytes [begin, end) of `file`, absolute."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file. Raises CheckpointError when it is missing, no safetensors file, or shorter than its header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is truncated or no safetensors file ({size} bytes, header of {length}); download it again")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check the path or download the file again") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header ({error}); download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header (a {type(header).__name__}, not names of tensors); download it again")
    start = 8 + length
    entries = {}
    for name, value in header.items():
        if name != "__metadata__":
            entries[name] = _entry(path, name, value, start)
    expected = max((entry.end for entry in entries.values()), default=start)
    if size < expected:
        raise CheckpointError(f"{path} is truncated: {size} bytes, its header names {expected}; download it again")
    return entries


def _entry(path: Path, name: str, value: Mapping[str, Any], start: int) -> TensorEntry:
    try:
        dtype, shape = str(value["dtype"]), tuple(int(n) for n in value["shape"])
        begin, end = (int(n) for n in value["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} has a damaged header at {name!r}; download it again") from error
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise CheckpointError(f"{path} has a damaged header at {name!r}: shape {list(shape)}, bytes {begin} to {end}; download it again")
    if dtype in ITEM_BYTES and end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(f"{name} in {path}: {end - begin} bytes do not hold {dtype} {list(shape)}; download the file again")
    return TensorEntry(path, dtype, shape, start + begin, start + end)


def read_headers(directory: Path) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint folder, sharded (by its index file) or single. Raises CheckpointError."""
    index_path = directory / INDEX_NAME
    if not index_path.exists():
        single = directory / SINGLE_NAME
        if not single.exists():
            raise CheckpointError(f"{directory} has no {SINGLE_NAME} and no {INDEX_NAME}; give the folder that save_pretrained wrote")
        return read_header(single)
    try:
        weight_map = json.loads(index_path.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index_path} is damaged ({error}); download it again") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index_path} is damaged (its weight_map does not name files); download it again")
    headers = {file: read_header(directory / file) for file in sorted(set(weight_map.values()))}
    absent = next((name for name, file in weight_map.items() if name not in headers[file]), None)
    if absent is not None:
        raise CheckpointError(f"{absent} is not in {directory / weight_map[absent]} where {INDEX_NAME} puts it; download the file again")
    return {name: headers[file][name] for name, file in weight_map.items()}
