"""The agent of a host that is not the controller's: it dials the controller, starts and kills ranks on its order, and reports what becomes
of them.

It decides nothing about the group. Ranks dial the controller themselves; the agent only holds their processes, and they end with it.
After a cut it dials again and tells which processes it still has; the controller says which of them were given up and must start over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import msgspec

from elastic_ep.core.errors import ElasticEPError
from elastic_ep.runtime.control.address import dial, tcp_address
from elastic_ep.runtime.control.agent_messages import (
    Beat,
    Goodbye,
    KillProcess,
    Offer,
    OrderMessage,
    ProcessReport,
    Refused,
    Seated,
    StartProcess,
    Terms,
)
from elastic_ep.runtime.control.agent_stream import AgentStream
from elastic_ep.runtime.control.auth import AuthError, Role, derive_token
from elastic_ep.runtime.faults import FaultFile, FaultPlan
from elastic_ep.runtime.launch.launcher import Launcher, ProcessEvent
from elastic_ep.runtime.launch.process import LocalProcess
from elastic_ep.runtime.weights.fingerprint import fingerprint

log = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 2.0
RETRY_S = 0.2
GONE_AFTER_S = 2.0
"""a controller that was there, and whose host now refuses connections for so long, has ended"""
END_TIMEOUT_S = 2.0
"""how long ranks may take to end by themselves when the server stops"""


class AgentError(ElasticEPError):
    """The agent cannot go on. The message says why and what to do."""


@dataclass(frozen=True)
class AgentConfig:
    """One agent.

    Attributes:
        controller: `tcp:HOST:PORT`.
        node: label of this host's failure domain.
        ranks: seats to take; None for all of the node's that are free.
        checkpoint: where the server's checkpoint lies on this host; None: at the same path.
        mesh_host: address of this host at which peers reach its ranks; None: the one from which it reaches the controller.
        wait_s: how long to try to reach a controller that has not been there yet; reconnect_s: after a cut.
        preload, target: what the zygote imports, and a rank's program (`module:function`).
        fault_file: where this agent looks for faults (see `FaultFile`); for tests.
    """

    controller: str
    token: str = field(repr=False)
    node: str
    preload: str
    target: str
    ranks: int | None = None
    checkpoint: str | None = None
    mesh_host: str | None = None
    wait_s: float = 60.0
    reconnect_s: float = 3600.0
    fault_file: str = ""


class Agent:
    """Use `run()` once. `on_seated(ranks)` is called whenever the controller has given it seats."""

    def __init__(self, config: AgentConfig, on_seated: Callable[[tuple[int, ...]], None]) -> None:
        self.config = config
        self._on_seated = on_seated
        self._agent_id = secrets.token_hex(8)
        self._processes: dict[tuple[int, int], LocalProcess] = {}
        self._unreported: set[tuple[int, int]] = set()
        self._doomed: set[tuple[int, int]] = set()
        """to be killed as soon as the launcher says which process it is"""
        self._launcher: Launcher | None = None
        self._stream: AgentStream | None = None
        self._terms: Terms | None = None
        self._mesh_host = ""
        self._waits_for = ""
        """what was said last of why it has no ranks"""
        self._stopping: asyncio.Event
        self._faults = FaultPlan(file=FaultFile(config.fault_file) if config.fault_file else None)

    def stop(self) -> None:
        """End `run()` soon, and the ranks with it."""
        self._stopping.set()

    async def run(self) -> int:
        """Serve until the server stops (0). Raises AgentError when it never was there, is gone, or refuses this agent."""
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        try:
            return await self._serve()
        finally:
            await self._end_all()

    # ---- connections

    async def _serve(self) -> int:
        was_there = False
        refused_since: float | None = None
        deadline = self._loop.time() + self.config.wait_s
        while not self._stopping.is_set():
            try:
                await self._session()
                return 0
            except (ConnectionRefusedError, ConnectionResetError) as error:
                trouble: Exception = error
                refused_since = refused_since or self._loop.time()
            except (OSError, _Later) as error:
                trouble, refused_since = error, None
                if isinstance(error, _Later) and self._waits_for != str(error):  # it asks again, several times a second
                    log.warning("waiting for ranks of %s: %s; asking again", self.config.controller, error)
                    self._waits_for = str(error)
            except _Lost as error:
                log.warning("lost the controller at %s (%s); dialling again", self.config.controller, error)
                self._waits_for = ""
                trouble, refused_since, was_there = error, None, True
                deadline = self._loop.time() + self.config.reconnect_s
            now = self._loop.time()
            if was_there and refused_since is not None and now - refused_since > GONE_AFTER_S:
                raise AgentError(f"the controller at {self.config.controller} has ended ({trouble}); its ranks here were ended too")
            if now > deadline and isinstance(trouble, _Later):
                raise AgentError(f"refused: {trouble}")
            if now > deadline:
                raise AgentError(f"no controller at {self.config.controller}: {trouble}; check the address, and that it is up")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), RETRY_S)
        return 0

    async def _session(self) -> None:
        """One connection, to its end: returns when the server said goodbye, raises _Lost when it broke, AgentError when it was refused."""
        try:
            sock = await self._loop.run_in_executor(None, dial, self.config.controller, DIAL_TIMEOUT_S, self.config.token, Role.AGENT)
        except AuthError as error:
            raise AgentError(f"{self.config.controller}: {error}") from None
        self._mesh_host = self.config.mesh_host or sock.getsockname()[0]
        ended: asyncio.Future[None] = self._loop.create_future()

        def settle(error: Exception | None) -> None:
            if not ended.done():
                ended.set_exception(error) if error else ended.set_result(None)

        def on_message(message: OrderMessage) -> None:
            try:
                self._obey(message, settle)
            except ElasticEPError as error:
                settle(AgentError(str(error)))

        self._faults.control = sock
        stream = self._stream = AgentStream(on_message, lambda reason: settle(_Lost(reason)), self._beat)
        sock.setblocking(False)
        await self._loop.create_connection(lambda: stream, sock=sock)
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((ended, stop), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ended.result()
        finally:
            stop.cancel()
            self._stream = None
            stream.close()

    def _obey(self, message: OrderMessage, settle: Callable[[Exception | None], None]) -> None:
        match message:
            case Terms():
                self._faults.reach("agent_terms")
                self._accept(message)
                self._faults.reach("agent_offered")
            case Seated():
                self._faults.ranks = message.ranks
                self._faults.reach("agent_seated")
                for process in message.start_over:
                    log.warning("told to start over: %s", process.reason)
                    self._kill((process.rank, process.incarnation))
                self._on_seated(message.ranks)
            case StartProcess():
                self._faults.reach("agent_start")
                self._start(message)
                self._faults.reach("agent_started")
            case KillProcess():
                self._faults.reach("agent_kill")
                self._kill((message.rank, message.incarnation))
                self._faults.reach("agent_killed")
            case Refused():
                self._faults.ranks = ()
                settle(AgentError(f"refused: {message.reason}") if message.is_final else _Later(message.reason))
            case Goodbye():
                settle(None)

    def _accept(self, terms: Terms) -> None:
        """Check that this host can serve the run, and offer it. Raises CheckpointError, AgentError."""
        checkpoint = self.config.checkpoint or terms.checkpoint
        known = self._terms is not None and self._terms.fingerprint == terms.fingerprint
        if not known and fingerprint(checkpoint) != terms.fingerprint:
            theirs = f"the one that the server has at {terms.checkpoint}"
            raise AgentError(f"the checkpoint {checkpoint} is not {theirs}; give its folder on this host by --checkpoint")
        if self._terms is not None and self._terms.run_id != terms.run_id:
            for key in [*self._processes]:
                log.warning("told to start over: the server itself was; rank %d of the one before is ended", key[0])
                self._kill(key)
                self._forget(key)
        self._terms = msgspec.structs.replace(terms, checkpoint=checkpoint)
        if self._launcher is None:
            self._start_launcher()
        assert self._stream is not None
        running = tuple(key for key, process in self._processes.items() if not process.has_exited)
        self._stream.send(Offer(self._agent_id, self.config.node, socket.gethostname(), os.getpid(), self.config.ranks, running))
        self._stream.start_beating(terms.beat_s, terms.silence_s)

    def _beat(self) -> Beat:
        self._faults.reach("agent_beat")
        return Beat(tuple((*key, process.state().letter) for key, process in self._processes.items()))

    # ---- processes

    def _start_launcher(self) -> None:
        assert self._terms is not None
        self._launcher = Launcher(self.config.preload, self._terms.checkpoint, self._on_process, self._on_launcher_lost)
        self._launcher.start(self._loop)

    def _start(self, order: StartProcess) -> None:
        assert self._terms is not None
        assert self._launcher is not None
        key = (order.rank, order.incarnation)
        for other in [k for k in self._processes if k[0] == order.rank]:
            self._kill(other)
        if not self._launcher.is_running:
            self._start_launcher()
        program = dict(order.program)
        program["rank"] = program["rank"] | {
            "controller": self.config.controller,
            "listen": f"{tcp_address(self._mesh_host, 0)}#{order.incarnation}",
            "token": derive_token(self.config.token, self._terms.run_id),
            "guardian_pid": os.getpid(),
            "host_backup_fd": -1,  # it is a file of the controller's host
        }
        program["engine"] = program["engine"] | {"checkpoint_dir": self._terms.checkpoint}
        self._unreported.add(key)
        self._launcher.spawn(order.rank, order.incarnation, self.config.target, program)

    def _on_process(self, event: ProcessEvent) -> None:
        key = (event.rank, event.incarnation)
        never_was = event.kind == "exited" and key in self._unreported
        self._unreported.discard(key)
        if never_was:
            self._forget(key)
            self._report(event)
        elif event.kind == "spawned":
            self._faults.reach("agent_spawned")
            process = self._processes[key] = LocalProcess(event.pid, self._loop, lambda: None)
            process.watch()
            if key in self._doomed:
                process.kill()
            self._report(event)
            self._faults.reach("agent_spawned_told")
        elif event.kind == "stopped":
            self._report(event)
        else:
            self._on_end(event)

    def _on_end(self, event: ProcessEvent) -> None:
        """It is ending, or has exited: whichever is known first is told."""
        key = (event.rank, event.incarnation)
        process = self._processes.get(key)
        if process is None:
            return
        if event.kind == "ending":
            state = process.state()
            if not (state.is_ending and state.exit):
                return  # reaped already: the launcher's word, which says how it ended, is on its way
            event = replace(event, kind="exited", status=state.exit)
        self._faults.reach("agent_exited")
        self._forget(key)
        self._report(event)
        self._faults.reach("agent_exited_told")

    def _report(self, event: ProcessEvent) -> None:
        log.info("rank %d (process %d, pid %d) %s %s", event.rank, event.incarnation, event.pid, event.kind, event.status)
        if self._stream is not None:
            self._stream.send(ProcessReport(event.kind, event.rank, event.incarnation, event.pid, event.status))

    def _forget(self, key: tuple[int, int]) -> None:
        self._doomed.discard(key)
        process = self._processes.pop(key, None)
        if process is not None:
            process.close()

    def _kill(self, key: tuple[int, int]) -> None:
        process = self._processes.get(key)
        if process is not None:
            process.kill()
        elif key in self._unreported:
            self._doomed.add(key)

    def _on_launcher_lost(self) -> None:
        """Its exits are not reported any more: end what it started, the controller orders anew."""
        log.error("the launcher process ended; ranks of this host start over")
        for key in self._unreported | self._processes.keys():
            self._kill(key)
            self._forget(key)
            self._report(ProcessEvent("exited", *key, 0, "the launcher of its host ended"))
        self._unreported.clear()

    async def _end_all(self) -> None:
        """Ranks see the controller's channel close, or are killed. Then the launcher goes."""
        deadline = self._loop.time() + (END_TIMEOUT_S if self._stream is None and not self._stopping.is_set() else 0.0)
        while self._processes and self._loop.time() < deadline:
            await asyncio.sleep(0.01)
        for key in [*self._processes]:
            self._kill(key)
            self._forget(key)
        if self._launcher is not None:
            await self._loop.run_in_executor(None, self._launcher.close)


class _Lost(Exception):
    """The connection to a controller that had been there broke."""


class _Later(Exception):
    """The controller cannot take this agent yet."""
