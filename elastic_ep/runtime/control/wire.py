"""Control messages as bytes: 4-byte length, 1-byte kind, msgpack body. One stream per rank."""

from __future__ import annotations

import socket
import struct
from typing import Any

import msgspec

from elastic_ep.brain import messages
from elastic_ep.core.errors import ElasticEPError

_KINDS: tuple[type, ...] = (
    messages.Hello,
    messages.DenseLoaded,
    messages.Installed,
    messages.InstallFailed,
    messages.StepDone,
    messages.StepFailed,
    messages.Heartbeat,
    messages.RankFatal,
    messages.Install,
    messages.RunStep,
    messages.Shutdown,
    messages.Stage,
    messages.Staged,
    messages.StageFailed,
    messages.StartOver,
)
_KIND_OF = {cls: i for i, cls in enumerate(_KINDS)}
_DECODERS: list[msgspec.msgpack.Decoder[Any]] = [msgspec.msgpack.Decoder(cls) for cls in _KINDS]
_ENCODER = msgspec.msgpack.Encoder()
_HEADER = struct.Struct("<IB")
HEADER_BYTES = _HEADER.size
MAX_MESSAGE_BYTES = 256 << 20


class WireError(ElasticEPError):
    """The other side sent bytes that are no message of ours. Its channel must be closed."""


def encode(message: Any) -> bytes:
    """Header and body of one message."""
    body = _ENCODER.encode(message)
    return _HEADER.pack(len(body), _KIND_OF[type(message)]) + body


def parse_header(header: bytes | bytearray | memoryview, max_bytes: int = MAX_MESSAGE_BYTES) -> tuple[int, int]:
    """(body bytes, kind). Raises WireError before anything is allocated for a length or kind that cannot be."""
    length, kind = _HEADER.unpack_from(header)
    if length > max_bytes or kind >= len(_KINDS):
        limits = f"kinds end at {len(_KINDS) - 1}, the limit is {max_bytes} bytes"
        raise WireError(f"control message of kind {kind} and {length} bytes; {limits}")
    return length, kind


def decode(kind: int, body: bytes | bytearray | memoryview) -> Any:
    """One message. Raises WireError if the body is not what its kind says."""
    try:
        return _DECODERS[kind].decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"control message {_KINDS[kind].__name__}: {error}") from None


class MessageBuffer:
    """Cuts a byte stream into messages (the controller's side). `max_bytes`, which may be changed, is the longest that it takes."""

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._data = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages completed by `data`. Raises WireError."""
        self._data += data
        out, at = [], 0
        while len(self._data) - at >= HEADER_BYTES:
            length, kind = parse_header(memoryview(self._data)[at : at + HEADER_BYTES].tobytes(), self.max_bytes)
            end = at + HEADER_BYTES + length
            if len(self._data) < end:
                break
            out.append(decode(kind, bytes(self._data[at + HEADER_BYTES : end])))
            at = end
        if at:
            del self._data[:at]
        return out


def receive(sock: socket.socket) -> Any | None:
    """Read exactly one message from a blocking socket, None at end-of-file. What follows stays in the kernel: it still wakes a poll."""
    header = _receive_exactly(sock, HEADER_BYTES)
    if header is None:
        return None
    length, kind = parse_header(header)
    body = _receive_exactly(sock, length)
    return None if body is None else decode(kind, body)


def _receive_exactly(sock: socket.socket, count: int) -> bytearray | None:
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        n = sock.recv_into(view[got:])
        if n == 0:
            return None
        got += n
    return data
