"""What one step costs the controller: its real shell and brain, with ranks that answer at once (no model; several to a process).

Prints, per number of ranks, the controller's CPU time per step and the wall time of a step (stub processes share the machine's cores).
`--json` prints one object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import selectors
import socket
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import uvloop

from elastic_ep.brain.events import GenerationRequest
from elastic_ep.brain.messages import DenseLoaded, Hello, SamplingParams
from elastic_ep.runtime.control.address import connect
from elastic_ep.runtime.control.wire import MessageBuffer, encode
from elastic_ep.serving.config import ServeConfig
from elastic_ep.serving.controller import Controller

sys.path.insert(0, str(Path(__file__).parent))
from stub_ranks import answer, spec

AIMS_MS = {4: 0.3, 16: 0.6, 64: 2.0, 320: 8.0}
SEQUENCES_PER_RANK = 4
WARM_STEPS, STEPS = 20, 200


def stubs(address: str, token: str, ranks: range) -> None:
    """One process that is many ranks."""
    selector = selectors.DefaultSelector()
    for rank in ranks:
        sock = connect(address, 10.0)
        sock.sendall(encode(Hello(rank, 0, os.getpid(), "stub", token, f"unix:/stub{rank}")) + encode(DenseLoaded(0, 0.0)))
        selector.register(sock, selectors.EVENT_READ, MessageBuffer())
    while selector.get_map():
        for key, _ in selector.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            try:
                data = sock.recv(1 << 20)
            except ConnectionResetError:
                data = b""
            for message in key.data.feed(data):
                reply = answer(message)
                if reply is not None:
                    sock.sendall(encode(reply))
            if not data:
                selector.unregister(sock)
                sock.close()


class StubController(Controller):
    """The controller, with stub ranks in place of processes it launched."""

    def _start_ranks(self) -> None:
        processes = min(4, self.config.ep_size)
        cuts = [self.config.ep_size * i // processes for i in range(processes + 1)]
        spawn = multiprocessing.get_context("spawn")
        self.stubs = [spawn.Process(target=stubs, args=(self._local.control, self._token, range(a, b))) for a, b in pairwise(cuts)]
        for process in self.stubs:
            process.start()


async def measure(ep_size: int, detect: bool) -> dict[str, float]:
    config = ServeConfig("stub", ep_size, kv_tokens=1 << 20, detect=detect, restart="never")
    async with StubController(config, spec(max(8, ep_size))) as controller:
        await controller.wait_serving()

        async def consume(i: int) -> None:
            prompt = tuple(range(8))
            async for _ in controller.submit(GenerationRequest(f"r{i}", prompt, 1 << 19, SamplingParams(temperature=0.0))):
                pass

        tasks = [asyncio.create_task(consume(i)) for i in range(SEQUENCES_PER_RANK * ep_size)]
        state = controller.brain.state
        await until(state, WARM_STEPS)
        cpu, wall, first = cpu_s(), time.perf_counter(), state.steps_run
        await until(state, first + STEPS)
        steps = state.steps_run - first
        result = {"ranks": ep_size, "cpu_ms": (cpu_s() - cpu) / steps * 1e3, "wall_ms": (time.perf_counter() - wall) / steps * 1e3}
        for task in tasks:
            task.cancel()
        controller.stopped.set()
    for process in controller.stubs:
        process.join(10)
    return result


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def until(state: Any, step: int) -> None:
    while state.steps_run < step:
        await asyncio.sleep(0.002)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [uvloop.run(measure(ep_size, True)) for ep_size in AIMS_MS]
    if args.json:
        print(json.dumps(rows))
        return
    print(f"controller, {SEQUENCES_PER_RANK} decoding sequences per rank, {STEPS} steps")
    print(f"{'ranks':>6} {'CPU ms/step':>12} {'aim':>6} {'wall ms/step':>13}")
    for row in rows:
        print(f"{row['ranks']:6.0f} {row['cpu_ms']:12.2f} {AIMS_MS[int(row['ranks'])]:6.1f} {row['wall_ms']:13.2f}")


if __name__ == "__main__":
    main()
