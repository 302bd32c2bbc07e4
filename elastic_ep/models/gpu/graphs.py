"""Decode steps as CUDA graphs, so that a step does not wait for the processor to launch its kernels one by one.

Over the cuda dispatch backend a step is one graph, exchanges with peers included. Over a backend of host memory it is one piece between
two exchanges each. Graphs are captured once for each number of tokens out of `SIZES` when it is first needed: a new epoch changes what the
tables hold, not where they are. Tokens of nobody fill a graph up; rows do not know each other, so they change nobody's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from elastic_ep.brain.messages import SequenceWork
from elastic_ep.models.gpu.experts import DeviceExperts, DeviceStep
from elastic_ep.models.gpu.kv import DeviceKV, StepTables, packed_length, unpack

SIZES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


class Piece(NamedTuple):
    """A graph, and the exchange that comes after it: what the experts get, and where what they give has to be; None at the end."""

    graph: Any
    experts: DeviceExperts | None = None
    x: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    combined: torch.Tensor | None = None


@dataclass(frozen=True)
class DecodeGraph:
    """One captured step of up to `count` tokens.

    Attributes:
        packed: the step's tables (`DeviceKV.decode_tables`).
        is_real: int64 [count], 1 for tokens of somebody.
        logits: float32 [count, vocab].
    """

    pieces: Sequence[Piece]
    packed: torch.Tensor
    is_real: torch.Tensor
    logits: torch.Tensor

    def replay(self, state: DeviceStep, num_tokens: int) -> torch.Tensor:
        """Enqueue all of it; between two pieces the exchange is waited for. Returns [num_tokens, vocab]. Raises StepVoid."""
        for piece in self.pieces:
            piece.graph.replay()
            if piece.experts is not None:
                assert piece.x is not None
                assert piece.ids is not None
                assert piece.weights is not None
                assert piece.combined is not None
                out = piece.experts.exchange(piece.x[:num_tokens], piece.ids[:num_tokens], piece.weights[:num_tokens], state)
                piece.combined[:num_tokens].copy_(out)
        return self.logits[:num_tokens]


@dataclass
class Capture:
    """A forward that is being captured; `cut` is called where another exchange has to take place."""

    pool: Any
    pieces: list[Piece] = field(default_factory=list)
    graph: Any = None

    def begin(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def cut(self, experts: DeviceExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """End this piece, begin the next. Returns the memory that the exchange's result will be in."""
        self.graph.capture_end()
        combined = torch.zeros_like(x)
        self.pieces.append(Piece(self.graph, experts, x, ids, weights, combined))
        self.begin()
        return combined

    def end(self) -> None:
        self.graph.capture_end()
        self.pieces.append(Piece(self.graph))


class DecodeGraphs:
    """The graphs of one rank.

    Args:
        width: pages of the longest sequence.
        forward: (tables, is_real, cut) -> logits [count, vocab] on the device. Runs during the capture only.
    """

    def __init__(
        self, kv: DeviceKV, width: int, device: torch.device, forward: Callable[[StepTables, torch.Tensor, Any], torch.Tensor]
    ) -> None:
        self._kv = kv
        self._width = width
        self._device = device
        self._forward = forward
        self._graphs: dict[tuple[int, str], DecodeGraph] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()
        # torch hands out streams of one priority in turn: of another, it is shared with no thread that loads or sends experts
        self._stream: Any = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    @staticmethod
    def size_for(work: Sequence[SequenceWork], most: int) -> int | None:
        """The graph for this work; None if it is more than one token of each sequence, or the graph would have more than `most` tokens."""
        if any(len(item.tokens) != 1 or item.sample is None for item in work):
            return None
        return next((size for size in SIZES if len(work) <= size <= most), None)

    def prepare(self, work: Sequence[SequenceWork], size: int, kind: str, is_cut: bool) -> DecodeGraph:
        """The graph of this size with the step's tables on their way into it. Graphs of another `kind` are others; `is_cut`: in pieces."""
        found = self._graphs.get((size, kind))
        if found is None:
            found = self._graphs[size, kind] = self._capture(size, is_cut)
        if size:
            self._kv.decode_tables(work, found.packed, size, self._width)
            found.is_real.copy_((torch.arange(size) < len(work)).long().pin_memory(), non_blocking=True)
        return found

    def _capture(self, size: int, is_cut: bool) -> DecodeGraph:
        packed = torch.zeros(packed_length(size, size, self._width), dtype=torch.int64, device=self._device)
        is_real = torch.zeros(size, dtype=torch.int64, device=self._device)
        capture = Capture(self._pool)
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream):
            capture.begin()
            logits = self._forward(unpack(packed, size, size, self._width), is_real, capture.cut if is_cut else None)
            capture.end()
        torch.cuda.synchronize(self._device)
        return DecodeGraph(tuple(capture.pieces), packed, is_real, logits)
