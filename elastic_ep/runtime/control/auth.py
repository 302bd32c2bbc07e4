"""Two processes make sure of each other over TCP before a message flows: both prove that they know the token, neither sends it.

The listener speaks first (magic, nonce); the caller answers with its role, a nonce and a proof over both nonces; the listener's proof comes
last. A proof is good for one connection. What follows is neither encrypted nor signed: between hosts that do not trust their network it
belongs into a tunnel.
"""

from __future__ import annotations

import enum
import hmac
import os
import socket

from elastic_ep.core.errors import ElasticEPError

_MAGIC = b"EEPCTL01"
_NONCE_BYTES = 32
_MAC_BYTES = 32
_ACCEPTED, _DENIED = b"\x01", b"\x00"
CHALLENGE_BYTES = len(_MAGIC) + _NONCE_BYTES
ANSWER_BYTES = 1 + _NONCE_BYTES + _MAC_BYTES
VERDICT_BYTES = 1 + _MAC_BYTES


class AuthError(ElasticEPError):
    """The other side does not know the token, or is no part of this system. The message says which."""


class Role(enum.Enum):
    """Who calls. An agent proves the operator's token, a rank the one derived from it for this run."""

    AGENT = b"A"
    RANK = b"R"


def derive_token(token: str, run_id: str) -> str:
    """The token of one run's ranks: both sides can compute it, nobody has to send it."""
    return hmac.digest(token.encode(), b"run " + run_id.encode(), "sha256").hex()


def _proof(token: str, side: bytes, role: bytes, nonce_a: bytes, nonce_b: bytes) -> bytes:
    return hmac.digest(token.encode(), side + role + nonce_a + nonce_b, "sha256")


def make_challenge() -> bytes:
    """The listener's first bytes."""
    return _MAGIC + os.urandom(_NONCE_BYTES)


def judge_answer(challenge: bytes, answer: bytes, tokens: dict[Role, str]) -> tuple[Role | None, bytes]:
    """(who called, or None if it must not be let in; the verdict to send, in either case)."""
    mark, nonce, proof = answer[:1], answer[1 : 1 + _NONCE_BYTES], answer[1 + _NONCE_BYTES :]
    role = next((role for role in tokens if role.value == mark), None)
    ours = challenge[len(_MAGIC) :]
    if role is None or not hmac.compare_digest(proof, _proof(tokens[role], b"caller ", mark, ours, nonce)):
        return None, _DENIED + bytes(_MAC_BYTES)
    return role, _ACCEPTED + _proof(tokens[role], b"listener ", mark, nonce, ours)


def prove(sock: socket.socket, token: str, role: Role) -> None:
    """The caller's side, on a blocking socket with a timeout. Raises AuthError, OSError."""
    challenge = _receive(sock, CHALLENGE_BYTES)
    if not challenge.startswith(_MAGIC):
        raise AuthError("what listens there is no elastic-ep controller of this version; check the address")
    nonce = os.urandom(_NONCE_BYTES)
    ours = challenge[len(_MAGIC) :]
    sock.sendall(role.value + nonce + _proof(token, b"caller ", role.value, ours, nonce))
    verdict = _receive(sock, VERDICT_BYTES)
    if verdict[:1] != _ACCEPTED:
        raise AuthError("the controller refused this token; give both sides the same one")
    if not hmac.compare_digest(verdict[1:], _proof(token, b"listener ", role.value, nonce, ours)):
        raise AuthError("what listens there does not know the token; give both sides the same one, or check the address")


def _receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        got = sock.recv(count - len(data))
        if not got:
            raise ConnectionResetError("closed during the handshake")
        data += got
    return data
