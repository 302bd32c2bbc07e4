"""Addresses as text: `unix:/path` or `tcp:HOST:PORT`, the same form for control channels and for the mesh."""

from __future__ import annotations

import socket

from elastic_ep.core.errors import InvalidInputError

MAX_UNIX_PATH_BYTES = 107


def parse_address(text: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """(family, socket address). Raises InvalidInputError naming the text and the cure."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        num_bytes = len(rest.encode())
        if num_bytes > MAX_UNIX_PATH_BYTES:
            limit = f"the limit is {MAX_UNIX_PATH_BYTES}; set TMPDIR to a shorter one"
            raise InvalidInputError(f"unix socket path {rest!r} has {num_bytes} bytes, {limit}")
        return socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isdigit():
        return socket.AF_INET6 if ":" in host else socket.AF_INET, (host.strip("[]"), int(port))
    raise InvalidInputError(f"bad address {text!r}; give unix:/path or tcp:HOST:PORT")


def connect(text: str, timeout_s: float) -> socket.socket:
    """A blocking stream socket connected to `text`."""
    family, address = parse_address(text)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(address)
        sock.settimeout(None)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        sock.close()
        raise
    return sock
