"""Products, norms and gates whose rows do not know each other: our kernels by default, the library's where speed matters more than bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from elastic_ep.models.kernels import kernels

_LIBRARY_ROWS = 32
"""from here on the float32 product of the library is ahead of ours (benchmarks/models.py)"""
_HAS_BFLOAT16_UNIT = any(has for name, has in torch.cpu.get_capabilities().items() if name in ("avx512_bf16", "amx_bf16", "bf16"))


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
    assert x.is_contiguous()
    assert x.dtype == out.dtype == weights[0].matrix.dtype
    table: list[int] = []
    for bounds, weight in zip(groups, weights, strict=True):
        table += bounds
        table += weight.addresses
    is_bf16 = x.dtype == torch.bfloat16
    kernels().matmul(x.data_ptr(), out.data_ptr(), tuple(table), x.shape[1], out.shape[1], is_bf16, weights[0].is_in_out, False)


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
    """Whether torch's product of that many rows is likely ahead of our kernel on this processor."""
    return rows >= _LIBRARY_ROWS if dtype == torch.float32 else _HAS_BFLOAT16_UNIT


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of rows [rows, 2 I] that hold gate and up side by side -> [rows, I]. bfloat16 rounds after each step."""
    rows, width = gate_up.shape
    out = torch.empty(rows, width // 2, dtype=gate_up.dtype)
    kernels().swiglu(gate_up.data_ptr(), out.data_ptr(), rows, width // 2, gate_up.dtype == torch.bfloat16, False)
    return out


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., in] @ weight [out, in].T + bias by the kernel of `multiply_groups`."""
    x, weight = x.contiguous(), weight.contiguous()
    assert x.dtype == weight.dtype
    num_out, depth = weight.shape
    out = torch.empty(*x.shape[:-1], num_out, dtype=x.dtype)
    table = (0, x.numel() // depth, weight.data_ptr(), 0 if bias is None else bias.data_ptr())
    kernels().matmul(x.data_ptr(), out.data_ptr(), table, depth, num_out, x.dtype == torch.bfloat16, False, False)
    return out


class RouterWeight(torch.Tensor):
    """A router's matrix: transformers multiplies with it by F.linear, which the library would do by another kernel for other numbers of
    rows."""

    product = staticmethod(multiply)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            return cls._linear(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def _linear(cls, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        plain = [None if t is None else t.as_subclass(torch.Tensor) for t in (x, weight, bias)]
        assert plain[0] is not None
        assert plain[1] is not None
        return cls.product(plain[0], plain[1], plain[2])


class RowLinear(nn.Linear):
    """nn.Linear by `multiply`. Made of an nn.Linear by assigning the class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(x, self.weight, self.bias)


class FastLinear(RowLinear):
    """Whichever is faster for the number of rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_library_faster(x.numel() // self.in_features, x.dtype):
            return nn.functional.linear(x, self.weight, self.bias)
        return super().forward(x)


class RowNorm(nn.Module):
    """Root mean square norm as the families' own modules compute it. Made of one of those by assigning the class.

    Attributes:
        weight, variance_epsilon: as there.
        rounds_last: bfloat16 is rounded after the weight only (GPT-OSS), not also before it.
    """

    weight: torch.Tensor
    variance_epsilon: float
    rounds_last: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        assert x.dtype == self.weight.dtype
        out = torch.empty_like(x)
        dim = x.shape[-1]
        is_bf16 = x.dtype == torch.bfloat16
        kernels().rms_norm(
            x.data_ptr(),
            self.weight.data_ptr(),
            out.data_ptr(),
            x.numel() // dim,
            dim,
            self.variance_epsilon,
            is_bf16,
            self.rounds_last,
            False,
        )
        return out
