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
        ep_size: ranks of the group when this one was started.
        host_backup_fd: an inherited file descriptor of the host's backup, -1 for none.
        fill_bytes_per_s, scrub_bytes_per_s: see `Upkeep`.
        reads_peer_memory: copy experts of ranks on this host out of their memory, and let them do so.
        guardian_pid: process with which this one ends (the agent of a host without the controller); None for none.
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
    ep_size: int = 1
    host_backup_fd: int = -1
    fill_bytes_per_s: float = 500e6
    scrub_bytes_per_s: float = 32e6
    reads_peer_memory: bool = True
    guardian_pid: int | None = None
