"""Ranks of a kernel-masked backend in one process: adapters over fakes, a store, a stream for each."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from torch.distributed import HashStore

from elastic_ep.integrations.kernel_masked import KernelMaskedDispatcher
from elastic_ep.integrations.mooncake import MooncakeDispatcher
from elastic_ep.integrations.nixl import NixlDispatcher
from elastic_ep.integrations.packed import PackedCapacity, Sums
from tests.dispatch.dispatch_world import run_ranks
from tests.integrations.fake_fabric import Memory, Stream
from tests.integrations.fake_mooncake import Cluster, FakeMooncake
from tests.integrations.fake_nixl import FakeNixl

CONNECT_S = 5.0
SUMS = {"mooncake": Sums.KERNEL, "mooncake-own": Sums.OWN, "nixl": Sums.KERNEL, "nixl-own": Sums.OWN}
BACKENDS = tuple(SUMS)


class KernelWorld:
    """Processes by number; the rank of each is given when it starts, so that a newcomer can take a dead one's seat."""

    def __init__(self, backend: str, ep_size: int, seed: int = 0, timeout_us: int = 5_000_000, **capacity: Any):
        sizes = {"experts_per_rank": 8, "max_tokens": 8, "top_k": 4, "hidden": 2048, **capacity}
        self.backend = backend
        self.capacity = PackedCapacity(ep_size, sums=SUMS[backend], **sizes)
        self.store = HashStore()
        self.timeout_us = timeout_us
        self.cluster = Cluster(ep_size, seed)
        self.fabric = self.cluster.fabric
        self.memories: dict[bytes, Memory] = {}
        self.ranks: dict[int, KernelMaskedDispatcher] = {}
        self.libraries: dict[int, Any] = {}
        self.interrupts: dict[int, socket.socket] = {}
        self._streams: list[Stream] = []
        self._sockets: list[socket.socket] = []

    def start(self, rank: int, **more: Any) -> KernelMaskedDispatcher:
        """A new process takes the seat. Whatever was there is forgotten, not stopped."""
        stream = Stream()
        ours, theirs = socket.socketpair()
        self._streams.append(stream)
        self._sockets += [ours, theirs]
        self.interrupts[rank] = theirs
        options = {"device": "cpu", "timeout_us": self.timeout_us, "interrupt": ours, "stream": lambda: stream, **more}
        if self.backend.startswith("mooncake"):
            library: Any = FakeMooncake(self.cluster, stream)
            made: KernelMaskedDispatcher = MooncakeDispatcher(rank, self.capacity, self.store, library=library, **options)
        else:
            library = FakeNixl(self.fabric, stream, self.memories)
            made = NixlDispatcher(rank, self.capacity, self.store, library=library, **options)
        made.listen()
        self.ranks[rank], self.libraries[rank] = made, library
        return made

    def run(self, bodies: dict[int, Callable[[], Any]]) -> dict[int, Any]:
        """Run one callable per rank at the same time. Until its own returns, a rank is not late, however slow this machine is."""
        with self.fabric.changed:
            self.fabric.busy |= bodies.keys()

        def call(rank: int, body: Callable[[], Any]) -> Any:
            try:
                return body()
            finally:
                with self.fabric.changed:
                    self.fabric.busy.discard(rank)
                    self.fabric.changed.notify_all()

        return run_ranks({rank: lambda rank=rank, body=body: call(rank, body) for rank, body in bodies.items()})

    def peers(self, *ranks: int) -> dict[int, str]:
        return {r: self.ranks[r].address for r in ranks}

    def close(self) -> None:
        for made in self.ranks.values():
            made.close()
        for stream in self._streams:
            stream.close()
        for sock in self._sockets:
            sock.close()
