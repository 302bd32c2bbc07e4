"""What the controller and the agent of another host say to each other. One tagged msgpack record per message, 4-byte length in front."""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from elastic_ep.runtime.control.wire import WireError

MAX_MESSAGE_BYTES = 16 << 20
_LENGTH = struct.Struct("<I")


class Terms(msgspec.Struct, frozen=True, tag=True):
    """Controller, first: what the run is. The agent leaves if it cannot serve it.

    Attributes:
        run_id: of this server process; with the token it gives the ranks' token.
        checkpoint: folder, as the server knows it; `fingerprint` of what it holds.
        beat_s: how often both sides say that they live; `silence_s`: silence after which the other is given up.
    """

    run_id: str
    checkpoint: str
    fingerprint: str
    beat_s: float
    silence_s: float


class Offer(msgspec.Struct, frozen=True, tag=True):
    """Agent: here is a host.

    Attributes:
        agent_id: of this agent process; it takes over what the same agent held on a connection before.
        node: the label of its failure domain.
        ranks: how many seats to take; None for all that are free.
        running: (rank, incarnation) of processes that it still has, after a cut.
    """

    agent_id: str
    node: str
    host: str
    pid: int
    ranks: int | None
    running: tuple[tuple[int, int], ...] = ()


class StartOver(msgspec.Struct, frozen=True, tag=True):
    """Part of Seated: this process was given up; end it. Its seat gets a new one."""

    rank: int
    incarnation: int
    reason: str


class Seated(msgspec.Struct, frozen=True, tag=True):
    """Controller: these ranks are yours; of what you still run, end these."""

    ranks: tuple[int, ...]
    start_over: tuple[StartOver, ...] = ()


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Controller: no, and why. `is_final`: asking again would not help."""

    reason: str
    is_final: bool


class StartProcess(msgspec.Struct, frozen=True, tag=True):
    rank: int
    incarnation: int
    program: dict[str, Any]


class KillProcess(msgspec.Struct, frozen=True, tag=True):
    rank: int
    incarnation: int


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The server stops: end your ranks and yourself."""

    reason: str


class ProcessReport(msgspec.Struct, frozen=True, tag=True):
    """Agent: what became of a process ("spawned", "exited", "stopped")."""

    kind: str
    rank: int
    incarnation: int
    pid: int
    status: str = ""


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Either side lives. From the agent: (rank, incarnation, state letter as in /proc) of each of its processes."""

    processes: tuple[tuple[int, int, str], ...] = ()


AgentMessage = Offer | ProcessReport | Beat
OrderMessage = Terms | Seated | Refused | StartProcess | KillProcess | Goodbye | Beat

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(
    Offer | ProcessReport | Beat | Terms | Seated | Refused | StartProcess | KillProcess | Goodbye
)


def encode(message: AgentMessage | OrderMessage) -> bytes:
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


class AgentBuffer:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages completed by `data`. Raises WireError."""
        self._data += data
        out = []
        while len(self._data) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data)
            if length > MAX_MESSAGE_BYTES:
                raise WireError(f"agent message of {length} bytes, at most {MAX_MESSAGE_BYTES} are allowed")
            if len(self._data) < _LENGTH.size + length:
                break
            try:
                out.append(_DECODER.decode(bytes(self._data[_LENGTH.size : _LENGTH.size + length])))
            except msgspec.MsgspecError as error:
                raise WireError(f"agent message: {error}") from None
            del self._data[: _LENGTH.size + length]
        return out
