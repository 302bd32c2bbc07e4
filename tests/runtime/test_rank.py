"""The rank's end of the control channel, and whose fault an error is."""

from __future__ import annotations

import errno
import socket

import pytest

from elastic_ep.brain.messages import Heartbeat
from elastic_ep.runtime.rank import ControlChannel, is_no_memory


def test_whatever_the_network_says_it_is_the_channels():
    ours, theirs = socket.socketpair()
    channel = ControlChannel(ours)
    ours.close()
    with theirs:
        for use in (lambda: channel.send(Heartbeat(0)), channel.receive):
            with pytest.raises(ConnectionError, match="Bad file descriptor"):
                use()


@pytest.mark.parametrize(
    ("error", "expected"),
    [(MemoryError(), True), (OSError(errno.ENOMEM, "x"), True), (OSError(errno.EMFILE, "x"), False), (ValueError(), False)],
)
def test_no_memory_is_told_from_other_errors(error, expected):
    assert is_no_memory(error) is expected
