"""Signs of life: a lock in shared memory that a process holds for as long as it runs.

The kernel gives up the locks of a process as the first thing of its end (futex(2), robust lists), before it frees the memory and closes the
channels. Of a process that uses a GPU those close 50 ms later and its pidfd is readable after 150 to 200, when the driver has taken its
context apart.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable

_CELL_BYTES = 64
_NUM_CELLS = 1 << 16
_PROCESS_SHARED, _ROBUST = 1, 1

_libc = ctypes.CDLL(None)


class Lives:
    """Cells, each for one process; a process that is forked later shares them through `fd`.

    Args:
        fd: of another `Lives`; None makes new memory.
    """

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("elastic-ep-lives")
            os.ftruncate(fd, _CELL_BYTES * _NUM_CELLS)
        self.fd = fd
        self._memory = mmap.mmap(fd, _CELL_BYTES * _NUM_CELLS)
        self._begin = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._taken: set[int] = set()

    def new_cell(self) -> int:
        """One that no process holds. It is taken until `watch` has told of its end."""
        cell = next(cell for cell in range(_NUM_CELLS) if cell not in self._taken)
        self._taken.add(cell)
        return cell

    def give_back(self, cell: int) -> None:
        """Nobody has come to hold it."""
        self._taken.discard(cell)

    def _address(self, cell: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._begin + cell * _CELL_BYTES)

    def hold(self, cell: int) -> None:
        """The calling thread, which must be the one that lives as long as its process, holds the cell from here on. Where the system has
        no such locks nothing happens, and `watch` never calls."""
        kind = ctypes.create_string_buffer(_CELL_BYTES)
        _libc.pthread_mutexattr_init(kind)
        _libc.pthread_mutexattr_setpshared(kind, _PROCESS_SHARED)
        if _libc.pthread_mutexattr_setrobust(kind, _ROBUST) == 0 and _libc.pthread_mutex_init(self._address(cell), kind) == 0:
            _libc.pthread_mutex_lock(self._address(cell))

    def watch(self, cell: int, on_end: Callable[[], None]) -> None:
        """Call `on_end` in a thread as soon as the process that holds the cell ends; at once if it has."""
        threading.Thread(target=self._wait, args=(cell, on_end), name=f"life {cell}", daemon=True).start()

    def _wait(self, cell: int, on_end: Callable[[], None]) -> None:
        held = _libc.pthread_mutex_lock(self._address(cell))
        _libc.pthread_mutex_unlock(self._address(cell))
        self._taken.discard(cell)
        if held == errno.EOWNERDEAD:
            on_end()

    def close(self) -> None:
        """No process can share it from here on; those that do are watched on."""
        os.close(self.fd)
