"""Steps as CUDA graphs, so that a step does not wait for the processor to launch its kernels one by one.

Over the cuda dispatch backend a step is one graph, exchanges with peers included. Over a backend of host memory it is one piece between
two exchanges each. Graphs are captured once for each number of tokens out of `SIZES`: a new epoch changes what the tables hold, not where
they are. Tokens of nobody fill a graph up; rows do not know each other, so they change nobody's bits. Nor does it matter to a graph whose
tokens they are: a prompt's are rows like any other, each with its own way through the pages of its sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.brain.messages import SequenceWork
from elastic_ep.models.gpu.experts import DeviceExperts, DeviceStep
from elastic_ep.models.gpu.kv import DeviceKV, StepTables, packed_length, unpack

SIZES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def graph_size(num_tokens: int) -> int:
    """Tokens of the smallest graph that holds so many; `num_tokens` if none does."""
    return next((size for size in SIZES if size >= num_tokens), num_tokens)


class Piece(NamedTuple):
    """A graph, and the exchange that comes after it: what the experts get, and where what they give has to be; None at the end."""

    graph: Any
    experts: DeviceExperts | None = None
    x: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    combined: torch.Tensor | None = None


class Marks(NamedTuple):
    """What a graph reads beside `StepTables`, on the device.

    Attributes:
        is_real: int64 [tokens], 1 for tokens of somebody.
        sampled: int64 [most that are sampled], the rows whose logits are wanted.
    """

    is_real: Any
    sampled: Any


@dataclass(frozen=True)
class StepGraph:
    """One captured step of up to so many tokens.

    Attributes:
        packed: its tables and marks, one after the other.
        logits: float32 [most that are sampled, vocab].
    """

    pieces: Sequence[Piece]
    packed: torch.Tensor
    logits: torch.Tensor

    def replay(self, state: DeviceStep, num_tokens: int, num_sampled: int) -> torch.Tensor:
        """Enqueue all of it; between two pieces the exchange is waited for. Returns [num_sampled, vocab]. Raises StepVoid."""
        for piece in self.pieces:
            piece.graph.replay()
            if piece.experts is not None:
                assert piece.x is not None
                assert piece.ids is not None
                assert piece.weights is not None
                assert piece.combined is not None
                out = piece.experts.exchange(piece.x[:num_tokens], piece.ids[:num_tokens], piece.weights[:num_tokens], state)
                piece.combined[:num_tokens].copy_(out)
        return self.logits[:num_sampled]


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


class StepGraphs:
    """The graphs of one rank.

    Args:
        width: pages of the longest sequence.
        max_sequences: of one step.
        forward: (tables, marks, cut) -> logits [most that are sampled, vocab] on the device. Runs during the capture only.
    """

    def __init__(
        self,
        kv: DeviceKV,
        width: int,
        max_sequences: int,
        device: torch.device,
        forward: Callable[[StepTables, Marks, Any], torch.Tensor],
    ) -> None:
        self._kv = kv
        self._width = width
        self._max_sequences = max_sequences
        self._device = device
        self._forward = forward
        self._graphs: dict[tuple[int, str], StepGraph] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()
        # torch hands out streams of one priority in turn: of another, it is shared with no thread that loads or sends experts
        self._stream: Any = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def size_for(self, work: Sequence[SequenceWork], most: int) -> int | None:
        """The graph for this work; None if there is none so large, or it would have more than `most` tokens."""
        size = graph_size(sum(len(item.tokens) for item in work))
        return size if size <= min(SIZES[-1], most) and len(work) <= self._max_sequences else None

    def prepare(self, work: Sequence[SequenceWork], size: int, kind: str, is_cut: bool) -> StepGraph:
        """The graph of this size with the step's tables on their way into it. Graphs of another `kind` are others; `is_cut`: in pieces."""
        graph = self.captured(size, kind, is_cut)
        if size:
            graph.packed.copy_(torch.from_numpy(self._pack(work, size)).pin_memory(), non_blocking=True)
        return graph

    def captured(self, size: int, kind: str, is_cut: bool) -> StepGraph:
        """The graph of this size, captured now if it was not before."""
        found = self._graphs.get((size, kind))
        if found is None:
            found = self._graphs[size, kind] = self._capture(size, is_cut)
        return found

    def _pack(self, work: Sequence[SequenceWork], size: int) -> NDArray[np.int64]:
        packed = np.zeros(self._length(size), dtype=np.int64)
        tables, marks = self._unpack(packed, size)
        num_tokens = self._kv.fill_tables(tables, work)
        marks.is_real[:num_tokens] = 1
        ends = np.cumsum([len(item.tokens) for item in work])
        rows = [int(end) - 1 for item, end in zip(work, ends, strict=True) if item.sample is not None]
        marks.sampled[: len(rows)] = rows
        return packed

    def _length(self, size: int) -> int:
        return self._tables_length(size) + size + min(size, self._max_sequences)

    def _tables_length(self, size: int) -> int:
        return packed_length(size, self._rows(size), self._width)

    def _rows(self, size: int) -> int:
        """Of pages: each sequence's, and the scratch page of the tokens of nobody."""
        return min(size, self._max_sequences) + 1

    def _unpack(self, packed: Any, size: int) -> tuple[StepTables, Marks]:
        begin = self._tables_length(size)
        tables = unpack(packed[:begin], size, self._rows(size), self._width)
        return tables, Marks(packed[begin : begin + size], packed[begin + size :])

    def _capture(self, size: int, is_cut: bool) -> StepGraph:
        packed = torch.zeros(self._length(size), dtype=torch.int64, device=self._device)
        tables, marks = self._unpack(packed, size)
        capture = Capture(self._pool)
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream):
            capture.begin()
            logits = self._forward(tables, marks, capture.cut if is_cut else None)
            capture.end()
        torch.cuda.synchronize(self._device)
        return StepGraph(tuple(capture.pieces), packed, logits)
