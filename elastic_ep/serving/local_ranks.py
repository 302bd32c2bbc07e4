"""The rank processes of this host: the folder of their sockets, the launcher that forks them, and what becomes of each."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

from elastic_ep.brain.events import FailureCause
from elastic_ep.runtime.launch.launcher import Launcher, ProcessEvent
from elastic_ep.runtime.launch.process import LocalProcess, ProcessState
from elastic_ep.serving.run_dir import lock_run_dir, make_run_dir

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 5.0


class LocalHooks(NamedTuple):
    """What the controller does for the ranks of its host.

    Attributes:
        fail: (rank, incarnation, cause, detail) a rank's process failed.
        ended: (rank, incarnation, how) it runs no more; "" for how: the launcher is about to say.
        exited: (rank, incarnation, how) the same, of a process that is gone.
        spawned: a process is known to exist.
    """

    fail: Callable[[int, int, FailureCause, str], None]
    ended: Callable[[int, int, str], None]
    exited: Callable[[int, int, str], None]
    spawned: Callable[[], None]


class LocalRanks:
    """One for a server. `open()` and `close()` pair.

    Attributes:
        run_dir: the folder of the ranks' sockets; control: the address that they dial. From `open` on.
    """

    preload, target = "elastic_ep.models.worker:preload", "elastic_ep.models.worker:rank_main"

    def __init__(self, checkpoint: str, make_link: Callable[[], asyncio.Protocol], hooks: LocalHooks) -> None:
        self._checkpoint = checkpoint
        self._make_link = make_link
        self._hooks = hooks
        self._processes: dict[tuple[int, int], LocalProcess] = {}
        self._unreported: set[tuple[int, int]] = set()
        """processes asked for, of which the launcher has said nothing yet"""
        self._pass_fds: tuple[int, ...] = ()
        self._launcher: Launcher | None = None
        self._listening: asyncio.Task[None] | None = None
        self._closed = False

    # ---- life

    async def open(self) -> None:
        """Make the folder and listen there. Raises InvalidInputError, OSError."""
        self._loop = asyncio.get_running_loop()
        self.run_dir, self._lock = make_run_dir()
        self.control = f"unix:{self._control_path}"
        try:
            await self._listen()
        except BaseException:
            self.remove_folder()
            raise

    @property
    def _control_path(self) -> str:
        return str(self.run_dir / "control.sock")

    async def _listen(self) -> None:
        self._server = await self._loop.create_unix_server(self._make_link, self._control_path, backlog=1024)

    async def _listen_again(self) -> None:
        """Somebody has emptied the folder for temporary files."""
        log.error("%s was removed under the server; it is made anew: keep what cleans it away from elastic-ep-*", self.run_dir)
        old_server, old_lock = self._server, self._lock
        try:
            self._lock = lock_run_dir(self.run_dir)
            os.close(old_lock)
            await self._listen()
        except OSError as error:
            log.error("cannot make %s anew: %s; no rank can start until it is there", self.run_dir, error)
            return
        old_server.close()

    def start_launcher(self, pass_fds: Sequence[int] = ()) -> None:
        """Ranks inherit `pass_fds`."""
        self._pass_fds = tuple(pass_fds)
        self._launcher = Launcher(self.preload, self._checkpoint, self._on_event, self._on_launcher_lost, self._pass_fds)
        self._launcher.start(self._loop)

    def stop_listening(self) -> None:
        self._server.close()

    async def close(self, executor: Executor) -> None:
        """Wait for the processes to end, kill those that do not in time, and remove the folder. Their channels are closed already."""
        self._closed = True
        pending = [p for p in self._processes.values() if not p.has_exited]
        deadline = self._loop.time() + SHUTDOWN_TIMEOUT_S
        while any(not p.has_exited for p in pending) and self._loop.time() < deadline:
            await asyncio.sleep(0.01)
        for process in pending:
            process.kill()
        for process in self._processes.values():
            process.close()
        if self._launcher is not None:
            await self._loop.run_in_executor(executor, self._launcher.close)
        self.remove_folder()

    def remove_folder(self) -> None:
        shutil.rmtree(self.run_dir, ignore_errors=True)
        os.close(self._lock)

    # ---- orders

    def start(self, rank: int, incarnation: int, program: dict[str, Any]) -> None:
        """Have a process forked; with a new launcher, and in a new folder, if these are gone."""
        if self._launcher is None or not self._launcher.is_running:
            if self._launcher is not None:
                self._launcher.close()
            self.start_launcher(self._pass_fds)
        if not Path(self._control_path).exists() and (self._listening is None or self._listening.done()):
            self._listening = self._loop.create_task(self._listen_again())
        self._unreported.add((rank, incarnation))
        assert self._launcher is not None
        self._launcher.spawn(rank, incarnation, self.target, program)

    def kill(self, rank: int, incarnation: int) -> None:
        """If it is known to exist."""
        process = self._processes.get((rank, incarnation))
        if process is not None:
            process.kill()

    def state(self, rank: int, incarnation: int) -> ProcessState | None:
        """None if it is not known to exist."""
        process = self._processes.get((rank, incarnation))
        return process.state() if process is not None else None

    def pids(self) -> dict[tuple[int, int], int]:
        """Of all processes known, those that have ended among them until their seat has another."""
        return {key: process.pid for key, process in self._processes.items()}

    def has_exited(self, rank: int, incarnation: int) -> bool:
        """False also of one that is not known to exist."""
        process = self._processes.get((rank, incarnation))
        return process is not None and process.has_exited

    # ---- news

    def _on_event(self, event: ProcessEvent) -> None:
        key = (event.rank, event.incarnation)
        self._unreported.discard(key)
        if event.kind == "spawned":
            for old in [k for k, p in self._processes.items() if k[0] == event.rank and p.has_exited]:
                self._processes.pop(old).close()
            process = LocalProcess(event.pid, self._loop, lambda: self._on_exit(*key))
            self._processes[key] = process
            process.watch()
            self._hooks.spawned()
        elif event.kind == "stopped":
            self._hooks.fail(*key, FailureCause.STOPPED, event.status)
        elif event.kind == "ending":
            state = self.state(*key)
            if state is not None and state.is_ending:
                self._hooks.ended(*key, state.exit)
        elif event.kind == "exited":
            self._hooks.fail(*key, FailureCause.EXITED, event.status)

    def _on_exit(self, rank: int, incarnation: int) -> None:
        self._hooks.exited(rank, incarnation, self._processes[rank, incarnation].state().exit)

    def _on_launcher_lost(self) -> None:
        if self._closed:
            return
        for key in sorted(self._unreported):
            self._loop.call_soon(self._hooks.fail, *key, FailureCause.EXITED, "the launcher ended before it could start it")
        self._unreported.clear()
        log.error("the launcher process ended; ranks go on, their stops are noticed by silence; the next restart starts another")
