"""A file's memory in huge pages: a process that maps it anew, reads it or registers it with a device's driver does so for each page."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from functools import cache

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

HUGE_PAGE = 2 << 20
_COLLAPSE = 25
"""MADV_COLLAPSE, since Linux 6.1. For a file of memory it needs no setting of the system's but that these pages are not denied."""
_MAP_FIXED = 0x10


class SharedPages:
    """A file of memory, mapped where its huge pages can be this process's. The file's length is `file_bytes` of what is wanted.

    Attributes:
        memory: uint8 [num_bytes].
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        mapped = mmap.mmap(fd, file_bytes(num_bytes))  # owns the addresses; what lies there begins at a huge page once it is replaced
        whole = np.frombuffer(mapped, dtype=np.uint8)
        skip = -whole.ctypes.data % HUGE_PAGE
        self.memory: NDArray[np.uint8] = whole[skip : skip + num_bytes]
        self._begin = self.memory.ctypes.data
        both = mmap.PROT_READ | mmap.PROT_WRITE
        length = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
        if _libc().mmap(self._begin, length, both, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) != self._begin:
            raise OSError(ctypes.get_errno(), f"mapping {length} bytes: {os.strerror(ctypes.get_errno())}")
        self._is_asked = np.zeros(length // HUGE_PAGE, dtype=bool)

    def make_huge(self, begin: int, end: int) -> None:
        """Have the pages that [begin, end) lies in be huge ones, whatever they hold and whoever writes there; best before they hold
        anything. As far as the system does; no page that a driver has registered."""
        pages = slice(begin // HUGE_PAGE, -(-end // HUGE_PAGE))
        if self._is_asked[pages].all():
            return
        first, last = pages.start * HUGE_PAGE, pages.stop * HUGE_PAGE
        whole = np.ctypeslib.as_array((ctypes.c_uint8 * (last - first)).from_address(self._begin + first))
        whole[::HUGE_PAGE].max()  # the system passes over those that are empty
        if _libc().madvise(self._begin + first, last - first, _COLLAPSE):
            log.debug("not all of %d bytes lie in huge pages: %s", last - first, os.strerror(ctypes.get_errno()))
        self._is_asked[pages] = True


def file_bytes(num_bytes: int) -> int:
    """Of a file that is to be mapped as `SharedPages`: the last page whole, and what may be skipped to begin with a whole one."""
    return num_bytes + 2 * HUGE_PAGE


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc
