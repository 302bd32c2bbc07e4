"""Addresses as text, listening on them, and what a user is told when it can't be done."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.dispatch.addresses import listen, parse_address, unlink


@pytest.mark.parametrize(
    ("address", "family", "target"),
    [
        ("unix:/run/r0", socket.AF_UNIX, "/run/r0"),
        ("unix:/run/r0#7", socket.AF_UNIX, "/run/r0"),
        ("unix:@name", socket.AF_UNIX, "\0name"),
        ("tcp:10.0.0.1:80", socket.AF_INET, ("10.0.0.1", 80)),
        ("tcp:node-3:9000#a", socket.AF_INET, ("node-3", 9000)),
        ("tcp:[fd00::1]:80", socket.AF_INET6, ("fd00::1", 80)),
    ],
)
def test_parsed(address: str, family: int, target: object) -> None:
    assert parse_address(address) == (family, target)


@pytest.mark.parametrize(
    "address", ["", "unix:", "tcp:host", "tcp:0.0.0.0:80", "tcp::80", "tcp:h:99999", "tcp:h:-1", "udp:h:1", "tcp:[::]:80"]
)
def test_refused(address: str) -> None:
    with pytest.raises(InvalidInputError, match="no address that peers can dial"):
        parse_address(address)


def test_a_path_that_is_too_long_says_so(folder: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"has 10\d\d bytes, at most 107"):
        listen(f"unix:{folder}/{'x' * 1000}")


def test_port_zero_becomes_the_real_port() -> None:
    sock, address = listen("tcp:127.0.0.1:0#3")
    with sock:
        assert address == f"tcp:127.0.0.1:{sock.getsockname()[1]}#3"
        with pytest.raises(InvalidInputError, match=r"cannot listen on .* choose another address"):
            listen(address)


def test_a_dead_ones_socket_file_is_replaced_a_live_ones_is_not(folder: Path) -> None:
    address = f"unix:{folder}/r"
    sock, _ = listen(address)
    with pytest.raises(InvalidInputError, match="cannot listen on"):
        listen(address)
    sock.close()
    second, _ = listen(address)
    second.close()
    unlink(address)
    assert not (folder / "r").exists()
    unlink(address)
    (folder / "r").write_text("not a socket")
    with pytest.raises(InvalidInputError, match="cannot listen on"):
        listen(address)
