"""An MPI job for tests: `mpirun` with processes that wait for commands, any of which may take any seat of a mesh."""

from __future__ import annotations

import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import torch

from elastic_ep.core.routing import RoutingTable
from elastic_ep.runtime.dispatch.base import DispatchHandle, StepPoint

START_S = 30.0
_ENVIRONMENT = {
    # mpirun refuses to run as root, which containers of tests often do
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMP_NUM_THREADS": "1",
}
_MPIRUN = ("--with-ft", "ulfm", "--oversubscribe", "--bind-to", "none", "--mca", "pml", "ob1", "--mca", "btl", "self,sm,tcp")


class ObjectPipe:
    """Objects by plain pickle: a connection's own `send` would hand tensors over in memory that dies with a killed process."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self.poll, self.close = connection.poll, connection.close

    def send(self, value: Any) -> None:
        self._connection.send_bytes(pickle.dumps(value))

    def recv(self) -> Any:
        return pickle.loads(self._connection.recv_bytes())


class MpiProcess:
    """As much of `multiprocessing.Process` as the tests need, for a child of mpirun: by its pidfd, so nobody else is ever hit."""

    def __init__(self, pid: int):
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def kill(self) -> None:
        """If it has not ended."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def wake(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    def is_alive(self) -> bool:
        return not self._has_ended(0)

    def join(self, timeout_s: float) -> None:
        """Raises AssertionError if it still lives then."""
        assert self._has_ended(timeout_s), f"process {self.pid} of the MPI job still lives after {timeout_s} s"

    def _has_ended(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1e3))

    def close(self) -> None:
        os.close(self._pidfd)


@dataclass(frozen=True)
class Seatless:
    """A process of the job and the pipe to it."""

    process: MpiProcess
    pipe: ObjectPipe


class MpiJob:
    """A running job. `processes` by their place in it."""

    def __init__(self, num_processes: int, folder: Path):
        folder.mkdir()
        self.processes: dict[int, Seatless] = {}
        self._output = (folder / "output").open("w+b")
        address = str(folder / "pipe")
        mpirun = Path(sys.executable).with_name("mpirun")
        command = [mpirun if mpirun.exists() else shutil.which("mpirun") or "mpirun", *_MPIRUN, "-n", str(num_processes)]
        with Listener(address, "AF_UNIX", backlog=num_processes) as listener:
            self._mpirun = subprocess.Popen(
                [*command, sys.executable, Path(__file__).with_name("mpi_main.py"), address],
                env={**os.environ, **_ENVIRONMENT, "TMPDIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
            )
            try:
                for _ in range(num_processes):
                    self._accept(listener)
            except BaseException:
                self.close()
                raise

    def _accept(self, listener: Listener) -> None:
        # no public way to wait for a connection until a deadline
        ready = select.poll()
        ready.register(listener._listener._socket, select.POLLIN)  # type: ignore[attr-defined]
        assert ready.poll(START_S * 1e3), f"mpirun started {len(self.processes)} processes in {START_S} s: {self.output()}"
        pipe = ObjectPipe(listener.accept())
        place, pid = pipe.recv()
        self.processes[place] = Seatless(MpiProcess(pid), pipe)

    def output(self) -> str:
        """What mpirun and the processes have written."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def living(self) -> list[Seatless]:
        """Processes that have not ended, by place."""
        return [one for _, one in sorted(self.processes.items()) if one.process.is_alive()]

    def close(self) -> None:
        """Kill what still runs; mpirun ends when its last process has."""
        for one in self.processes.values():
            one.process.kill()
            one.pipe.close()
        try:
            self._mpirun.wait(10.0 if self.processes else 0.0)
        except subprocess.TimeoutExpired:
            self._mpirun.kill()
            self._mpirun.wait()
        for one in self.processes.values():
            one.process.close()
        self._output.close()


class RemoteDispatcher:
    """A `Dispatcher` that runs in a process of the job. One thread at a time may use it."""

    def __init__(self, pipe: ObjectPipe, rank: int, options: dict[str, Any]):
        self._pipe = pipe
        self.address: str = self._call("start", rank, options)

    def _call(self, *command: Any) -> Any:
        self._pipe.send(command)
        assert self._pipe.poll(START_S), f"no answer to {command[0]} in {START_S} s"
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def connect(self, peers: dict[int, str], deadline_s: float, *, epoch: int) -> Any:
        return self._call("connect", peers, deadline_s, epoch)

    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint) -> Any:
        return self._call("dispatch", x, topk_ids, topk_weights, routing, at)

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> Any:
        return self._call("combine", y, handle.state)

    def close(self) -> None:
        self._call("close")
