"""Keys and values in GPU memory, in the model's dtype, in pages; and the attention over them (`kernels.attend`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from elastic_ep.brain.messages import SequenceWork
from elastic_ep.models.families import KVShape
from elastic_ep.models.gpu import kernels
from elastic_ep.models.kv import Pages

_KEYS_PER_TILE = 64


class StepTables(NamedTuple):
    """A step's tokens, all int64, on the device (while they are made: arrays): ids, positions, sequences, cells [T]; pages [sequences,
    most pages of one].

    Attributes:
        sequences: which row of `pages` is the token's.
        cells: where its key and value go: page * page_tokens + place.
    """

    ids: Any
    positions: Any
    sequences: Any
    cells: Any
    pages: Any


def packed_length(tokens: int, sequences: int, width: int) -> int:
    """Words of the tables in one piece of memory."""
    return 4 * (tokens + tokens % 2) + sequences * width


def unpack(packed: Any, tokens: int, sequences: int, width: int) -> StepTables:
    """Views of it, an array or a tensor. Each begins at 16 bytes, so that a kernel is compiled once."""
    stride = tokens + tokens % 2
    ids, positions, at, cells = packed[: 4 * stride].reshape(4, stride)[:, :tokens]
    return StepTables(ids, positions, at, cells, packed[4 * stride :].reshape(sequences, width))


class DeviceKV(Pages):
    """The pool: keys [layers, pages * page_tokens, kv heads, key dim] and values. It is the `Attention` of its engine, too.

    Args:
        capacity_tokens: rounded up to whole pages of `page_tokens`, which is a power of two.

    Attributes:
        scratch_page: one more page, of no sequence, for what must be written somewhere.
    """

    def __init__(self, num_layers: int, shape: KVShape, capacity_tokens: int, page_tokens: int, dtype: torch.dtype, device: torch.device):
        super().__init__(-(-capacity_tokens // page_tokens), page_tokens)
        self._device = device
        self.scratch_page = self.num_pages
        cells = (self.num_pages + 1) * page_tokens
        self._keys = torch.zeros(num_layers, cells, shape.num_heads, shape.key_dim, dtype=dtype, device=device)
        self._values = torch.zeros(num_layers, cells, shape.num_heads, shape.value_dim, dtype=dtype, device=device)
        self.step: StepTables | None = None

    def tables(self, work: Sequence[SequenceWork]) -> StepTables:
        """For sequences laid out one after the other; `extend` made room for each. One copy to the device."""
        total, width = sum(len(item.tokens) for item in work), max(len(self.pages_of(item.seq_id)) for item in work)
        packed = np.zeros(packed_length(total, len(work), width), dtype=np.int64)
        self.fill_tables(unpack(packed, total, len(work), width), work)
        return unpack(torch.from_numpy(packed).pin_memory().to(self._device, non_blocking=True), total, len(work), width)

    def fill_tables(self, host: StepTables, work: Sequence[SequenceWork]) -> int:
        """The same into arrays of zeros that may be longer: tokens of nobody follow, in the scratch page. Returns the others' number."""
        counts = np.array([len(item.tokens) for item in work])
        total = int(counts.sum())
        host.ids[:total] = [token for item in work for token in item.tokens]
        host.sequences[:total] = np.repeat(np.arange(len(work)), counts)
        host.sequences[total:] = len(host.pages) - 1
        starts = np.array([item.start for item in work])
        host.positions[:total] = np.arange(total) - np.repeat(counts.cumsum() - counts, counts) + np.repeat(starts, counts)
        host.pages[len(work) :] = self.scratch_page
        for row, item in zip(host.pages, work, strict=False):
            owned = self.pages_of(item.seq_id)
            row[: len(owned)] = owned
        page, place = np.divmod(host.positions, self.page_tokens)
        host.cells[:] = host.pages[host.sequences, page] * self.page_tokens + place
        return total

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Attention.attend`."""
        step = self.step
        assert step is not None, "attention outside of a step"
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, step.cells, key[0].transpose(0, 1))
        values.index_copy_(0, step.cells, value[0].transpose(0, 1))
        by_token = query[0].transpose(0, 1).contiguous()
        tokens, heads, key_dim = by_token.shape
        kv_heads, value_dim = values.shape[1:]
        out = torch.empty(tokens, heads, value_dim, dtype=query.dtype, device=query.device)
        kernels.attend[(tokens, kv_heads)](
            by_token,
            keys,
            values,
            out,
            out if sinks is None else sinks,
            step.sequences,
            step.positions,
            step.pages,
            step.pages.shape[1],
            scale,
            window,
            kv_heads,
            key_dim,
            value_dim,
            heads // kv_heads,
            sinks is not None,
            self.page_tokens,
            _KEYS_PER_TILE,
            max(16, 1 << (heads // kv_heads - 1).bit_length()),
            max(16, 1 << (key_dim - 1).bit_length()),
            max(16, 1 << (value_dim - 1).bit_length()),
        )
        return out.unsqueeze(0)
