"""Keys and values of the sequences that live on this rank, in pages of TILE tokens, and the attention over them.

Always float32: a bfloat16 model's keys are widened exactly, so nothing is lost, and a score is the same number whether its key was
computed in this step or came from an earlier one. A page covers all layers: [layer][head][key dim][TILE] keys transposed, then
[TILE][value dim] values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.models.families import KVShape
from elastic_ep.models.kernels import kernels
from elastic_ep.runtime.weights.base import zeroed


@dataclass(frozen=True)
class Runs:
    """The tokens of a step by sequence: rows in order, consecutive positions within a run.

    Attributes:
        table: int64 [runs, 4]: first row, count, start position, address of the sequence's page numbers.
        pages: the page numbers that the addresses point into; kept so that they stay valid.
    """

    table: NDArray[np.int64]
    pages: NDArray[np.int64]


class Pages:
    """Which sequence owns which pages of `page_tokens` positions."""

    def __init__(self, num_pages: int, page_tokens: int):
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._free = list(range(num_pages - 1, -1, -1))
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def release(self, seq_id: int) -> None:
        """Free a sequence's pages; an unknown one has none."""
        self._free.extend(reversed(self._pages.pop(seq_id, [])))
        self._lengths.pop(seq_id, None)

    def extend(self, seq_id: int, start: int, count: int) -> None:
        """Make room for positions start .. start + count - 1; what was held at and after `start` is forgotten.

        Raises InvalidInputError when positions before `start` were never written, or when no page is free.
        """
        held = self._lengths.get(seq_id, 0)
        if start > held:
            raise InvalidInputError(f"sequence {seq_id} has {held} positions on this rank, its work starts at {start}; prefill it first")
        pages = self._pages.setdefault(seq_id, [])
        needed = -(-(start + count) // self.page_tokens) - len(pages)
        if needed > len(self._free):
            raise InvalidInputError(
                f"sequence {seq_id} needs {needed} more pages of {self.page_tokens} tokens, {len(self._free)} of {self.num_pages} are "
                f"free; give the rank a larger KV capacity or send it fewer sequences"
            )
        pages.extend(self._free.pop() for _ in range(needed))
        self._lengths[seq_id] = start + count

    def pages_of(self, seq_id: int) -> list[int]:
        """Its page numbers, by position."""
        return self._pages[seq_id]


class PagedKV(Pages):
    """The pool of pages, and which sequence owns which. Memory is touched only as pages are written.

    Args:
        num_layers: decoder layers.
        capacity_tokens: rounded up to whole pages.
    """

    def __init__(self, num_layers: int, shape: KVShape, capacity_tokens: int):
        self._kernels = kernels()
        page_tokens: int = self._kernels.TILE
        super().__init__(-(-capacity_tokens // page_tokens), page_tokens)
        self._shape = shape
        self._padded_value_dim = -(-shape.value_dim // 8) * 8
        self._head_stride = (shape.key_dim + self._padded_value_dim) * self.page_tokens
        self._layer_stride = self._head_stride * shape.num_heads
        self._page_stride = self._layer_stride * num_layers
        self._pool = zeroed(self.num_pages * self._page_stride * 4).view(torch.float32)

    def runs(self, chunks: Sequence[tuple[int, int, int]]) -> Runs:
        """Rows for (sequence, start, count) chunks laid out one after the other; `extend` made room for each."""
        lists = [self.pages_of(seq_id) for seq_id, _, _ in chunks]
        pages = np.fromiter((page for pages in lists for page in pages), dtype=np.int64)
        address, row, table = pages.__array_interface__["data"][0], 0, []
        for (_, start, count), owned in zip(chunks, lists, strict=True):
            table.append((row, count, start, address))
            row += count
            address += 8 * len(owned)
        return Runs(np.array(table, dtype=np.int64).reshape(-1, 4), pages)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        runs: Runs,
        scale: float,
        window: int = 0,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Store the new keys and values, then attend: causal, over the last `window` keys (0: all).

        Args:
            query: float32 [T, heads, key dim]; key, value: [T, kv heads, dim]; all contiguous.
            out: float32 [T, heads, value dim], overwritten.
            sinks: float32 [heads], a logit per head that takes its share of the softmax and gives no value.
        """
        self._kernels.attend(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
            0 if sinks is None else sinks.data_ptr(),
            self._pool.data_ptr(),
            runs.table.__array_interface__["data"][0],
            len(runs.table),
            query.shape[1],
            self._shape.num_heads,
            self._shape.key_dim,
            self._shape.value_dim,
            self._padded_value_dim,
            self._page_stride,
            self._layer_stride * layer,
            self._head_stride,
            window,
            scale,
            False,
        )
