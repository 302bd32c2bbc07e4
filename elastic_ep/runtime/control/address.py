"""Addresses as text: `unix:/path` or `tcp:HOST:PORT` (also `tcp://HOST:PORT`), the same form for control channels and for the mesh.

A mesh address may end in `#incarnation`, which plays no part in dialling.
"""

from __future__ import annotations

import socket

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.control.auth import Role, prove

MAX_UNIX_PATH_BYTES = 107
USER_TIMEOUT_S = 5.0
"""A TCP channel whose bytes stay unacknowledged for so long is broken: the bound after which a rank that was cut off ends by itself."""


def parse_address(text: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """(family, socket address). Raises InvalidInputError naming the text and the cure."""
    kind, _, rest = text.partition("#")[0].partition(":")
    if kind == "unix" and rest:
        num_bytes = len(rest.encode())
        if num_bytes > MAX_UNIX_PATH_BYTES:
            limit = f"the limit is {MAX_UNIX_PATH_BYTES}; set TMPDIR to a shorter one"
            raise InvalidInputError(f"unix socket path {rest!r} has {num_bytes} bytes, {limit}")
        return socket.AF_UNIX, rest
    host, _, port = rest.removeprefix("//").rpartition(":")
    if kind == "tcp" and host and port.isdecimal() and int(port) < 65536:
        return socket.AF_INET6 if ":" in host else socket.AF_INET, (host.strip("[]"), int(port))
    raise InvalidInputError(f"bad address {text!r}; give unix:/path or tcp:HOST:PORT")


def tcp_address(host: str, port: int) -> str:
    """`tcp:HOST:PORT`, an IPv6 host in brackets."""
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


def tune(sock: socket.socket) -> None:
    """For a TCP control channel: small messages go at once, and a peer that cannot be reached is noticed, also in silence."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(USER_TIMEOUT_S * 1e3))


def connect(text: str, timeout_s: float) -> socket.socket:
    """A blocking stream socket connected to `text`."""
    family, address = parse_address(text)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(address)
        sock.settimeout(None)
        if family != socket.AF_UNIX:
            tune(sock)
    except OSError:
        sock.close()
        raise
    return sock


def dial(text: str, timeout_s: float, token: str, role: Role) -> socket.socket:
    """`connect` to a controller. Over TCP both sides have then proved that they know `token`; on a Unix socket the first message carries
    it. Raises OSError, AuthError."""
    sock = connect(text, timeout_s)
    if sock.family != socket.AF_UNIX:
        try:
            sock.settimeout(timeout_s)
            prove(sock, token, role)
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
    return sock
