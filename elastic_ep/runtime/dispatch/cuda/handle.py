"""What a dispatch on the GPU hands out: everything on the device at once, the protocol's host values when somebody asks for them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from elastic_ep.runtime.dispatch.base import DispatchHandle


@dataclass(frozen=True)
class DeviceBatch:
    """One dispatch as kernels see it. T tokens here, K experts each, H hidden, E experts.

    Attributes:
        rows: [capacity, H] rows received, grouped by expert; valid up to offsets[E]. The next dispatch overwrites it.
        outputs: [capacity, H] where the experts write their outputs, row by row as in `rows`; peers read it in place.
        offsets: int32 [E + 1], the rows of expert e are offsets[e] to offsets[e + 1]. The next dispatch overwrites it.
        layer: index among the MoE layers.
        x, topk_ids, topk_weights: the batch, weights as float32 [T, K]. Kept so that its memory is not given to others.
    """

    rows: torch.Tensor
    outputs: torch.Tensor
    offsets: torch.Tensor
    layer: int
    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


class CudaHandle(DispatchHandle):
    """A `DispatchHandle` whose `rows` and `groups` wait for the device when they are read. `state` never does."""

    state: DeviceBatch

    def __init__(self, state: DeviceBatch):
        object.__setattr__(self, "state", state)

    def read_offsets(self) -> list[int]:
        """`state.offsets` on the host. Waits for the device; to be called before the next dispatch."""
        cuts: list[int] = self.state.offsets.tolist()
        return cuts

    @property
    def rows(self) -> torch.Tensor:
        return self.state.rows[: self.read_offsets()[-1]]

    @property
    def groups(self) -> tuple[tuple[int, int, int], ...]:
        cuts = self.read_offsets()
        return tuple((e, a, b) for e, (a, b) in enumerate(itertools.pairwise(cuts)) if a < b)
