"""Ranks as real processes that can be told to die or stop at a given point of a given layer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dispatch_cases import Batch, expected, make_batch, make_routing, run_experts, same_bits
from dispatch_cuda import CpuFront
from dispatch_world import TOKEN
from mpi_job import MpiJob, MpiProcess, ObjectPipe

from elastic_ep.runtime.dispatch.base import DispatchHandle, Interrupted, PeerFailed, StepPoint
from elastic_ep.runtime.dispatch.cuda.region import Capacity
from elastic_ep.runtime.dispatch.mpi import MpiDispatcher
from elastic_ep.runtime.dispatch.socket import SocketDispatcher

EXPERTS, TOP_K = 10, 3
ANSWER_S = 30.0
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "elastic_ep.runtime.dispatch.socket", "dispatch_processes"])


@dataclass(frozen=True)
class Step:
    """One step of all `ranks`; everything random in it follows from (epoch, step)."""

    ranks: tuple[int, ...]
    epoch: int
    step: int
    num_layers: int = 2
    hidden: int = 16
    max_tokens: int = 6
    dtype: torch.dtype = torch.float32

    def routing(self) -> Any:
        return make_routing(np.random.default_rng(self.epoch), list(self.ranks), EXPERTS, self.num_layers, self.epoch)

    def batch(self, rank: int) -> Batch:
        rng = np.random.default_rng((self.epoch, self.step, rank))
        return make_batch(rng, int(rng.integers(0, self.max_tokens + 1)), TOP_K, EXPERTS, self.hidden, self.dtype)


@dataclass(frozen=True)
class Fault:
    """What a rank does to itself in a step.

    Attributes:
        point: `before_dispatch`, `before_combine`, `waiting` (cuda only: its dispatch is on the GPU), or `mid_dispatch` /
            `mid_combine`: after the first `bytes_sent` bytes of that exchange.
    """

    point: str
    layer: int = 0
    signal: int = signal.SIGKILL
    bytes_sent: int = 0
    messages_sent: int = 0


@dataclass(frozen=True)
class Report:
    """How a step went on one rank.

    Attributes:
        outcome: None if every layer was done, else what ended it.
        wrong: what was not as it must be: sums, or rows of a partial result.
        took_s: seconds of the call that ended it.
    """

    outcome: PeerFailed | Interrupted | None
    wrong: tuple[str, ...]
    took_s: float
    counters: dict[str, int]


class _CountedSocket:
    """A socket that raises the signal once it has sent a number of bytes."""

    budget: int
    fault: Fault

    def __init__(self, sock: Any):
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def send(self, data: Any, flags: int) -> int:
        return self.sendmsg([data], (), flags)

    def sendmsg(self, buffers: Any, ancillary: Any, flags: int) -> int:
        left = b"".join(bytes(b) for b in buffers)[: type(self).budget]
        sent = self._sock.send(left, flags) if left else 0
        type(self).budget -= sent
        if not type(self).budget:
            os.kill(os.getpid(), type(self).fault.signal)
        return sent


class _CountedComm:
    """A communicator that raises the signal once it has begun to send a number of messages."""

    def __init__(self, comm: Any, fault: Fault):
        self._comm = comm
        self._fault = fault
        self._count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def Isend(self, *args: Any) -> Any:
        request = self._comm.Isend(*args)
        self._count += 1
        if self._count == self._fault.messages_sent:
            os.kill(os.getpid(), self._fault.signal)
        return request


def _arm(dispatcher: Any, fault: Fault) -> None:
    """Count what leaves; the compiled path of the sockets would send bytes past the counter, so it is not taken."""
    if isinstance(dispatcher, MpiDispatcher):
        comm = _CountedComm(dispatcher._comm, fault)
        for link in dispatcher._links.values():
            link._comm = comm
        return
    dispatcher._idle_link = lambda: None  # type: ignore[method-assign]
    _CountedSocket.budget, _CountedSocket.fault = fault.bytes_sent, fault
    for channel in dispatcher._mesh.channels.values():
        channel.sock = _CountedSocket(channel.sock)  # type: ignore[assignment]


def _check_partial(step: Step, rank: int, layer: int, failed: PeerFailed, partial: Any, wrong: list[str]) -> None:
    """The rows of the peers that answered must be theirs, whole: each grouped row is some token's of some rank that did not fail."""
    known = {row.numpy().tobytes() for r in step.ranks if r not in failed.peers for row in step.batch(r).x}
    if isinstance(partial, DispatchHandle):
        for row in partial.rows:
            if row.numpy().tobytes() not in known:
                wrong.append(f"layer {layer}: partial rows hold a row that nobody sent")


def _die_waiting(dispatcher: CpuFront, batch: Batch, routing: Any, at: StepPoint, fault: Fault) -> None:
    """Enqueue a dispatch and go, its kernels on the GPU."""
    with dispatcher._stream:
        dispatcher.inner.begin_step(routing, at.epoch, at.step)
        dispatcher.inner.enqueue_dispatch(batch.x.cuda(), batch.topk_ids.cuda(), batch.topk_weights.cuda(), at.layer)
        os.kill(os.getpid(), fault.signal)


def run_step(dispatcher: Any, rank: int, step: Step, fault: Fault | None) -> Report:
    routing, batch, wrong = step.routing(), step.batch(rank), []
    outcome: Any = None
    begin = time.monotonic()
    for layer in range(step.num_layers):
        hit = fault if fault is not None and fault.layer == layer else None
        if hit is not None and hit.point == "before_dispatch":
            os.kill(os.getpid(), hit.signal)
        if hit is not None and hit.point == "waiting":
            _die_waiting(dispatcher, batch, routing, StepPoint(step.epoch, step.step, layer), hit)
        if hit is not None and hit.point == "mid_dispatch":
            _arm(dispatcher, hit)
        begin = time.monotonic()
        handle = dispatcher.dispatch(batch.x, batch.topk_ids, batch.topk_weights, routing, StepPoint(step.epoch, step.step, layer))
        if not isinstance(handle, DispatchHandle):
            outcome = handle
            break
        if hit is not None and hit.point == "before_combine":
            os.kill(os.getpid(), hit.signal)
        if hit is not None and hit.point == "mid_combine":
            _arm(dispatcher, hit)
        y = run_experts(handle)
        begin = time.monotonic()
        out = dispatcher.combine(y, handle)
        if not isinstance(out, torch.Tensor):
            outcome = out
            break
        if not same_bits(out, expected(batch)):
            wrong.append(f"layer {layer}: sums differ")
    took_s = time.monotonic() - begin
    if isinstance(outcome, PeerFailed):
        _check_partial(step, rank, layer, outcome, outcome.partial, wrong)
        outcome = PeerFailed(dict(outcome.peers))
    names = ("bytes_sent", "bytes_received", "stale_frames", "refused_frames", "refused_handshakes")
    return Report(outcome, tuple(wrong), took_s, {name: getattr(dispatcher, name, 0) for name in names})


def _dispatcher(backend: str, rank: int, address: str, options: dict[str, Any]) -> Any:
    if backend != "cuda":
        return SocketDispatcher(rank, address, token=TOKEN, **options)
    options = {"num_seats": 4, "device": rank % torch.cuda.device_count(), **options}
    torch.cuda.set_device(options["device"])
    capacity = Capacity(options.pop("num_seats"), EXPERTS, 6, max_tokens=64, top_k=TOP_K, hidden=4096, itemsize=4, max_replicas=32)
    return CpuFront(rank, address, capacity, token=TOKEN, **options)


def rank_main(pipe: Connection, backend: str, rank: int, address: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    with _dispatcher(backend, rank, address, options) as dispatcher:
        pipe.send(dispatcher.address)
        while True:
            match pipe.recv():
                case ("connect", peers, deadline_s, epoch):
                    pipe.send(dispatcher.connect(peers, deadline_s, epoch=epoch))
                case ("steps", steps, fault):
                    pipe.send([run_step(dispatcher, rank, step, fault) for step in steps])
                case None:
                    return


@dataclass
class _Process:
    process: Any
    pipe: Connection | ObjectPipe
    address: str


class Ranks:
    """Rank processes, started and told what to do by the test. With an MPI `job`, its processes take the seats."""

    def __init__(self, backend: str, folder: Path, options: dict[str, Any], job: MpiJob | None = None):
        folder.mkdir()
        self.backend = backend
        self.folder = folder
        self.options = options
        self.job = job
        self.members: dict[int, _Process] = {}
        self.epoch = 0
        self.steps = 0
        self._started = 0

    def start(self, rank: int) -> None:
        """A new process in a seat."""
        self._started += 1
        if self.job is not None:
            taken = {member.pipe for member in self.members.values()}
            one = next(one for one in self.job.living() if one.pipe not in taken)
            self.members[rank] = _Process(one.process, one.pipe, "")
            self.tell(rank, "start", rank, self.options)
            self.members[rank].address = self.answer(rank)
            return
        address = "tcp:127.0.0.1:0" if self.backend == "tcp" else f"unix:{self.folder}/{self._started}"
        here, there = _context.Pipe()
        process = _context.Process(target=rank_main, args=(there, self.backend, rank, address, self.options), daemon=True)
        process.start()
        there.close()
        self.members[rank] = _Process(process, here, "")
        self.members[rank].address = self.answer(rank)

    def pid(self, rank: int) -> int:
        pid = self.members[rank].process.pid
        assert pid is not None
        return pid

    def tell(self, rank: int, *command: Any) -> None:
        self.members[rank].pipe.send(command)

    def answer(self, rank: int) -> Any:
        assert self.members[rank].pipe.poll(ANSWER_S), f"rank {rank} does not answer"
        answer = self.members[rank].pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def install(self, ranks: Iterable[int], deadline_s: float = 20.0) -> None:
        """The next epoch: connect exactly these."""
        self.epoch += 1
        ranks = list(ranks)
        peers = {r: self.members[r].address for r in ranks}
        for rank in ranks:
            self.tell(rank, "connect", peers, deadline_s, self.epoch)
        assert {r: self.answer(r) for r in ranks} == dict.fromkeys(ranks)

    def step(self, ranks: Iterable[int], **shape: Any) -> Step:
        """The next step of the current epoch."""
        self.steps += 1
        return Step(tuple(ranks), self.epoch, self.steps, **shape)

    def run(
        self, ranks: Iterable[int], num_steps: int = 1, faults: dict[int, Fault] | None = None, **shape: Any
    ) -> dict[int, list[Report]]:
        """Steps of the current epoch on these ranks, without waiting for those that have a fault. Returns the others' reports."""
        ranks, faults = tuple(ranks), faults or {}
        steps = [self.step(ranks, **shape) for _ in range(num_steps)]
        for rank in ranks:
            self.tell(rank, "steps", steps, faults.get(rank))
        return {r: self.answer(r) for r in ranks if r not in faults}

    def check_steps(self, ranks: Iterable[int], num_steps: int, **shape: Any) -> None:
        """Steps that must all end well."""
        for rank, reports in self.run(ranks, num_steps, **shape).items():
            assert [(r.outcome, r.wrong) for r in reports] == [(None, ())] * num_steps, f"rank {rank}"

    def wait_dead(self, rank: int) -> None:
        member = self.members.pop(rank)
        member.process.join(ANSWER_S)
        # mpirun is told how its child ended, we are not
        assert isinstance(member.process, MpiProcess) or member.process.exitcode == -signal.SIGKILL
        member.pipe.close()

    def close(self) -> None:
        if self.job is not None:
            return
        for member in self.members.values():
            member.process.kill()
        for member in self.members.values():
            member.process.join(ANSWER_S)
            member.pipe.close()
