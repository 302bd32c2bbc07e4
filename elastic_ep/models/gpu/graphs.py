"""Decode steps as CUDA graphs: everything between the step's tables and its largest logits in one launch, exchanges with peers included.

One graph for each number of tokens out of `SIZES`, captured when it is first needed and never again: a new epoch changes what the tables
hold, not where they are. Tokens of nobody fill a graph up; rows do not know each other, so they change nobody's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elastic_ep.brain.messages import SequenceWork
from elastic_ep.models.gpu.kv import DeviceKV, packed_length, unpack

SIZES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class DecodeGraph:
    """One captured step of `count` tokens.

    Attributes:
        packed: the step's tables (`DeviceKV.decode_tables`).
        is_real: int64 [count], 1 for tokens of somebody.
        logits: float32 [count, vocab].
    """

    graph: Any
    count: int
    packed: torch.Tensor
    is_real: torch.Tensor
    logits: torch.Tensor


class DecodeGraphs:
    """The graphs of one rank.

    Args:
        width: pages of the longest sequence.
        forward: tables -> logits [count, vocab] on the device; `is_real` weighs what it counts. Runs during the capture only.
    """

    def __init__(self, kv: DeviceKV, width: int, device: torch.device, forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        self._kv = kv
        self._width = width
        self._device = device
        self._forward = forward
        self._graphs: dict[tuple[int, bool], DecodeGraph] = {}
        self._pool: Any = None

    @staticmethod
    def size_for(work: Sequence[SequenceWork]) -> int | None:
        """The graph for this work; None if it is more than one token of each sequence, or too much."""
        if any(len(item.tokens) != 1 or item.sample is None for item in work):
            return None
        return next((size for size in SIZES if size >= len(work)), None)

    def prepare(self, work: Sequence[SequenceWork], size: int, kind: bool) -> DecodeGraph:
        """The graph of this size with the step's tables on their way into it. `kind`: graphs of another kind are others."""
        found = self._graphs.get((size, kind))
        if found is None:
            found = self._graphs[size, kind] = self._capture(size)
        if size:
            self._kv.decode_tables(work, found.packed, size, self._width)
            found.is_real.copy_((torch.arange(size) < len(work)).long().pin_memory(), non_blocking=True)
        return found

    def _capture(self, size: int) -> DecodeGraph:
        packed = torch.zeros(packed_length(size, size, self._width), dtype=torch.int64, device=self._device)
        is_real = torch.zeros(size, dtype=torch.int64, device=self._device)
        tables = unpack(packed, size, size, self._width)
        graph: Any = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._forward(tables, is_real)
        self._pool = graph.pool()
        return DecodeGraph(graph, size, packed, is_real, logits)
