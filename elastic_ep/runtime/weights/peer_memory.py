"""Experts copied straight out of another rank's memory, where that rank is on this host and the system lets us read it: one copy, and
nothing to do for the other rank's threads, which are in steps.

Where its experts lie is asked once for each order. What has moved since, and whatever else is read by mistake, is found by its digest.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.runtime.weights.digest import Read, can_read_memory, read_memory
from elastic_ep.runtime.weights.peer import PeerSource

log = logging.getLogger(__name__)

_PR_SET_PTRACER = 0x59616D61
_INIT_PID = 1


def allow_reading() -> None:
    """Let the other ranks that our parent has started read this process' memory, where the system wants them named (Yama, scope 1)."""
    parent = os.getppid()
    if parent != _INIT_PID:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, parent, 0, 0, 0)  # without Yama there is nothing to allow


class MemoryAccess:
    """Whether this process reads its neighbours' memory. Shared by all that read in it.

    Args:
        slot_bytes: of one expert.
    """

    def __init__(self, slot_bytes: int) -> None:
        self.is_possible = can_read_memory(slot_bytes)

    def refused(self, pid: int, error: OSError) -> None:
        """The system does not let us: do not try again."""
        if self.is_possible:
            self.is_possible = False
            log.warning("memory of process %d: %s; experts of ranks on this host are sent over sockets, which takes longer", pid, error)


class PeerMemory:
    """The `ExpertSource` of a rank on this host: its memory, or `channel` for what cannot be read there. Not thread-safe.

    Args:
        shape: (L, E, bytes of a slot).
    """

    kind = "peer"

    def __init__(self, channel: PeerSource, shape: tuple[int, int, int], access: MemoryAccess) -> None:
        self._channel = channel
        self._shape = shape
        self._access = access
        self._pid = 0
        self._addresses: NDArray[np.uint64] | None = None
        self._is_told = True

    def forget(self) -> None:
        """Ask anew where experts lie before the next read."""
        self._addresses = None

    def read(self, layer: int, expert: int, slot: torch.Tensor) -> Read:
        """See `ExpertSource.read`. Raises CheckpointError as `PeerSource.read`. The digest is to be compared: the bytes may be another
        expert's."""
        address = self._address(layer, expert) if self._access.is_possible and self._is_told else 0
        if address:
            try:
                return Read(len(slot), read_memory(slot.numpy(), self._pid, address))
            except OSError as error:  # else it has moved, or the process is gone: then the channel says so
                if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
                    self._access.refused(self._pid, error)
        return self._channel.read(layer, expert, slot)

    def known_digest(self, layer: int, expert: int) -> int | None:
        return None

    def close(self) -> None:
        self._channel.close()

    def _address(self, layer: int, expert: int) -> int:
        """0: ask for the bytes."""
        if self._addresses is None:
            self._pid, raw = self._channel.addresses()
            layers, experts, _ = self._shape
            if len(raw) != 8 * layers * experts:
                self._is_told = False  # its experts are not in its memory, but on a device
                return 0
            self._addresses = np.frombuffer(raw, np.uint64).reshape(layers, experts)
        return int(self._addresses[layer, expert])
