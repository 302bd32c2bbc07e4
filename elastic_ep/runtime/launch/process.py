"""One process on this host, held by pidfd: its end is an event, killing it can't hit another, and its state can be looked up."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable


class LocalProcess:
    """A process that this host can see. `on_exit` is called once, in the loop, when it has ended."""

    def __init__(self, pid: int, loop: asyncio.AbstractEventLoop, on_exit: Callable[[], None]) -> None:
        self.pid = pid
        self.has_exited = False
        self._loop = loop
        self._on_exit = on_exit
        self._fd = -1

    def watch(self) -> None:
        try:
            self._fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self._loop.call_soon(self._exited)
            return
        self._loop.add_reader(self._fd, self._exited)

    def _exited(self) -> None:
        if self.has_exited:
            return
        self.has_exited = True
        self.close()
        self._on_exit()

    def kill(self) -> None:
        """SIGKILL, unless it has ended already."""
        if self._fd >= 0:
            try:
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def state(self) -> str:
        """The kernel's letter for it ("R" running, "S" sleeping, "T" stopped, "Z" ended, …; proc(5)), "" when it is gone."""
        try:
            with open(f"/proc/{self.pid}/stat", encoding="ascii", errors="replace") as file:
                return file.read().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return ""
