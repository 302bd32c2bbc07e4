"""The bytes of a frame's header: what it says, and which headers are refused before a byte of payload is read or allocated.

Header, 64 bytes, little-endian. The first 32 are the same in all frames of one exchange: magic u32, version u8, phase u8, dtype u8,
zero u8, epoch i64, step i64, layer u32, hidden u32. Then: flags u32 (1: the rows lie in the sender's outbox), rows u32, pairs u32,
zero u32, payload bytes u64, 8 bytes of zeros.

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
_COMMON = struct.Struct("<IBBBBqqII")
_OWN = struct.Struct("<III4xQ8x")
_MAGIC = 0x70654531
_VERSION = 1
_PAIR_BYTES = 8
_INDEX_BYTES = 4
_ITEM_BYTES = (4, 2)
"""bytes of one element by dtype code, as in `checks.DTYPES`"""
_NUM_PHASES = 2


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
    """What one frame says of itself beyond its exchange."""

    in_outbox: bool
    rows: int
    pairs: int
    payload_bytes: int


class FrameFormat:
    """What all frames of one exchange have in common. `prefix` is how their headers begin."""

    __slots__ = ("dtype_code", "hidden", "key", "prefix", "row_bytes")

    def __init__(self, key: FrameKey, dtype_code: int, hidden: int):
        self.key = key
        self.dtype_code = dtype_code
        self.hidden = hidden
        self.row_bytes = hidden * _ITEM_BYTES[dtype_code]
        self.prefix = _COMMON.pack(_MAGIC, _VERSION, key.phase, dtype_code, 0, key.epoch, key.step, key.layer, hidden)

    def payload_bytes(self, in_outbox: bool, rows: int, pairs: int) -> int:
        """How long the payload of such a frame is."""
        if self.key.phase == Phase.DISPATCH:
            return pairs * _PAIR_BYTES + (0 if in_outbox else rows * self.row_bytes)
        return pairs * (_INDEX_BYTES if in_outbox else self.row_bytes)

    def pack(self, in_outbox: bool, rows: int, pairs: int) -> bytes:
        """A frame's header."""
        return self.prefix + _OWN.pack(in_outbox, rows, pairs, self.payload_bytes(in_outbox, rows, pairs))

    def parse(self, raw: bytes | bytearray | memoryview, offset: int, max_payload_bytes: int) -> Header:
        """The second half of a header that begins with `prefix`. Raises FrameError for a length that is not its contents' or too much."""
        flags, rows, pairs, length = _OWN.unpack_from(raw, offset + _COMMON.size)
        if flags > 1 or length > max_payload_bytes or length != self.payload_bytes(flags == 1, rows, pairs):
            raise FrameError(f"flags {flags}, payload of {length} bytes for {rows} rows, {pairs} pairs of hidden {self.hidden}")
        return Header(flags == 1, rows, pairs, length)


def parse_foreign(raw: bytes | bytearray | memoryview, offset: int, max_payload_bytes: int) -> tuple[FrameFormat, Header]:
    """A header of whichever exchange. Raises FrameError for bytes that are no header of ours."""
    magic, version, phase, dtype_code, zero, epoch, step, layer, hidden = _COMMON.unpack_from(raw, offset)
    if magic != _MAGIC or version != _VERSION:
        raise FrameError(f"magic {magic:#x} version {version}: not a frame of version {_VERSION}")
    if phase >= _NUM_PHASES or dtype_code >= len(_ITEM_BYTES) or zero or epoch < 0 or step < 0:
        raise FrameError(f"phase {phase}, dtype {dtype_code}, epoch {epoch}, step {step}: not a frame of ours")
    frame_format = FrameFormat(FrameKey(epoch, step, layer, phase), dtype_code, hidden)
    return frame_format, frame_format.parse(raw, offset, max_payload_bytes)
