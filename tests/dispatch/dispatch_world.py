"""Several ranks in one process, each on its own thread: for what needs no death."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from elastic_ep.runtime.dispatch.base import Dispatcher

CONNECT_S = 20.0
TOKEN = "a run's token"


def run_ranks(bodies: dict[int, Callable[[], Any]], timeout_s: float = 60.0) -> dict[int, Any]:
    """Run one callable per rank at the same time, each on its own thread. Returns their results; the first exception is raised here."""
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def call(rank: int, body: Callable[[], Any]) -> None:
        try:
            results[rank] = body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=item, daemon=True) for item in bodies.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), f"ranks {sorted(set(bodies) - set(results))} still run after {timeout_s} s"
    return results


class World:
    """Dispatchers of one kind, connected to each other."""

    def __init__(self, dispatchers: dict[int, Dispatcher], addresses: dict[int, str]):
        self.dispatchers = dispatchers
        self.addresses = addresses
        self.epoch = 0

    @property
    def ranks(self) -> list[int]:
        return sorted(self.dispatchers)

    def connect(self) -> dict[int, Any]:
        self.epoch += 1
        peers = {r: self.addresses[r] for r in self.dispatchers}
        return run_ranks({r: lambda d=d: d.connect(peers, CONNECT_S, epoch=self.epoch) for r, d in self.dispatchers.items()})

    def close(self) -> None:
        for dispatcher in self.dispatchers.values():
            dispatcher.close()
