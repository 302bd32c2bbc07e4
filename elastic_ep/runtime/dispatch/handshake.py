"""How two ranks make sure of each other before a frame flows: the dialler says hello, the listener answers welcome.

Both prove that they know the run's token without sending it; both incarnations are named, so a rank never talks to a process that took
over a seat or a port without its knowledge. On a host, each hands the other its outbox (a file descriptor beside the bytes).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from typing import NamedTuple

_MAGIC = b"ElastEP1"
_VERSION = 1
_HELLO = struct.Struct("<8sHxxiiq16s32s32s")
_WELCOME = struct.Struct("<q")
_MAC_BYTES = 32
HELLO_BYTES = _HELLO.size + _MAC_BYTES
WELCOME_BYTES = _WELCOME.size + _MAC_BYTES


class Hello(NamedTuple):
    """Who dials whom. Addresses travel as digests: what matters is that they are the ones the listener was told.

    `region_bytes` is the size of an outbox region whose file descriptor came along, 0 for none.
    """

    rank: int
    target: int
    region_bytes: int
    nonce: bytes
    address_digest: bytes
    target_digest: bytes


def address_digest(address: str) -> bytes:
    """32 bytes that stand for an address."""
    return hashlib.sha256(address.encode()).digest()


def _mac(token: str, role: bytes, message: bytes) -> bytes:
    return hmac.digest(token.encode(), role + message, "sha256")


def pack_hello(rank: int, address: str, target: int, target_address: str, region_bytes: int, token: str) -> bytes:
    """The dialler's first bytes."""
    digests = address_digest(address), address_digest(target_address)
    body = _HELLO.pack(_MAGIC, _VERSION, rank, target, region_bytes, os.urandom(16), *digests)
    return body + _mac(token, b"hello", body)


def parse_hello(raw: bytes, token: str) -> Hello | None:
    """The hello, or None for bytes that are none of this version and token."""
    body = raw[: _HELLO.size]
    magic, version, *fields = _HELLO.unpack(body)
    if magic != _MAGIC or version != _VERSION or not hmac.compare_digest(raw[_HELLO.size :], _mac(token, b"hello", body)):
        return None
    return Hello(*fields)


def pack_welcome(hello: bytes, region_bytes: int, token: str) -> bytes:
    """The listener's answer to the raw bytes of a hello. `region_bytes` above 0: it mapped the dialler's outbox and sends its own."""
    body = _WELCOME.pack(region_bytes)
    return body + _mac(token, b"welcome" + hello, body)


def parse_welcome(raw: bytes, hello: bytes, token: str) -> int | None:
    """The listener's `region_bytes`, or None if the answer is not to this hello by one who knows the token."""
    body = raw[: _WELCOME.size]
    if not hmac.compare_digest(raw[_WELCOME.size :], _mac(token, b"welcome" + hello, body)):
        return None
    region_bytes: int = _WELCOME.unpack(body)[0]
    return region_bytes
