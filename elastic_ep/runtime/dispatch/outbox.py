"""Rows of ranks on one host change hands in shared memory: each rank writes its own outbox, its peers read it, frames say which rows.

An outbox has one region per phase. Lock-step makes a region free for writing whenever its owner gets to write it again: the owner has
a later frame from every peer, sent after that peer was done reading. A peer of an aborted step may read rows of a newer one;
what it makes of them is void, like its step. The memory is sparse (pages exist once written), sealed against resizing, and lives as long as
anyone maps it, so a dead owner's rows stay readable.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
NUM_REGIONS = 2
"""one for each `Phase`"""


class OutboxError(OSError):
    """This host can't share memory so, or a peer's outbox is not what it says."""


def reserve(region_bytes: int) -> mmap.mmap:
    """Room in this process for a peer's outbox of that size, until it is closed. Raises OutboxError."""
    try:
        return mmap.mmap(-1, NUM_REGIONS * region_bytes, mmap.MAP_PRIVATE, 0)
    except (OSError, ValueError, OverflowError) as error:
        raise OutboxError(f"no room for {NUM_REGIONS} x {region_bytes} bytes: {error}") from error


class _Regions:
    """A mapping cut into regions."""

    def __init__(self, fd: int, region_bytes: int, protection: int):
        try:
            self._mapping = mmap.mmap(fd, NUM_REGIONS * region_bytes, mmap.MAP_SHARED, protection)
        except (OSError, ValueError, OverflowError) as error:
            raise OutboxError(f"cannot map {NUM_REGIONS} x {region_bytes} bytes: {error}") from error
        whole = np.frombuffer(self._mapping, dtype=np.uint8)
        self._regions = [whole[i * region_bytes : (i + 1) * region_bytes] for i in range(NUM_REGIONS)]
        self._typed: dict[tuple[int, Any], NDArray[Any]] = {}
        self.region_bytes = region_bytes
        self.base = int(whole.ctypes.data)
        """address of the first region; valid as long as this object lives"""

    def rows(self, region: int, num_rows: int, hidden: int, dtype: Any) -> NDArray[Any]:
        """[num_rows, hidden] at the beginning of a region. Raises OutboxError if it does not fit."""
        typed = self._typed.get((region, dtype))
        if typed is None:
            typed = self._typed[region, dtype] = self._regions[region].view(dtype)
        size = num_rows * hidden
        if size > len(typed):
            raise OutboxError(f"{num_rows} rows of {hidden} do not fit {self.region_bytes} bytes")
        return typed[:size].reshape(num_rows, hidden)


class Outbox(_Regions):
    """This rank's own. `fd` is what peers map. Raises OutboxError where the system has no sealed memory files."""

    def __init__(self, region_bytes: int):
        region_bytes = -(-region_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self.fd = os.memfd_create("elastic-ep-outbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise OutboxError(str(error)) from error
        try:
            os.ftruncate(self.fd, NUM_REGIONS * region_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            super().__init__(self.fd, region_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            os.close(self.fd)
            raise OutboxError(str(error)) from error

    def write(self, region: int, rows: NDArray[Any]) -> bool:
        """Put `rows` [N, H] at the beginning of a region; False if they do not fit."""
        if rows.nbytes > self.region_bytes:
            return False
        num_rows, hidden = rows.shape
        np.copyto(self.rows(region, num_rows, hidden, rows.dtype.type), rows)
        return True

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Inbox(_Regions):
    """A peer's outbox, read-only. Raises OutboxError unless `fd` is a memory file of that size that its owner cannot shrink under us."""

    def __init__(self, fd: int, region_bytes: int):
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            size = os.fstat(fd).st_size
        except OSError as error:
            raise OutboxError(str(error)) from error
        if not sealed or region_bytes <= 0 or size < NUM_REGIONS * region_bytes:
            raise OutboxError(f"a memory file of {size} bytes, sealed: {bool(sealed)}; expected {NUM_REGIONS} x {region_bytes}, sealed")
        super().__init__(fd, region_bytes, mmap.PROT_READ)
