"""Addresses of ranks as text: `unix:/path`, `unix:@abstract`, `tcp:HOST:PORT`, each with an optional `#incarnation`.

The whole text names one incarnation of a rank: where it changes, a new process sits in the seat. Only the part before `#` is dialled.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import NamedTuple

from elastic_ep.core.errors import InvalidInputError

_UNIX_PATH_BYTES = 107
"""sockaddr_un holds 108 bytes, the last one a zero"""
_BACKLOG = 1024
_BUFFER_BYTES = 4 << 20
_WILDCARDS = ("", "0.0.0.0", "::")


class Endpoint(NamedTuple):
    """What `socket` needs to bind or dial an address."""

    family: socket.AddressFamily
    target: str | tuple[str, int]


def parse_address(address: str) -> Endpoint:
    """Raises InvalidInputError for text that is no address."""
    scheme, _, rest = address.partition("#")[0].partition(":")
    if scheme == "unix" and rest:
        size = len(os.fsencode(rest))
        if size > _UNIX_PATH_BYTES:
            raise InvalidInputError(
                f"unix socket path {rest!r} has {size} bytes, at most {_UNIX_PATH_BYTES} are allowed; use a shorter folder"
            )
        return Endpoint(socket.AF_UNIX, "\0" + rest[1:] if rest.startswith("@") else rest)
    host, _, port = rest.rpartition(":")
    host = host.strip("[]")
    if scheme == "tcp" and host not in _WILDCARDS and port.isdecimal() and int(port) < 65536:
        return Endpoint(socket.AF_INET6 if ":" in host else socket.AF_INET, (host, int(port)))
    raise InvalidInputError(
        f"{address!r} is no address that peers can dial; give unix:/path, unix:@name or tcp:HOST:PORT with this host's own name or address"
    )


def new_socket(endpoint: Endpoint) -> socket.socket:
    """A non-blocking stream socket that fits the endpoint, tuned for frames."""
    sock = socket.socket(endpoint.family, socket.SOCK_STREAM)
    sock.setblocking(False)
    tune(sock)
    return sock


def tune(sock: socket.socket) -> None:
    """Room for a large frame in the kernel (it caps the size itself); no waiting for more bytes on TCP."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def listen(address: str) -> tuple[socket.socket, str]:
    """A listening socket, and the address that peers dial (port 0 becomes the port that the system gave).

    A socket file that a dead process left behind is replaced. Raises InvalidInputError when the address cannot be had.
    """
    endpoint = parse_address(address)
    sock = new_socket(endpoint)
    try:
        if isinstance(endpoint.target, str):
            _remove_dead_socket_file(endpoint)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(endpoint.target)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise InvalidInputError(f"cannot listen on {address!r}: {error.strerror or error}; choose another address") from error
    if isinstance(endpoint.target, tuple) and endpoint.target[1] == 0:
        place, mark, incarnation = address.partition("#")
        address = f"{place.rpartition(':')[0]}:{sock.getsockname()[1]}{mark}{incarnation}"
    return sock, address


def _remove_dead_socket_file(endpoint: Endpoint) -> None:
    path = endpoint.target
    assert isinstance(path, str)
    if path.startswith("\0") or not os.path.exists(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
        return
    with socket.socket(endpoint.family, socket.SOCK_STREAM) as probe:
        try:
            probe.setblocking(False)
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            pass


def exists(address: str) -> bool:
    """Whether what peers dial is there, if it is a file."""
    target = parse_address(address).target
    return not isinstance(target, str) or target.startswith("\0") or os.path.exists(target)


def unlink(address: str) -> None:
    """Remove the socket file of an address that was listened on, if it has one."""
    target = parse_address(address).target
    if isinstance(target, str) and not target.startswith("\0"):
        try:
            os.unlink(target)
        except OSError:
            pass
