"""Products, norms and gates on the GPU, over the kernels beside this file; what transformers' modules become."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from elastic_ep.models.build import use_router_weights, use_row_kernels
from elastic_ep.models.gpu import kernels
from elastic_ep.models.linear import RouterWeight, RowNorm

_BM = 32
_SIDE_BY_SIDE = 4
"""row tiles of one expert that run at once"""
_GATE_PROGRAMS = 528


class Tile(NamedTuple):
    """Columns and depth of a product's tile: by the matrix alone, never by the rows."""

    cols: int
    depth: int

    @staticmethod
    def of(num_out: int, dtype: torch.dtype) -> Tile:
        """Narrow tiles for narrow matrices, so that enough programs run."""
        return Tile(32 if num_out <= 8192 else 64, 128 if dtype == torch.bfloat16 else 32)


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., in] @ weight [out, in].T + bias, summed in float32, rounded once; a row's bits depend on the row and the weight alone."""
    x = x.contiguous()
    num_out, depth = weight.shape
    assert x.dtype == weight.dtype
    out = torch.empty(*x.shape[:-1], num_out, dtype=x.dtype, device=x.device)
    rows = x.numel() // depth
    if rows:
        tile = Tile.of(num_out, x.dtype)
        grid = (-(-num_out // tile.cols), -(-rows // _BM))
        kernels.linear[grid](x, weight, bias, out, rows, num_out, depth, bias is not None, _BM, tile.cols, tile.depth)
    return out


class Part(NamedTuple):
    """One matrix of every slot: elements from a slot's begin to the matrix and to its bias (-1: none)."""

    weight_at: int
    bias_at: int
    num_out: int
    depth: int
    is_in_out: bool


class Groups(NamedTuple):
    """Whose rows are where, on the device: offsets int32 [E + 1], slot_of int32 [E], wrong int32 [1] (see `kernels.grouped`)."""

    offsets: torch.Tensor
    slot_of: torch.Tensor
    wrong: torch.Tensor


def multiply_groups(x: torch.Tensor, memory: torch.Tensor, part: Part, groups: Groups, out: torch.Tensor) -> None:
    """out[rows of e] = x[rows of e] @ (the part of e's slot) for each expert; memory [slots, elements of a slot], x's dtype."""
    tile = Tile.of(part.num_out, x.dtype)
    grid = (-(-part.num_out // tile.cols), len(groups.slot_of), _SIDE_BY_SIDE)
    kernels.grouped[grid](
        x,
        out,
        groups.offsets,
        groups.slot_of,
        groups.wrong,
        memory,
        memory.shape[1],
        part.weight_at,
        max(part.bias_at, 0),
        part.num_out,
        part.depth,
        part.bias_at >= 0,
        part.is_in_out,
        _BM,
        tile.cols,
        tile.depth,
    )


def swiglu(gate_up: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of the first offsets[-1] rows of [rows, 2 I] -> [rows, I]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    kernels.swiglu[(min(rows, _GATE_PROGRAMS),)](gate_up, out, offsets[-1:], width, 1024)
    return out


class DeviceLinear(nn.Linear):
    """nn.Linear by `multiply`. Made of an nn.Linear by assigning the class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(x, self.weight, self.bias)


class DeviceNorm(RowNorm):
    """The same on the device."""

    place: Callable[[torch.Tensor], torch.Tensor] = torch.empty_like
    """x -> memory like it, which the result is written to"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out: torch.Tensor = self.place(x)
        dim = x.shape[-1]
        if x.numel():
            block = max(16, 1 << (dim - 1).bit_length())
            kernels.rms_norm[(x.numel() // dim,)](x, self.weight, out, dim, self.variance_epsilon, self.rounds_last, block)
        return out


class DeviceRouterWeight(RouterWeight):
    """The same on the device."""

    product = staticmethod(multiply)


def use_device_kernels(model: PreTrainedModel) -> None:
    """Make every nn.Linear a DeviceLinear, every root mean square norm a DeviceNorm, and every router's matrix a DeviceRouterWeight."""
    use_row_kernels(model, DeviceLinear, DeviceNorm)
    use_router_weights(model, DeviceRouterWeight)
