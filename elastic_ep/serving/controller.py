"""The shell around the brain: sockets, processes, timers and streams on one asyncio loop. It decides nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_ep.brain import events as ev
from elastic_ep.brain.brain import Brain
from elastic_ep.brain.events import FailureCause, GenerationRequest, TokenEvent
from elastic_ep.brain.messages import Hello, RankMessage, StartOver
from elastic_ep.core.recovery import Phase
from elastic_ep.models.spec import ModelSpec
from elastic_ep.runtime.faults import FaultFile
from elastic_ep.runtime.launch.process import ProcessState
from elastic_ep.runtime.weights.fingerprint import fingerprint
from elastic_ep.runtime.weights.host import HostBackup
from elastic_ep.serving.agents import Agents, Hooks, no_point
from elastic_ep.serving.backend import QueueFull, Unavailable
from elastic_ep.serving.config import INTEGRATED, ServeConfig
from elastic_ep.serving.eventlog import EventLog
from elastic_ep.serving.link import RankLink
from elastic_ep.serving.local_ranks import LocalHooks, LocalRanks
from elastic_ep.serving.metrics import Metrics
from elastic_ep.serving.operation_desk import OperationDesk
from elastic_ep.serving.planning import planning
from elastic_ep.serving.rank_program import RankPlace, rank_program
from elastic_ep.serving.shell_faults import ShellFaults, Victim
from elastic_ep.serving.status import status_object
from elastic_ep.serving.stream import RequestStream

log = logging.getLogger(__name__)

EXIT_GRACE_S = 0.005
"""How long an exit waits for the launcher to say how it came about."""
REMOTE_EXIT_GRACE_S = 0.02
"""How long a remote rank's closed channel waits for its agent to say why."""


class Controller:
    """Owns the rank processes of one server and drives its brain. Use as an async context manager; `wait_serving` then waits for ranks."""

    ranks_class = LocalRanks

    def __init__(self, config: ServeConfig, spec: ModelSpec, metrics: Metrics | None = None) -> None:
        self.config = config
        self.spec = spec
        self.settings = config.brain_settings(spec)
        self.metrics = metrics or Metrics()
        self.eventlog = EventLog()
        self.max_model_len = config.model_len(spec)
        self.model_name = config.served_model_name or Path(config.checkpoint).resolve().name
        self.vocab_size = spec.vocab_size
        self.default_drain: ev.Drain = "finish" if config.drain == "finish" else "move"
        self.brain: Brain
        self.error = ""
        self._token = secrets.token_hex(16)
        self._agents: Agents | None = None
        self._links: dict[tuple[int, int], RankLink] = {}
        hooks = LocalHooks(self._fail, self._ended, self._on_exit, self._reach_spawned)
        self._local = self.ranks_class(str(config.checkpoint), self._make_link, hooks)
        self._backup_fd = -1
        self._store: tuple[Any, str] | None = None  # kept so that it goes on; where ranks find it
        self._backup: HostBackup | None = None
        self._streams: dict[str, RequestStream] = {}
        self._faults = ShellFaults(FaultFile(config.fault_file), self._victim) if config.fault_file else None
        self._queue: deque[ev.Event] = deque()
        self._draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None

    # ---- life

    async def __aenter__(self) -> Controller:
        await self._local.open()
        try:
            await self.start()
        except BaseException:
            self._local.remove_folder()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start the ranks; they load while this returns."""
        self._loop = asyncio.get_running_loop()
        self._solver = ThreadPoolExecutor(1, thread_name_prefix="solver")
        self._solver.submit(int).result()  # its thread is there from now on: a system at its limit of threads must not stop a recovery
        self.stopped = asyncio.Event()
        self.serving = asyncio.Event()
        if self.config.host_backup == "experts":
            shape = (self.spec.num_layers, self.spec.num_experts, self.spec.slot_bytes(self.config.dtype))
            slots = self.config.host_slots(self.spec.num_experts) * self.spec.num_layers
            self._backup_fd = HostBackup.create(*shape, beside=slots * shape[2])
            self._backup = HostBackup(self._backup_fd, *shape)
            log.warning("host backup: %d bytes of this host's memory for all experts, filled while serving", self._backup.num_bytes)
        if self.config.dispatch in INTEGRATED:
            from elastic_ep.integrations.rendezvous import host_store

            self._store = host_store("127.0.0.1" if self.config.remote is None else self.config.remote.host)
        self.brain = Brain(self.settings, time.monotonic())
        self._desk = OperationDesk(self.brain.state, self._feed)
        await self._let_agents_in()
        self._start_ranks()
        self._set_timer()

    async def _let_agents_in(self) -> None:
        remote, checkpoint = self.config.remote, self.config.checkpoint
        if remote is None:
            return
        mark = await self._loop.run_in_executor(self._solver, fingerprint, checkpoint)
        reach = self._faults.reach if self._faults is not None else no_point
        hooks = Hooks(self._feed, self._fail, self.brain.expects, reach, self._reach_spawned)
        folder = str(Path(checkpoint).resolve())
        self._agents = Agents(remote, self.config.ep_size, folder, mark, self.settings.heartbeat_timeout_s, hooks)
        self._token = self._agents.run_token
        await self._agents.listen(lambda: self._make_link(token=""))

    def _start_ranks(self) -> None:
        self._local.start_launcher(() if self._backup_fd < 0 else (self._backup_fd,))
        for rank in range(self.config.ep_size):
            self._start_rank(rank, 0)

    def _start_rank(self, rank: int, incarnation: int) -> None:
        program = self._rank_program(rank, incarnation)
        if self._agents is not None and self._agents.is_remote(rank):
            self._agents.start(rank, incarnation, program)
        else:
            self._local.start(rank, incarnation, program)

    def _rank_program(self, rank: int, incarnation: int) -> dict[str, Any]:
        store = "" if self._store is None else self._store[1]
        place = RankPlace(rank, incarnation, self._local.control, str(self._local.run_dir), self._token, self._backup_fd, store)
        return rank_program(place, self.config, self.brain.state.topology, self.settings.step_timeout_s)

    async def wait_serving(self) -> None:
        """Until the first epoch is installed. Raises Unavailable with the reason if it never will be."""
        waits = [asyncio.ensure_future(self.serving.wait()), asyncio.ensure_future(self.stopped.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not self.serving.is_set():
            raise Unavailable(self.error or "the server was stopped while it started")

    def request_stop(self) -> None:
        """Finish what runs, take nothing new, then stop the ranks (`stopped` is set)."""
        self._feed(ev.StopRequested())

    async def close(self) -> None:
        """Stop the ranks now and remove every trace. What still runs is lost to its clients."""
        if self._timer:
            self._timer.cancel()
        self._local.stop_listening()
        if self._agents is not None:
            await self._agents.close(self.error or "the server stopped")
        for link in list(self._links.values()):
            link.close()
        await self._local.close(self._solver)
        if self._backup_fd >= 0:
            os.close(self._backup_fd)
        self.end_streams()
        self._write_load_trace()
        self._solver.shutdown(wait=False, cancel_futures=True)

    def _write_load_trace(self) -> None:
        if self.config.load_trace is None:
            return
        try:
            np.savez_compressed(self.config.load_trace, load=self.brain.state.load.trace())
        except OSError as error:
            log.error("cannot write the load trace to %s: %s", self.config.load_trace, error.strerror)

    # ---- the brain's loop

    def _feed(self, event: ev.Event) -> None:
        """Hand an event to the brain and carry out what it answers; events that arise meanwhile wait their turn."""
        self._queue.append(event)
        if self._draining:
            return
        self._draining = True
        try:
            while self._queue:
                commands = self.brain.handle(self._queue.popleft(), time.monotonic())
                if self._faults is not None:
                    self._faults.carry_out(commands, self._execute, self.brain.state)
                    continue
                for command in commands:
                    self._execute(command)
            self._set_timer()
        except Exception as error:
            # Our own bug. It must not reach the transport that brought the event: a closed channel would be taken for a dead rank.
            log.critical("the controller failed; what led to it:\n%s", "\n".join(self.brain.state.group.story()), exc_info=True)
            self._queue.clear()
            self.error = self.error or f"the controller failed: {type(error).__name__}: {error}"
            self.stopped.set()
        finally:
            self._draining = False

    def _set_timer(self) -> None:
        due = self.brain.next_deadline()
        if due is None or (self._timer_at is not None and self._timer_at <= due):
            return  # an earlier timer fires, finds nothing due and sets the next: cheaper than one cancel per event
        if self._timer:
            self._timer.cancel()
        self._timer, self._timer_at = self._loop.call_later(max(0.0, due - time.monotonic()), self._on_timer), due

    def _on_timer(self) -> None:
        self._timer = self._timer_at = None
        due = self.brain.next_deadline()
        if due is not None and due <= time.monotonic():
            self._feed(ev.TimePassed())
        else:
            self._set_timer()

    def _execute(self, command: ev.Command) -> None:
        match command:
            case ev.Send():
                link = self._links.get((command.rank, self.brain.state.seats[command.rank].incarnation))
                if link is not None:
                    link.send(command.message)
            case ev.Emit():
                self._emit(command)
            case ev.StepCommitted():
                self.metrics.step_committed(time.monotonic() - command.started)
            case ev.Publish():
                self.metrics.event(command.kind, command.data)
                self.eventlog.publish(command.kind, command.data)
                if command.kind == "installed":
                    self.serving.set()
                elif command.kind == "rank_left_out":
                    rank, reason = command.data["rank"], command.data["reason"]
                    log.error("rank %d is not started again: %s; scale to the present size to try anew", rank, reason)
                elif command.kind == "operation_finished":
                    self._desk.note_finished(command.data["operation_id"])
            case ev.Fence():
                self._fence(command.rank, command.incarnation, command.reason)
            case ev.StartRank():
                self._start_rank(command.rank, command.incarnation)
            case ev.MakePlan():
                self._make_plan(command)
            case ev.Probe():
                self._probe(command.rank, command.incarnation)
            case ev.Stopped():
                self.error = command.error
                self.stopped.set()

    def _make_plan(self, command: ev.MakePlan) -> None:
        """A recovery is solved at once: nothing runs until it is. A change is solved beside the steps."""
        solve = planning(command, self.settings.plan, self.brain.state, self._backups())
        if command.change is None:
            self._queue.append(solve())
            return
        solving = self._loop.run_in_executor(self._solver, solve)
        solving.add_done_callback(lambda done: None if done.cancelled() or self.stopped.is_set() else self._feed(done.result()))

    def _backups(self) -> dict[str, NDArray[np.bool_]]:
        """What is in this host's memory, under the label of each of its nodes."""
        if self._backup is None:
            return {}
        topology = self.brain.state.topology
        labels = topology.labels("node" if "node" in topology.domains else "rank")
        experts = self._backup.experts
        return {labels[rank]: experts for rank, _ in self._local.pids()}

    # ---- ranks

    def _make_link(self, token: str | None = None) -> RankLink:
        return RankLink(self._token if token is None else token, self._on_hello, self._on_message, self._on_link_closed)

    def _on_hello(self, link: RankLink, hello: Hello) -> None:
        key = (hello.rank, hello.incarnation)
        if key in self._links or not self.brain.expects(*key):
            reason = "its seat has a process already" if key in self._links else "it was given up before it spoke"
            if self._agents is not None and self._agents.is_remote(hello.rank):
                reason = self._agents.why_given_up(*key)
            link.refuse(StartOver(reason))
            return
        self._links[key] = link
        if self._faults is not None:
            self._faults.settle()
            self._faults.reach("rank_connected")
        self._feed(ev.RankConnected(hello))

    def _on_message(self, link: RankLink, message: RankMessage) -> None:
        assert link.hello is not None
        self._feed(ev.RankSaid(link.hello.rank, link.hello.incarnation, message))

    def _on_link_closed(self, link: RankLink) -> None:
        if link.hello is None:
            return
        key = (link.hello.rank, link.hello.incarnation)
        self._links.pop(key, None)
        state = self._local.state(*key)
        if state is not None and state.is_ending:
            self._ended(*key, state.exit)
        elif self._agents is not None and self._agents.is_remote(key[0]):
            self._loop.call_later(REMOTE_EXIT_GRACE_S, self._fail, *key, FailureCause.CHANNEL_CLOSED, "")
        else:
            self._fail(*key, FailureCause.CHANNEL_CLOSED, "")

    def _ended(self, rank: int, incarnation: int, how: str) -> None:
        if how:
            self._fail(rank, incarnation, FailureCause.EXITED, how)
        else:  # reaped already: the launcher's word, which says how it ended, is on its way
            self._loop.call_later(EXIT_GRACE_S, self._fail, rank, incarnation, FailureCause.EXITED, "")

    def _fail(self, rank: int, incarnation: int, cause: FailureCause, detail: str) -> None:
        if self.config.detect and not self.stopped.is_set():
            self._feed(ev.RankFailed(rank, incarnation, cause, detail))

    def _pids(self) -> dict[tuple[int, int], int]:
        """Of all processes that are known to exist, here and elsewhere."""
        return self._local.pids() | (self._agents.pids() if self._agents is not None else {})

    def _reach_spawned(self) -> None:
        if self._faults is not None:
            self._faults.settle()
            self._faults.reach("rank_spawned")

    def _victim(self, rank: int) -> Victim | None:
        """Who is in the seat, for a fault."""
        seats = self.brain.state.seats
        if rank >= len(seats) or not seats[rank].is_alive:
            return None
        key = (rank, seats[rank].incarnation)
        link, pids = self._links.get(key), self._pids()
        if self._local.has_exited(*key):
            return None
        return Victim(key[1], pids.get(key), link.close if link else None)

    def _on_exit(self, rank: int, incarnation: int, how: str) -> None:
        link = self._links.pop((rank, incarnation), None)
        if link is not None:
            link.close()
        self._ended(rank, incarnation, how)

    def _fence(self, rank: int, incarnation: int, reason: str) -> None:
        """Cut its channel and kill it. A process with SIGKILL pending runs no more of its program, and what it sent before carries its
        old epoch; its memory may take the kernel a while, which nobody has to wait for."""
        link = self._links.pop((rank, incarnation), None)
        if link is not None:
            link.close()
        if self._agents is not None and self._agents.is_remote(rank):
            self._agents.kill(rank, incarnation, reason)
        else:
            self._local.kill(rank, incarnation)
        self._feed(ev.RankFenced(rank, incarnation))

    def _probe(self, rank: int, incarnation: int) -> None:
        state = self._local.state(rank, incarnation) or self._remote_state(rank, incarnation)
        if state is None:
            self._fail(rank, incarnation, FailureCause.HEARTBEAT, f"silent for {self.settings.heartbeat_timeout_s:g} s")
        elif state.is_ending:
            self._ended(rank, incarnation, state.exit)
        elif state.letter in ("T", "t"):
            self._fail(rank, incarnation, FailureCause.STOPPED, "seen stopped")
        else:
            self._feed(ev.RankRuns(rank, incarnation))

    def _remote_state(self, rank: int, incarnation: int) -> ProcessState | None:
        """What its agent says of it, if that can be reached."""
        letter = self._agents.state_of(rank, incarnation) if self._agents is not None else ""
        return ProcessState(letter, letter in ("Z", "X"), "") if letter else None

    # ---- Backend

    def submit(self, request: GenerationRequest) -> RequestStream:
        refusal = self.brain.refusal()
        if refusal is not None:
            kind, reason = refusal
            raise QueueFull(reason) if kind == "queue_full" else Unavailable(reason)
        stream = RequestStream(lambda is_done: self._cancel(request.request_id, is_done))
        self._streams[request.request_id] = stream
        self._feed(ev.Submitted(request))
        return stream

    def begin_operation(self, request: ev.ScaleRequested | ev.DrainRequested) -> asyncio.Future[dict[str, Any]]:
        return self._desk.begin(request)

    def operation(self, operation_id: str) -> dict[str, Any] | None:
        return self._desk.find(operation_id)

    def operations(self) -> list[dict[str, Any]]:
        return self._desk.all()

    def _cancel(self, request_id: str, is_done: bool) -> None:
        if self._streams.pop(request_id, None) is not None and not self.stopped.is_set():
            self._feed(ev.Cancelled(request_id, is_done))

    def _emit(self, command: ev.Emit) -> None:
        finished = command.event.finish is not None
        stream = self._streams.pop(command.request_id, None) if finished else self._streams.get(command.request_id)
        if stream is not None:
            stream.put(command.event)

    def end_streams(self) -> None:
        """Tell what still listens that nothing more comes."""
        reason = self.error or "the server stopped before the request was finished"
        for stream in self._streams.values():
            stream.put(TokenEvent(None, stream.num_events, "error", reason))
        self._streams.clear()
        self.eventlog.close()

    def status(self) -> dict[str, Any]:
        status = status_object(self.brain.state, self._pids(), self.config.device)
        if self._agents is not None:
            status["nodes"] = self._agents.status()
        if self._backup is not None:
            ready = int(self._backup.experts.sum())
            status["host_backup"] = {"bytes": self._backup.num_bytes, "experts": ready, "of": self._backup.experts.size}
        return status

    def events(self) -> AsyncGenerator[dict[str, Any], None]:
        return self.eventlog.subscribe()

    def health(self) -> tuple[bool, str]:
        refusal = self.brain.refusal()
        if self.brain.state.group.phase is Phase.BOOTING or not self.serving.is_set():
            return False, "ranks are loading"
        if refusal is not None and refusal[0] == "unavailable":
            return False, refusal[1]
        return True, self.brain.state.group.phase.value
