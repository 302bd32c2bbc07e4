"""The bytes of a frame's header: what it says, and which headers are refused before a byte of payload is read or allocated.

Header, 64 bytes, little-endian: magic u32, version u8, phase u8, dtype u8, flags u8 (1: rows lie in the sender's outbox), epoch i64,
step i64, layer u32, rows u32, pairs u32, hidden u32, payload bytes u64, 16 bytes of zeros.

Payload, by phase and flag:
    dispatch           pairs [pairs, 2] int32 (row, expert), then rows [rows, hidden]
    dispatch, outbox   pairs [pairs, 2] int32 (row, expert); `rows` says how many rows the outbox holds
    combine            rows [pairs, hidden], in the order in which the pairs were sent
    combine, outbox    row of each pair [pairs] int32; `rows` as above
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from elastic_ep.runtime.dispatch.base import StepPoint

HEADER_BYTES = 64
PAIR_BYTES = 8
INDEX_BYTES = 4
_LAYOUT = struct.Struct("<IBBBBqqIIIIQ16x")
_MAGIC = 0x70654531
_VERSION = 1
_ITEM_BYTES = (4, 2)
"""bytes of one element by dtype code, as in `checks.DTYPES`"""


class Phase(enum.IntEnum):
    """The two exchanges of one MoE layer, in the order they happen."""

    DISPATCH = 0
    COMBINE = 1


class FrameKey(NamedTuple):
    """Where a frame belongs. Keys of one channel only grow; comparing two tells the older."""

    epoch: int
    step: int
    layer: int
    phase: int

    @classmethod
    def of(cls, at: StepPoint, phase: Phase) -> FrameKey:
        return cls(at.epoch, at.step, at.layer, int(phase))


class FrameError(ValueError):
    """Bytes that are no frame of ours, or a frame that does not fit the exchange it belongs to."""


class Header(NamedTuple):
    key: FrameKey
    dtype_code: int
    in_outbox: bool
    rows: int
    pairs: int
    hidden: int
    payload_bytes: int


def payload_bytes(phase: int, dtype_code: int, in_outbox: bool, rows: int, pairs: int, hidden: int) -> int:
    """How long the payload of such a frame is."""
    row_bytes = hidden * _ITEM_BYTES[dtype_code]
    if phase == Phase.DISPATCH:
        return pairs * PAIR_BYTES + (0 if in_outbox else rows * row_bytes)
    return pairs * INDEX_BYTES if in_outbox else pairs * row_bytes


def pack_header(key: FrameKey, dtype_code: int, in_outbox: bool, rows: int, pairs: int, hidden: int) -> bytes:
    """A frame's first 64 bytes."""
    epoch, step, layer, phase = key
    length = payload_bytes(phase, dtype_code, in_outbox, rows, pairs, hidden)
    return _LAYOUT.pack(_MAGIC, _VERSION, phase, dtype_code, in_outbox, epoch, step, layer, rows, pairs, hidden, length)


def parse_header(raw: bytes | bytearray | memoryview, offset: int, max_payload_bytes: int) -> Header:
    """Read 64 bytes. Raises FrameError unless they are a header of ours whose length is its contents' and within the limit."""
    magic, version, phase, dtype_code, flags, epoch, step, layer, rows, pairs, hidden, length = _LAYOUT.unpack_from(raw, offset)
    if magic != _MAGIC or version != _VERSION:
        raise FrameError(f"magic {magic:#x} version {version}: not a frame of version {_VERSION}")
    if phase > 1 or dtype_code >= len(_ITEM_BYTES) or flags > 1 or epoch < 0 or step < 0:
        raise FrameError(f"phase {phase}, dtype {dtype_code}, flags {flags}, epoch {epoch}, step {step}: not a frame of ours")
    if length > max_payload_bytes or length != payload_bytes(phase, dtype_code, flags == 1, rows, pairs, hidden):
        raise FrameError(f"payload of {length} bytes for {rows} rows, {pairs} pairs, hidden {hidden} (limit {max_payload_bytes})")
    return Header(FrameKey(epoch, step, layer, phase), dtype_code, flags == 1, rows, pairs, hidden, length)
