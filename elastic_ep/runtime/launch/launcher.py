"""The controller's side of the zygote: start it, ask it for ranks, hear what becomes of them. Works inside an asyncio loop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from elastic_ep.runtime.launch.lives import Lives
from elastic_ep.runtime.launch.process import process_state
from elastic_ep.runtime.launch.zygote import MAX_PACKET_BYTES

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""a rank that was asked for so long ago and is not there: what is the zygote doing?"""
WAKES = 3
"""so often a zygote that is found stopped is woken"""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")


@dataclass(frozen=True)
class ProcessEvent:
    """What became of a rank's process: "spawned", "stopped", "ending" (it runs no more) or "exited" (it is gone)."""

    kind: str
    rank: int
    incarnation: int
    pid: int
    status: str = ""


class Launcher:
    """One zygote. `start()` returns at once; spawns asked for before it is ready wait in its socket. Ranks inherit `pass_fds`."""

    def __init__(
        self,
        preload: str,
        preload_argument: str,
        on_event: Callable[[ProcessEvent], None],
        on_lost: Callable[[], None],
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._pass_fds = tuple(pass_fds)
        self._preload = preload
        self._argument = preload_argument
        self._on_event = on_event
        self._on_lost = on_lost
        self._lives: Lives
        self._cells: dict[tuple[int, int], int] = {}
        self._times_stopped = 0
        self._outbox: deque[bytes] = deque()
        self._sock: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def is_running(self) -> bool:
        """Whether it can still be asked for processes."""
        return self._sock is not None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._lives = Lives()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        # -P: nothing that lies in the working folder is imported
        command = [sys.executable, "-P", "-m", "elastic_ep.runtime.launch.zygote", "--fd", str(theirs.fileno())]
        command += ["--lives-fd", str(self._lives.fd), "--preload", self._preload, "--preload-argument", self._argument]
        env = os.environ | ONE_THREAD
        self._process = subprocess.Popen(
            command, pass_fds=(theirs.fileno(), self._lives.fd, *self._pass_fds), env=env, start_new_session=True, stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._sock, self._loop = ours, loop
        loop.add_reader(ours.fileno(), self._readable)

    def spawn(self, rank: int, incarnation: int, target: str, config: dict[str, Any]) -> None:
        """Ask for a rank process running `target(config)` (`module:function`). A "spawned" event tells its pid."""
        assert self._sock is not None, "start() first"
        cell = self._cells[rank, incarnation] = self._lives.new_cell()
        order = {"rank": rank, "incarnation": incarnation, "cell": cell, "target": target, "config": config}
        self._outbox.append(json.dumps(order).encode())
        self._write()
        assert self._loop is not None
        self._loop.call_later(LOOK_S, self._look, rank, incarnation)

    def _look(self, rank: int, incarnation: int) -> None:
        """Until it has answered. A zygote that a signal holds up would start neither this process nor any that is asked for later."""
        if (rank, incarnation) not in self._cells or self._sock is None or self._process is None or self._loop is None:
            return
        if process_state(self._process.pid).letter == "T":
            pid, self._times_stopped = self._process.pid, self._times_stopped + 1
            if self._times_stopped > WAKES:
                log.error("the launcher, process %d, is stopped again and again; it is ended, another starts with the next rank", pid)
                self._process.kill()
                return
            log.error("the launcher, process %d, is stopped by a signal; it is woken", pid)
            self._process.send_signal(signal.SIGCONT)
        self._loop.call_later(LOOK_S, self._look, rank, incarnation)

    def _write(self) -> None:
        """Send what fits. A zygote that is still importing reads nothing, and its socket is small."""
        assert self._sock is not None
        assert self._loop is not None
        try:
            while self._outbox:
                self._sock.send(self._outbox[0])
                self._outbox.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._sock.fileno(), self._write)
            return
        except OSError:
            pass  # it is gone, and the reader will say so
        self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        assert self._sock is not None
        while True:
            try:
                packet = self._sock.recv(MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._forget()
                self._on_lost()
                return
            record = json.loads(packet)
            kind = record.pop("event")
            if kind == "ready":
                continue
            event = ProcessEvent(kind, **record)
            if kind == "exited" and (event.rank, event.incarnation) in self._cells:  # it never was there
                self._lives.give_back(self._cells.pop((event.rank, event.incarnation)))
            self._on_event(event)
            if kind == "spawned":
                self._watch(event)

    def _watch(self, spawned: ProcessEvent) -> None:
        assert self._loop is not None
        loop, ending = self._loop, replace(spawned, kind="ending")

        def on_end() -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._on_event, ending)

        try:
            self._lives.watch(self._cells.pop((spawned.rank, spawned.incarnation)), on_end)
        except RuntimeError as error:  # its channels and its pidfd tell, later
            log.warning("no thread watches the life of process %d: %s; raise the limit (ulimit -u)", spawned.pid, error)

    def _forget(self) -> None:
        if self._sock is not None and self._loop is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
            self._sock = None
            self._lives.close()

    def close(self) -> None:
        """End the zygote, whatever it is doing. Its ranks are not touched."""
        self._forget()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
