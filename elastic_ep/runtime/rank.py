"""The rank process: obey the controller one message at a time, beat, and end when the controller is gone.

One loop owns all state; the only other thread sends heartbeats. During a step the control channel is watched by the dispatcher: the
controller writes to a rank in mid-step only to interrupt it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from elastic_ep.brain.messages import (
    ControllerMessage,
    DenseLoaded,
    Heartbeat,
    Hello,
    Install,
    Installed,
    InstallFailed,
    RankFatal,
    RankMessage,
    RunStep,
    Shutdown,
    Stage,
    StartOver,
    StepDone,
    StepFailed,
)
from elastic_ep.core.errors import ElasticEPError, InvalidInputError
from elastic_ep.core.placement import ExpertPlacement
from elastic_ep.core.routing import RoutingTable
from elastic_ep.core.topology import Topology
from elastic_ep.runtime.control import wire
from elastic_ep.runtime.control.address import dial
from elastic_ep.runtime.control.auth import AuthError, Role
from elastic_ep.runtime.dispatch.base import Dispatcher, Interrupted, MeshDispatcher, PeerFailed
from elastic_ep.runtime.engine import Engine
from elastic_ep.runtime.faults import FaultPlan
from elastic_ep.runtime.filler import Filler
from elastic_ep.runtime.rank_config import RankConfig
from elastic_ep.runtime.stager import Stager, moved_bytes
from elastic_ep.runtime.upkeep import Upkeep
from elastic_ep.runtime.weights.host import HostBackup
from elastic_ep.runtime.weights.peer import PeerServer
from elastic_ep.runtime.weights.peer_memory import MemoryAccess, allow_reading
from elastic_ep.runtime.weights.sources import Peers, Sources

log = logging.getLogger(__name__)

STEPS_PER_REPORT = 16
"""so many steps' expert counts go to the controller at once"""
MEMORY_CURE = "serve with fewer ranks on this host, less --kv-tokens or --host-backup off, or raise the limit (ulimit -v)"
EXIT_CONTROLLER_GONE = 3
EXIT_FATAL = 4
EXIT_START_OVER = 5
"""the controller said that this process was given up"""


@contextmanager
def _as_connection_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConnectionError(str(error)) from error


class ControlChannel:
    """The rank's end. `send` may be called by the loop and by the heartbeat thread. Raises ConnectionError, whatever the network says."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._lock = threading.Lock()

    def send(self, message: RankMessage) -> None:
        data = wire.encode(message)
        with self._lock, _as_connection_error():
            self.sock.sendall(data)

    def receive(self) -> ControllerMessage | None:
        with _as_connection_error():
            return wire.receive(self.sock)

    def is_readable(self) -> bool:
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))


class Rank:
    """One rank: a model, a mesh and a control channel."""

    def __init__(
        self,
        config: RankConfig,
        channel: ControlChannel,
        engine: Engine,
        dispatcher: Dispatcher,
        faults: FaultPlan,
        weights: tuple[PeerServer, str],
    ) -> None:
        self.config = config
        self.channel = channel
        self.engine = engine
        self.dispatcher = dispatcher
        self.faults = faults
        self.epoch = 0
        self.routing: RoutingTable | None = None
        self.held: dict[tuple[int, int], tuple[int, int]] = {}
        """(layer, physical slot) -> (expert, digest): what this rank's slots do hold."""
        self._counts: NDArray[np.int64] | None = None
        self._prepared: tuple[Install, RoutingTable] | None = None
        self.peer_server, self.weights_address = weights
        self.filler: Filler
        self.stager: Stager

    def serve(self) -> int:
        """Load, then obey until told to stop. Returns the exit status."""
        started = time.monotonic()
        self.engine.make_slots()
        self._prepare_weights()  # what it begins in the background goes on beside the rest
        digest = self.engine.load_dense()
        self.engine.prepare(self.dispatcher)
        self.faults.reach("dense_loaded")
        self.channel.send(DenseLoaded(digest, (time.monotonic() - started) * 1e3))
        self.faults.reach("dense_told")
        while True:
            message = self.channel.receive()
            match message:
                case None:
                    return EXIT_CONTROLLER_GONE
                case Shutdown():
                    return 0
                case StartOver():
                    log.warning("told to start over: %s", message.reason)
                    return EXIT_START_OVER
                case Install():
                    self.channel.send(self._install(message))
                    self.faults.reach("install_told", epoch=message.epoch)
                case Stage():
                    self.stager.order(message)
                case RunStep():
                    answer = self._run_step(message)
                    if answer is not None:
                        self.channel.send(answer)
                        self.faults.reach("step_told", epoch=message.epoch, step=message.step)

    def _prepare_weights(self) -> None:
        config, slots = self.config, self.engine.slots
        if config.host_backup_fd >= 0:
            slots.backup = HostBackup(config.host_backup_fd, *slots.shape, self.faults)
        self.peer_server.find, self.peer_server.addresses, self.peer_server.faults = slots.bytes_of, slots.addresses, self.faults
        access = MemoryAccess(slots.shape[2]) if config.reads_peer_memory else None
        if access is not None:
            allow_reading()

        def make_sources() -> Sources:
            return Sources(slots, Peers(config.rank, self.weights_address, config.token, slots.shape, access))

        self.filler = Filler(slots, config.first_slot, make_sources(), self.held, self.faults)
        turn = (config.rank, max(config.ep_size, config.rank + 1))
        upkeep = Upkeep(slots, config.first_slot, self.held, turn, config.fill_bytes_per_s, config.scrub_bytes_per_s)
        self.stager = Stager(slots, config.first_slot, make_sources, upkeep, self.channel.send, self.faults, self._prepare)

    def _prepare(self, order: Install) -> None:
        """Build the tables of an Install before it comes (in the stager's thread)."""
        self._prepared = order, routing_of(order)

    def _install(self, order: Install) -> Installed | InstallFailed:
        """Match the mesh, load, swap tables. An interrupt (a newer epoch is waiting) ends it early; what was loaded is kept and told."""
        started = time.monotonic()
        self.faults.reach("install_begin", epoch=order.epoch)
        self.epoch = order.epoch
        self.stager.cancel()
        linked = self.dispatcher.connect(order.peers, order.deadline_s, epoch=order.epoch)
        with contextlib.suppress(InvalidInputError):  # its folder is not there again yet; experts come from elsewhere meanwhile
            self.peer_server.listen()
        if isinstance(linked, PeerFailed):
            return InstallFailed(order.epoch, (), {peer: kind.value for peer, kind in linked.peers.items()}, "")
        self.faults.reach("install_connected", epoch=order.epoch)
        filled = self.filler.fill(order.loads, lambda: isinstance(linked, Interrupted) or self.channel.is_readable())
        if filled.is_interrupted or filled.failure:
            return InstallFailed(order.epoch, tuple(filled.slots), {}, filled.failure)
        prepared = self._prepared
        if prepared is None or replace(prepared[0], loads=order.loads, peers=order.peers) != order:
            prepared = order, routing_of(order)
        self.routing, self._prepared = prepared[1], None
        for (layer, expert, _), digest in zip(order.streamed, order.streamed_digests, strict=False):
            if digest is not None:
                self.engine.slots.expect(layer, expert, digest)
        self.engine.slots.drop_staged()
        self.faults.reach("install_end", epoch=order.epoch)
        move_ms = (time.monotonic() - started) * 1e3
        return Installed(order.epoch, tuple(filled.slots), moved_bytes(filled.by_source), move_ms, tuple(filled.errors))

    def _run_step(self, order: RunStep) -> StepDone | StepFailed | None:
        if order.epoch != self.epoch or self.routing is None or self.routing.epoch != order.epoch:
            return None  # of another epoch: the controller has moved on, its next message says where
        self.faults.reach("step_begin", epoch=order.epoch, step=order.step)
        started = time.monotonic()
        output = self.engine.run_step(order.work, order.release, self.routing, self.dispatcher, order.step)
        match output:
            case PeerFailed():
                return StepFailed(order.epoch, order.step, {peer: kind.value for peer, kind in output.peers.items()})
            case Interrupted():
                return None
        self.faults.reach("step_end", epoch=order.epoch, step=order.step)
        counts = self._counts_due(output.expert_counts, order.step)
        return StepDone(order.epoch, order.step, tuple(output.tokens), (time.monotonic() - started) * 1e3, counts)

    def _counts_due(self, counts: NDArray[np.int64] | None, step: int) -> bytes | None:
        """Add a step's counts to those not reported yet; all of them as bytes when it is time to report."""
        if counts is not None:
            self._counts = counts if self._counts is None else self._counts + counts
        if self._counts is None or step % STEPS_PER_REPORT:
            return None
        due, self._counts = self._counts.astype("<u4").tobytes(), None
        return due


def routing_of(order: Install) -> RoutingTable:
    """The tables that an Install describes."""
    topology = Topology(order.slots_per_rank)
    shape = (order.num_layers, topology.num_slots)
    placement = ExpertPlacement(np.frombuffer(order.physical_to_logical_map, "<i4").reshape(shape), order.num_experts)
    quotas = None if order.quotas is None else np.frombuffer(order.quotas, "<f8").reshape(shape)
    streamed = {(layer, expert): rank for layer, expert, rank in order.streamed}
    return RoutingTable.build(order.epoch, placement, topology, quotas, streamed)


def _beat(channel: ControlChannel, interval_s: float, guardian_pid: int | None) -> None:
    """Heartbeat thread. When the controller's end is closed, or the guardian has ended, nothing this process does can matter any more:
    end it, whatever it is in."""
    poll = select.poll()
    poll.register(channel.sock, select.POLLHUP | select.POLLRDHUP)
    if guardian_pid is not None:
        try:
            poll.register(os.pidfd_open(guardian_pid), select.POLLIN)
        except ProcessLookupError:
            os._exit(EXIT_CONTROLLER_GONE)
    sequence = 0
    while True:
        try:
            channel.send(Heartbeat(sequence))
        except OSError:
            os._exit(EXIT_CONTROLLER_GONE)
        sequence += 1
        if poll.poll(interval_s * 1e3):
            os._exit(_last_word(channel.sock))


def _last_word(sock: socket.socket) -> int:
    """The exit status for a closed channel: the controller may have said why."""
    try:
        sock.setblocking(False)
        message = wire.receive(sock)
    except (OSError, wire.WireError):
        return EXIT_CONTROLLER_GONE
    if isinstance(message, StartOver):
        log.warning("told to start over: %s", message.reason)
        return EXIT_START_OVER
    return EXIT_CONTROLLER_GONE


def weights_listen(mesh: str) -> str:
    """Where to listen for requests for weights, beside the address of the mesh."""
    if mesh.startswith("tcp:"):
        return f"{mesh.partition('#')[0].rpartition(':')[0]}:0"
    return f"{mesh}.w"


def is_no_memory(error: Exception) -> bool:
    """Whether the system gave no more memory."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def _say_hello(channel: ControlChannel, config: RankConfig, dispatcher: MeshDispatcher) -> tuple[PeerServer, str]:
    """Be reachable, and tell where. Over TCP the token was proved, and is not sent. Returns the server of weights and its address.

    Raises InvalidInputError, after the hello, when there is nowhere to listen.
    """
    token = config.token if channel.sock.family == socket.AF_UNIX else ""
    server = PeerServer(config.rank, weights_listen(config.listen), config.token)
    address, weights, failure = config.listen, "", None
    try:
        address, weights = dispatcher.listen(), server.listen()
    except InvalidInputError as error:
        failure = error
    channel.send(Hello(config.rank, config.incarnation, os.getpid(), socket.gethostname(), token, address, weights))
    if failure is not None:
        raise failure
    return server, weights


def run(
    config: RankConfig,
    make_engine: Callable[[], Engine],
    make_dispatcher: Callable[[socket.socket, FaultPlan], MeshDispatcher],
    make_faults: Callable[[socket.socket], FaultPlan],
) -> int:
    """The whole life of a rank process. Returns its exit status; every reason for a non-zero one was told to the controller."""
    try:
        sock = dial(config.controller, config.connect_timeout_s, config.token, Role.RANK)
    except (OSError, AuthError) as error:
        log.warning("rank %d: no controller at %s: %s", config.rank, config.controller, error)
        return EXIT_CONTROLLER_GONE
    channel = ControlChannel(sock)
    faults = make_faults(sock)
    try:
        dispatcher = make_dispatcher(sock, faults)
    except ElasticEPError as error:
        token = config.token if sock.family == socket.AF_UNIX else ""
        channel.send(Hello(config.rank, config.incarnation, os.getpid(), socket.gethostname(), token, "", ""))
        channel.send(RankFatal(str(error)))
        return EXIT_FATAL
    try:
        weights = _say_hello(channel, config, dispatcher)
        beat = (channel, config.heartbeat_interval_s, config.guardian_pid)
        threading.Thread(target=_beat, args=beat, name="heartbeat", daemon=True).start()
        faults.reach("hello_said")
        return Rank(config, channel, make_engine(), dispatcher, faults, weights).serve()
    except ElasticEPError as error:
        channel.send(RankFatal(str(error)))
        return EXIT_FATAL
    except ConnectionError as error:
        log.warning("rank %d: control channel: %s", config.rank, error)
        return EXIT_CONTROLLER_GONE
    except Exception as error:
        if is_no_memory(error):
            reason = f"no memory for rank {config.rank} ({str(error) or type(error).__name__}); {MEMORY_CURE}"
        else:
            log.exception("rank %d failed", config.rank)
            reason = f"{type(error).__name__}: {error}"
        with suppress(OSError):  # the controller may be gone too
            channel.send(RankFatal(reason))
        return EXIT_FATAL
    finally:
        dispatcher.close()
