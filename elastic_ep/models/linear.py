"""Matrix products whose rows do not know each other: our kernel by default, the library's where speed matters more than bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from elastic_ep.models.kernels import kernels

_LIBRARY_ROWS = 32
"""from here on the float32 product of the library is ahead of ours (benchmarks/models.py)"""


class Weight(NamedTuple):
    """A matrix with its bias as rows are multiplied with it.

    Attributes:
        matrix: contiguous, [out, in], or [in, out] if `is_in_out`; float32 or bfloat16.
        bias: [out] or None.
    """

    matrix: torch.Tensor
    bias: torch.Tensor | None
    is_in_out: bool = False

    @property
    def num_out(self) -> int:
        return self.matrix.shape[1 if self.is_in_out else 0]

    @property
    def addresses(self) -> tuple[int, int]:
        return self.matrix.data_ptr(), 0 if self.bias is None else self.bias.data_ptr()


def multiply_groups(x: torch.Tensor, groups: Sequence[tuple[int, int]], weights: Sequence[Weight], out: torch.Tensor) -> None:
    """out[begin:end] = x[begin:end] @ weight + bias for each (begin, end) and its weight; summed in float32, rounded once.

    A row's bits depend on the row and the weight alone. x [rows, in] and out [rows, out]: contiguous, of the weights' dtype.
    """
    assert x.is_contiguous() and out.is_contiguous() and x.dtype == out.dtype == weights[0].matrix.dtype
    table = np.array([(*bounds, *weight.addresses) for bounds, weight in zip(groups, weights, strict=True)], dtype=np.int64)
    kernels().matmul(
        x.data_ptr(),
        out.data_ptr(),
        table.__array_interface__["data"][0],
        len(table),
        x.shape[1],
        out.shape[1],
        x.dtype == torch.bfloat16,
        weights[0].is_in_out,
        False,
    )


def multiply_groups_fast(x: torch.Tensor, groups: Sequence[tuple[int, int]], weights: Sequence[Weight], out: torch.Tensor) -> None:
    """The same product by whichever is faster; a row's bits may depend on how many rows its group has."""
    if not is_library_faster(len(x) // len(groups), x.dtype):
        return multiply_groups(x, groups, weights, out)
    for (begin, end), weight in zip(groups, weights, strict=True):
        matrix = weight.matrix if weight.is_in_out else weight.matrix.t()
        if weight.bias is None:
            torch.mm(x[begin:end], matrix, out=out[begin:end])
        else:
            torch.addmm(weight.bias, x[begin:end], matrix, out=out[begin:end])
    return None


def is_library_faster(rows: int, dtype: torch.dtype) -> bool:
    return (dtype == torch.float32 and rows >= _LIBRARY_ROWS) or (dtype == torch.bfloat16 and _HAS_BFLOAT16_UNIT)


class RowLinear(nn.Linear):
    """nn.Linear over `multiply_groups`. Made of an nn.Linear by assigning the class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        rows = x.numel() // self.in_features
        multiply_groups(x.view(rows, self.in_features), [(0, rows)], [Weight(self.weight, self.bias)], out.view(rows, self.out_features))
        return out


class FastLinear(RowLinear):
    """Whichever is faster for the number of rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_library_faster(x.numel() // self.in_features, x.dtype):
            return nn.functional.linear(x, self.weight, self.bias)
        return super().forward(x)


_HAS_BFLOAT16_UNIT = any(has for name, has in torch.cpu.get_capabilities().items() if name in ("avx512_bf16", "amx_bf16", "bf16"))
