"""Experts from other ranks' slots, beside the traffic of the steps: its own connections, its own threads.

The channel begins with the mesh's handshake (`dispatch/handshake.py`). A request is (layer, expert), 8 bytes; the answer is a length,
8 bytes, and so many bytes, or length 0 if the peer does not hold the expert. What a peer sends while it overwrites the slot is found by
its digest, like every other wrong byte. A request of all ones asks where in the peer's memory its experts lie (`peer_memory.py`).
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.core.errors import CheckpointError
from elastic_ep.runtime.control.address import connect
from elastic_ep.runtime.dispatch.addresses import exists, listen
from elastic_ep.runtime.dispatch.handshake import HELLO_BYTES, WELCOME_BYTES, pack_hello, pack_welcome, parse_hello, parse_welcome
from elastic_ep.runtime.faults import FaultPlan
from elastic_ep.runtime.weights.digest import CHUNK_BYTES, Digest, Read

log = logging.getLogger(__name__)

_REQUEST = struct.Struct("<II")
_WHERE = 0xFFFFFFFF, 0xFFFFFFFF
_LENGTH = struct.Struct("<Q")
_MOST_ADDRESS_BYTES = 64 << 20
_PEER_CREDENTIALS = struct.Struct("iII")
_SEND_BUFFER_BYTES = 4 << 20
"""Of a local socket (the system may give less): the more fits, the less often two threads wait for each other and for a free core."""
_CONNECT_TIMEOUT_S = 2.0
_RETRY_S = 1.0
_IDLE_TIMEOUT_S = 1.0
"""without a byte for so long, a peer is stopped or cut off, and the next source is asked"""
_SLOWEST_BYTES_PER_S = 20e6
"""one that sends less than this is no better than the next source"""


class PeerServer:
    """Answers other ranks' requests for experts.

    Attributes:
        find: (layer, expert) -> a slot's bytes (uint8 [n]), None if no slot holds it; set once there are slots.
        addresses: see `Slots.addresses`; likewise.
    """

    def __init__(self, rank: int, address: str, token: str) -> None:
        self._rank = rank
        self._address = address
        self._token = token
        self._listener: socket.socket | None = None
        self.find: Callable[[int, int], torch.Tensor | None] = lambda layer, expert: None
        self.addresses: Callable[[], NDArray[np.uint64] | None] = lambda: None
        self.faults = FaultPlan()

    def listen(self) -> str:
        """Start listening, once, or again where somebody has removed the socket's file. Returns the address to announce. Its threads end
        with the process. Raises InvalidInputError."""
        before = self._listener
        if before is None or not exists(self._address):
            self._listener, self._address = listen(self._address)
            self._listener.setblocking(True)
            threading.Thread(target=self._accept, args=(self._listener,), name="weights", daemon=True).start()
            if before is not None:
                before.shutdown(socket.SHUT_RDWR)
        return self._address

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if self._listener is not listener:
                    listener.close()
                    return
                log.error("no peer can ask for weights just now: %s", error)
                time.sleep(_RETRY_S)
                continue
            threading.Thread(target=self._serve, args=(sock,), name="weights-peer", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(_CONNECT_TIMEOUT_S)
            raw = _receive(sock, bytearray(HELLO_BYTES))
            hello = parse_hello(bytes(raw), self._token)
            if hello is None or hello.target != self._rank:
                log.warning("a request for weights without the right token was refused")
                return
            sock.sendall(pack_welcome(bytes(raw), 0, self._token))
            sock.settimeout(None)
            if sock.family == socket.AF_UNIX:  # the system sizes those of TCP better itself
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            while True:
                layer, expert = _REQUEST.unpack(_receive(sock, bytearray(_REQUEST.size)))
                if (layer, expert) == _WHERE:
                    self.faults.reach("serve_addresses")
                    where = self.addresses()
                    told = b"" if where is None else where.tobytes()
                    sock.sendall(_LENGTH.pack(len(told)) + told)
                    continue
                self.faults.reach("serve_expert", layer=layer, expert=expert)
                found = self.find(layer, expert)
                data = memoryview(b"") if found is None else found.numpy().data
                sock.sendall(_LENGTH.pack(len(data)))
                self.faults.reach("serve_length", layer=layer, expert=expert)
                _send(sock, data)
                self.faults.reach("serve_end", layer=layer, expert=expert)
        except OSError:
            pass  # the peer is done, or gone
        finally:
            sock.close()


class PeerSource:
    """The `ExpertSource` of one other rank. Not thread-safe."""

    kind = "peer"

    def __init__(self, rank: int, address: str, peer: int, peer_address: str, token: str) -> None:
        self._hello = pack_hello(rank, address, peer, peer_address, 0, token)
        self._peer = peer
        self._address = peer_address
        self._token = token
        self._sock: socket.socket | None = None

    def read(self, layer: int, expert: int, slot: torch.Tensor) -> Read:
        """See `ExpertSource.read`. Raises CheckpointError when the peer is gone, silent for a second, or does not have it."""
        view = slot.numpy().data
        try:
            sock = self._connected()
            sock.sendall(_REQUEST.pack(layer, expert))
            (length,) = _LENGTH.unpack(_receive(sock, bytearray(_LENGTH.size)))
            if length == len(view):
                digest = Digest()
                _receive(sock, view, time.monotonic() + _IDLE_TIMEOUT_S + length / _SLOWEST_BYTES_PER_S, digest)
                return Read(len(view), digest.intdigest())
        except OSError as error:
            raise self._failed(error) from None
        self.close()
        raise CheckpointError(f"rank {self._peer} sent {length} bytes for expert {expert} of MoE layer {layer}, not {len(view)}")

    def addresses(self) -> tuple[int, bytes]:
        """Over a Unix socket: the peer's process and its `Slots.addresses`, no bytes if there are none. Raises CheckpointError."""
        try:
            sock = self._connected()
            sock.sendall(_REQUEST.pack(*_WHERE))
            (length,) = _LENGTH.unpack(_receive(sock, bytearray(_LENGTH.size)))
            if length > _MOST_ADDRESS_BYTES:
                raise ConnectionError(f"{length} bytes of addresses")
            raw = bytes(_receive(sock, bytearray(length), time.monotonic() + _IDLE_TIMEOUT_S))
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
            return _PEER_CREDENTIALS.unpack(credentials)[0], raw
        except OSError as error:
            raise self._failed(error) from None

    def known_digest(self, layer: int, expert: int) -> int | None:
        return None

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _failed(self, error: OSError) -> CheckpointError:
        self.close()
        return CheckpointError(f"rank {self._peer} at {self._address}: {error or type(error).__name__}")

    def _connected(self) -> socket.socket:
        if self._sock is None:
            sock = connect(self._address, _CONNECT_TIMEOUT_S)
            self._sock = sock
            sock.settimeout(_IDLE_TIMEOUT_S)
            sock.sendall(self._hello)
            welcome = bytes(_receive(sock, bytearray(WELCOME_BYTES)))
            if parse_welcome(welcome, self._hello, self._token) is None:
                raise ConnectionRefusedError("it does not know the token")
        return self._sock


def _send(sock: socket.socket, data: memoryview) -> None:
    """In one call: a thread that asks for the interpreter after each chunk waits for the steps' thread each time."""
    sock.sendall(data)


def _receive(
    sock: socket.socket, into: bytearray | memoryview, deadline: float = float("inf"), digest: Digest | None = None
) -> bytearray | memoryview:
    """Fill `into`, and the digest with it. Raises OSError at the end of the stream, when nothing comes within the socket's timeout, or
    after the deadline."""
    view, done, digested = memoryview(into), 0, 0
    while done < len(view):
        if time.monotonic() > deadline:
            raise TimeoutError(f"too slow: {done} of {len(view)} bytes came in time")
        got = sock.recv_into(view[done:])
        if not got:
            raise ConnectionResetError("it closed the connection")
        done += got
        if digest is not None and (done - digested >= CHUNK_BYTES or done == len(view)):
            digest.update(view[digested:done])
            digested = done
    return into
