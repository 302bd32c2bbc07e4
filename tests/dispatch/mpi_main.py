"""One process of an MPI job that a test started: it does what comes through its pipe. Argument: where the pipes are to be had."""

from __future__ import annotations

import os
import pickle
import sys
from multiprocessing.connection import Client, Connection
from typing import Any

import mpi4py

# as `load_mpi` does, without torch: a spare that no test uses need not load it
mpi4py.rc.finalize = False
from mpi4py import MPI  # noqa: E402


class Server:
    """A dispatcher and what it is asked to do. A handle stays here; the test gets its id in place of the state."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe
        self.dispatcher: Any = None
        self.run_step: Any = None
        self.handles: dict[int, Any] = {}

    def start(self, rank: int, options: dict[str, Any]) -> str:
        # all that a step needs is loaded before this process has a seat, so that it is not late to its first exchange
        from dispatch_processes import run_step

        from elastic_ep.runtime.dispatch.mpi import MpiDispatcher

        self.run_step = run_step
        if options.pop("interruptible", False):
            options["interrupt"] = self.pipe.fileno()
        if self.dispatcher is not None:
            self.dispatcher.close()
        self.dispatcher, self.handles = MpiDispatcher(rank, **options), {}
        return self.dispatcher.listen()

    def connect(self, peers: dict[int, str], deadline_s: float, epoch: int) -> Any:
        return self.dispatcher.connect(peers, deadline_s, epoch=epoch)

    def steps(self, steps: list[Any], fault: Any) -> list[Any]:
        return [self.run_step(self.dispatcher, self.dispatcher.rank, step, fault) for step in steps]

    def dispatch(self, *args: Any) -> Any:
        from elastic_ep.runtime.dispatch.base import DispatchHandle

        answer = self.dispatcher.dispatch(*args)
        if not isinstance(answer, DispatchHandle):
            return answer
        self.handles[id(answer)] = answer
        return DispatchHandle(answer.rows, answer.groups, id(answer))

    def combine(self, y: Any, handle_id: int) -> Any:
        return self.dispatcher.combine(y, self.handles[handle_id])

    def close(self) -> None:
        self.dispatcher.close()


def serve(pipe: Connection) -> None:
    server = Server(pipe)
    while True:
        command, *args = pickle.loads(pipe.recv_bytes())
        if command is None:
            return
        try:
            answer = getattr(server, command)(*args)
        except Exception as error:
            answer = error
        pipe.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    with Client(sys.argv[1], "AF_UNIX") as own_pipe:
        own_pipe.send_bytes(pickle.dumps((MPI.COMM_WORLD.rank, os.getpid())))
        try:
            serve(own_pipe)
        except (EOFError, ConnectionError):
            pass
