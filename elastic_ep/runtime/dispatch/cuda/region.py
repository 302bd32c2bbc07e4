"""A rank's memory that its peers map: how large, what lies where, and how it is made known to them."""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.dispatch.cuda.bindings import IPC_HANDLE_BYTES, Library

_HEADER_BYTES = 4096
_ALIGN = 256
_MAX_EXPERTS = 0xFFFF
_MAX_TOP_K = 32
_MAX_SEATS = 256


@dataclass(frozen=True)
class Capacity:
    """The largest batch that the buffers hold; alike on all ranks of a run.

    Attributes:
        num_seats: ranks, dead ones included; num_experts: logical experts per layer; num_layers: MoE layers.
        max_tokens: per rank and step; top_k: largest K.
        hidden: largest H; itemsize: bytes per element of a row, 2 or 4.
        max_replicas: of one expert, in any epoch.
        max_rows: rows that one rank can receive; None: as many as all ranks can send.
    """

    num_seats: int
    num_experts: int
    num_layers: int
    max_tokens: int
    top_k: int
    hidden: int
    itemsize: int = 2
    max_replicas: int = 8
    max_rows: int | None = None

    def __post_init__(self) -> None:
        for name, limit in (("num_seats", _MAX_SEATS), ("num_experts", _MAX_EXPERTS), ("top_k", _MAX_TOP_K), ("num_layers", 4094)):
            if not 1 <= getattr(self, name) <= limit:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; the cuda dispatch backend takes 1 to {limit}")

    @property
    def rows(self) -> int:
        """Rows that one rank can receive."""
        return self.max_rows if self.max_rows is not None else self.num_seats * self.max_tokens * self.top_k

    @property
    def row_bytes(self) -> int:
        """Bytes of the largest row."""
        return self.hidden * self.itemsize

    @property
    def digest(self) -> bytes:
        """Alike only where the capacities are."""
        return hashlib.sha256(repr(self).encode()).digest()[:16]


class Layout(NamedTuple):
    """Byte offsets in a region, and its size; see kernels.cu."""

    pairs_at: int
    counts_at: int
    x_at: int
    y_at: int
    num_bytes: int

    @classmethod
    def of(cls, capacity: Capacity) -> Layout:
        sizes = (
            capacity.max_tokens * capacity.top_k * 8,
            capacity.num_seats * capacity.num_experts * 4,
            capacity.max_tokens * capacity.row_bytes,
            capacity.rows * capacity.row_bytes,
        )
        at = [_HEADER_BYTES]
        for size in sizes:
            at.append(-(-(at[-1] + size) // _ALIGN) * _ALIGN)
        return cls(*at)


@cache
def _process_id() -> bytes:
    """Tells this process from every other, in any namespace."""
    return struct.pack("<q", os.getpid()) + os.urandom(8)


_HELLO = struct.Struct(f"<8s16s16s16sq{IPC_HANDLE_BYTES}s")
HELLO_BYTES = _HELLO.size
_MAGIC = b"EEPCUDA1"


class Hello(NamedTuple):
    """What a rank tells a peer about its region."""

    process: bytes
    gpu: bytes
    capacity: bytes
    pointer: int
    handle: bytes

    @classmethod
    def of(cls, library: Library, capacity: Capacity, pointer: int, device: torch.device) -> Hello:
        return cls(_process_id(), gpu_id(device), capacity.digest, pointer, library.export(pointer))

    def pack(self) -> bytes:
        return _HELLO.pack(_MAGIC, *self)

    @classmethod
    def parse(cls, raw: bytes) -> Hello | None:
        """None if these are not the bytes of a hello."""
        magic, *rest = _HELLO.unpack(raw)
        return cls(*rest) if magic == _MAGIC else None

    @property
    def is_local(self) -> bool:
        """From a rank in this very process: its memory needs no mapping, and could not be mapped."""
        return self.process == _process_id()


def gpu_id(device: torch.device) -> bytes:
    """16 bytes that name the physical GPU."""
    return hashlib.sha256(str(torch.cuda.get_device_properties(device).uuid).encode()).digest()[:16]


class _Pointer:
    """Device memory in the form that torch adopts without copying."""

    def __init__(self, pointer: int, num_bytes: int):
        self.__cuda_array_interface__ = {"shape": (num_bytes,), "typestr": "|u1", "data": (pointer, False), "version": 3}


def as_tensor(pointer: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [num_bytes] over device memory that somebody else owns."""
    holder: Any = _Pointer(pointer, num_bytes)
    return torch.as_tensor(holder, device=device)
