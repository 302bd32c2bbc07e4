"""One process on this host, held by pidfd: its end is an event, killing it can't hit another, and its state can be looked up."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from typing import NamedTuple

log = logging.getLogger(__name__)

RETRY_S = 0.5
_FLAGS, _EXIT_CODE = 6, 49
"""places in /proc/PID/stat after the command's name"""
_PF_EXITING = 0x4


class ProcessState(NamedTuple):
    """Attributes:
    letter: "R" running, "S" sleeping, "D" in the kernel, "T" stopped, "Z" ended; "" when it is gone, "?" if unknown.
    is_ending: it runs no more of its program, though the kernel may still be freeing its memory.
    exit: how it ends, in words, if it does and the kernel tells.
    """

    letter: str
    is_ending: bool
    exit: str


class LocalProcess:
    """A process that this host can see. `on_exit` is called once, in the loop, when it has ended."""

    def __init__(self, pid: int, loop: asyncio.AbstractEventLoop, on_exit: Callable[[], None]) -> None:
        self.pid = pid
        self.has_exited = False
        self._is_doomed = False
        self._retry: asyncio.TimerHandle | None = None
        self._loop = loop
        self._on_exit = on_exit
        self._fd = -1

    def watch(self) -> None:
        """From now on. Where no descriptor is left it is tried again."""
        if self._fd >= 0 or self.has_exited:
            return
        try:
            self._fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self._loop.call_soon(self._exited)
        except OSError as error:
            log.error("cannot watch process %d: %s; raise the limit of open files (ulimit -n)", self.pid, error.strerror)
            self._retry = self._loop.call_later(RETRY_S, self.watch)
        else:
            self._loop.add_reader(self._fd, self._exited)
            if self._is_doomed:
                self.kill()

    def _exited(self) -> None:
        if self.has_exited:
            return
        self.has_exited = True
        self.close()
        self._on_exit()

    def kill(self) -> None:
        """SIGKILL, unless it has ended already; where it cannot be reached yet, as soon as it can."""
        self._is_doomed = True
        if self._fd < 0:
            self.watch()
            return
        try:
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def state(self) -> ProcessState:
        """What the kernel says of it now."""
        return process_state(self.pid)


def process_state(pid: int) -> ProcessState:
    """See proc(5). A process that is gone has ended; of one that cannot be looked at nothing is known (letter "?")."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ProcessState("", True, "")
    except OSError:
        return ProcessState("?", False, "")
    ending = bool(int(fields[_FLAGS]) & _PF_EXITING) or fields[0] in "ZX"
    return ProcessState(fields[0], ending, describe_exit(int(fields[_EXIT_CODE])) if ending else "")


def describe_exit(wait_status: int) -> str:
    """A wait status in words: "signal SIGKILL", "status 4"."""
    number = wait_status & 0x7F
    return f"signal {signal_name(number)}" if number else f"status {wait_status >> 8}"


def signal_name(number: int) -> str:
    """Its name, or its number where it has none (real-time signals)."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
