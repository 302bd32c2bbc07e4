"""Copying and summing rows that lie in several arrays: compiled where the extension was built, NumPy elsewhere, the same bits from both.

Rows are named by (source, row): `source_of[i]` picks one of the arrays in `sources`, `row_of[i]` a row in it. Arrays show bfloat16 as
int16 of the same bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

compiled: ModuleType | None
try:
    compiled = importlib.import_module("elastic_ep.runtime.dispatch._rows")
except ImportError:
    compiled = None

_BLOCK_BYTES = 1 << 18
"""float32 scratch of one block of the NumPy sum: small enough to stay in a core's own cache"""


def as_array(tensor: torch.Tensor) -> NDArray[Any]:
    """A NumPy view of a contiguous CPU tensor; bfloat16 shows as int16 of the same bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def array_dtype(dtype: torch.dtype) -> type[np.generic]:
    """The NumPy type that `as_array` shows."""
    return np.int16 if dtype == torch.bfloat16 else np.float32


class RowBuffer:
    """A tensor that is allocated once for the largest use and cut to size: fresh pages cost more than the rows written to them."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)
        self._array = as_array(self._flat)
        self.address = 0
        """of the first row that was taken last"""

    def take(self, num_rows: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, NDArray[Any]]:
        """[num_rows, hidden] with arbitrary contents, and its array. Overwrites what the last call returned."""
        size = num_rows * hidden
        if dtype != self._flat.dtype or size > self._flat.numel():
            self._flat = torch.empty(size + size // 4, dtype=dtype)
            self._array = as_array(self._flat)
            self.address = self._flat.data_ptr()
        return self._flat.as_strided((num_rows, hidden), (hidden, 1)), self._array[:size].reshape(num_rows, hidden)


def gather(out: NDArray[Any], sources: Sequence[NDArray[Any]], source_of: NDArray[np.int32], row_of: NDArray[np.int32]) -> None:
    """out[i] = sources[source_of[i]][row_of[i]]. Raises IndexError for a row that no source has."""
    if compiled is not None:
        compiled.gather(out, sources, source_of, row_of, out.shape[1] * out.itemsize)
        return
    for s, source in enumerate(sources):
        chosen = np.flatnonzero(source_of == s)
        rows = row_of[chosen]
        if rows.size and rows.view(np.uint32).max() >= len(source):
            raise IndexError(f"gather: source {s} has {len(source)} rows, asked for {rows.min()} to {rows.max()}")
        out[chosen] = source[rows]


def weighted_sum(
    sources: Sequence[NDArray[Any]],
    source_of: NDArray[np.int32],
    row_of: NDArray[np.int32],
    position: NDArray[np.int32],
    weights: torch.Tensor,
    hidden: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """out[t] = sum over k = 0, 1, … in this order of float32(weights[t, k]) * float32(row of pair position[t, k]), rounded once to `dtype`.

    Every product and every partial sum is rounded to float32 on its own (no fused multiply-add), so neither the number of tokens
    nor their place in the batch changes a bit. position, weights [T, K]; returns [T, hidden]. Raises IndexError like `gather`.
    """
    num_tokens, top_k = position.shape
    if not num_tokens or not top_k:
        return torch.zeros((num_tokens, hidden), dtype=dtype)
    out = torch.empty((num_tokens, hidden), dtype=dtype)
    weight = np.ascontiguousarray(weights.detach().to(torch.float32).numpy())
    if compiled is not None:
        compiled.weighted_sum(as_array(out), sources, source_of, row_of, position, weight, top_k, hidden, dtype == torch.bfloat16)
        return out
    rows = np.empty((len(row_of), hidden), dtype=array_dtype(dtype))
    gather(rows, sources, source_of, row_of)
    _sum_in_blocks(as_array(out), rows, position, weight[:, :, None])
    return out


def _sum_in_blocks(out: NDArray[Any], rows: NDArray[Any], position: NDArray[np.int32], weight: NDArray[np.float32]) -> None:
    num_tokens, top_k = position.shape
    hidden = rows.shape[1]
    block = max(1, min(num_tokens, _BLOCK_BYTES // (4 * top_k * hidden)))
    for start in range(0, num_tokens, block):
        part = rows[position[start : start + block]]
        terms = part if part.dtype == np.float32 else np.left_shift(part, 16, dtype=np.int32).view(np.float32)
        terms *= weight[start : start + block]
        total = terms[:, 0].copy()
        for k in range(1, top_k):
            total += terms[:, k]
        out[start : start + block] = total if out.dtype == np.float32 else _narrow(total)


def _narrow(values: NDArray[np.float32]) -> NDArray[np.int16]:
    """float32 to the bits of bfloat16: to nearest, ties to even; every NaN becomes the same one."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded.astype(np.uint16).view(np.int16)
