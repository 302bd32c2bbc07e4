"""Where an expert's bytes come from, and how they lie in a slot. One source per file beside this one.

A slot is one run of bytes: each part of the expert at a fixed, aligned offset, so that a digest, a transfer from a peer and a host
backup all see the same bytes.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
import xxhash

ALIGNMENT = 64
"""bytes; matrix kernels may pick another order of sums for a matrix that starts elsewhere in a cache line"""


@dataclass(frozen=True)
class SlotLayout:
    """The parts of one expert in a slot.

    Example, float32 (4 bytes), gate_up_proj [6, 4] and down_proj [4, 3]: offsets {gate_up_proj: 0, down_proj: 128}, num_bytes 192.

    Attributes:
        parts: (name, shape) in order.
        dtype: of every part.
    """

    parts: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: torch.dtype

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Byte offset of each part."""
        out, at = {}, 0
        for name, shape in self.parts:
            out[name] = at
            at = _align(at + math.prod(shape) * self.dtype.itemsize)
        return out

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of a slot, padding between parts included."""
        name, shape = self.parts[-1]
        return _align(self.offsets[name] + math.prod(shape) * self.dtype.itemsize)

    def views(self, slot: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of a slot (uint8 [num_bytes]) as tensors that share its memory."""
        out = {}
        for name, shape in self.parts:
            begin = self.offsets[name]
            out[name] = slot[begin : begin + math.prod(shape) * self.dtype.itemsize].view(self.dtype).view(shape)
        return out


class Piece(NamedTuple):
    """One read that fills a stretch of a part: `tensor` (or `tensor[item]`), of `shape`, goes to `part` from element `first` on."""

    tensor: str
    item: int | None
    shape: tuple[int, ...]
    part: str
    first: int


class ExpertSource(Protocol):
    """A place that has experts. Three methods; a source that has lost one raises CheckpointError (or its own kin)."""

    def has(self, layer: int, expert: int) -> bool:
        """Whether `read` could succeed now. Never blocks for long."""
        ...

    def read(self, layer: int, expert: int, slot: torch.Tensor) -> int:
        """Fill a slot (uint8 [SlotLayout.num_bytes]) with the expert's bytes. Returns the bytes read from the source."""
        ...

    def close(self) -> None: ...


def zeroed(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] of zeros, page-aligned. The system gives each page when it is first written, not before."""
    return torch.frombuffer(mmap.mmap(-1, max(1, num_bytes)), dtype=torch.uint8)[:num_bytes]


def digest_of(slot: torch.Tensor) -> int:
    """xxh3_64 over a slot's bytes (uint8 [num_bytes])."""
    return xxhash.xxh3_64_intdigest(slot.numpy().data)


def _align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
