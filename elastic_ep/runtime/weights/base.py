"""Where an expert's bytes come from, and how they lie in a slot. One source per file beside this one.

A slot is one run of bytes: each part of the expert at a fixed, aligned offset, so that a digest, a transfer from a peer and a host
backup all see the same bytes.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
import xxhash

from elastic_ep.core.errors import CheckpointError
from elastic_ep.runtime.weights.digest import Read, copy
from elastic_ep.runtime.weights.layout import part_offsets
from elastic_ep.runtime.weights.pages import HUGE_PAGE


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
        return part_offsets(self.parts, self.dtype.itemsize)[0]

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of a slot, padding between parts included."""
        return part_offsets(self.parts, self.dtype.itemsize)[1]

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
    """A place that has experts. `kind` is its name in `bytes_moved`: "peer", "host", "checkpoint", or "local" for this rank itself."""

    @property
    def kind(self) -> str: ...

    def read(self, layer: int, expert: int, slot: torch.Tensor) -> Read:
        """Fill a slot (uint8 [SlotLayout.num_bytes], on the CPU) with the expert's bytes and digest them on the way. Raises
        CheckpointError when it does not have the expert, or not in time."""
        ...

    def known_digest(self, layer: int, expert: int) -> int | None:
        """Of the expert's bytes, if the source was told it when it got them."""
        ...

    def close(self) -> None: ...


class LocalSource:
    """The `ExpertSource` of this rank's own slots. `find(layer, expert)` gives a slot's bytes, None if no slot holds it."""

    kind = "local"

    def __init__(self, find: Callable[[int, int], torch.Tensor | None]) -> None:
        self._find = find

    def read(self, layer: int, expert: int, slot: torch.Tensor) -> Read:
        found = self._find(layer, expert)
        if found is None:
            raise CheckpointError(f"no slot of this rank holds expert {expert} of MoE layer {layer}")
        return copy(slot.numpy(), found.numpy())

    def known_digest(self, layer: int, expert: int) -> int | None:
        return None

    def close(self) -> None:
        """Nothing to do."""


class Loaded(NamedTuple):
    """One expert's bytes, read whole and verified.

    Attributes:
        kind: the source that had them.
        errors: the sources that were asked first, and why they were passed over.
    """

    digest: int
    kind: str
    num_bytes: int
    errors: tuple[str, ...] = ()


def read_verified(sources: Sequence[ExpertSource], layer: int, expert: int, slot: torch.Tensor, digest: int | None) -> Loaded:
    """Fill a slot from the first source whose bytes have the digest; None: the digest that the source itself knows, if any.

    Raises CheckpointError of the last source when none has them.
    """
    errors: list[str] = []
    for source in sources:
        try:
            num_bytes, found = source.read(layer, expert, slot)
            expected = source.known_digest(layer, expert) if digest is None else digest
            if expected is not None and found != expected:
                why = f"the {source.kind}'s copy changed or its memory or disk fails: restore it and restart"
                if source.kind == "peer":
                    why = "the peer holds it elsewhere by now, or its memory fails"
                raise CheckpointError(
                    f"expert {expert} of MoE layer {layer} was read with digest {found:016x}, its bytes had {expected:016x} before; {why}"
                )
            return Loaded(found, source.kind, num_bytes, tuple(errors))
        except CheckpointError as error:
            if source is sources[-1]:
                raise
            errors.append(f"{source.kind}: {error}")
    raise AssertionError("no source given")


def zeroed(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] of zeros, page-aligned, in huge pages where the system gives them: filling ordinary pages for the first time
    takes ten times as long as writing them. The system gives each page when it is first written, not before."""
    huge_bytes = num_bytes // HUGE_PAGE * HUGE_PAGE
    if not huge_bytes:
        return torch.frombuffer(_private(max(1, num_bytes)), dtype=torch.uint8)[:num_bytes]
    pages = _private(num_bytes + HUGE_PAGE)  # what is skipped to begin at a huge page is never written, so it costs nothing
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -memory.data_ptr() % HUGE_PAGE
    with contextlib.suppress(OSError):  # a system without them
        pages.madvise(mmap.MADV_HUGEPAGE, begin, huge_bytes)
    return memory[begin : begin + num_bytes]


def _private(num_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def digest_of(slot: torch.Tensor) -> int:
    """xxh3_64 over a slot's bytes (uint8 [num_bytes])."""
    return xxhash.xxh3_64_intdigest(slot.numpy().data)
