"""What a rank process is told at its start. Apart from the process itself, so that whoever starts one needs no tensor library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankConfig:
    """Where a rank finds its controller and how it introduces itself. Times in seconds.

    Attributes:
        controller: address of the controller's control listener.
        listen: address where peers dial this process; unique to the incarnation.
        first_slot: physical id of its first slot.
        exchange_timeout_s: how long dispatch and combine wait for a peer.
    """

    rank: int
    incarnation: int
    controller: str
    listen: str
    token: str
    first_slot: int
    exchange_timeout_s: float
    heartbeat_interval_s: float = 0.1
    connect_timeout_s: float = 10.0
