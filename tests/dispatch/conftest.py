"""Backends under test, and rank processes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dispatch_cuda import CpuFront
from dispatch_processes import Ranks
from dispatch_world import TOKEN, World
from mpi_job import MpiJob, RemoteDispatcher

from elastic_ep.runtime.dispatch.cuda.region import Capacity
from elastic_ep.runtime.dispatch.local import LocalDispatcher
from elastic_ep.runtime.dispatch.socket import SocketDispatcher

MPI_DEATHS = 7


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for Unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="eep"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def mpi_job() -> Iterator[MpiJob]:
    """Four processes, and one more for each that some test kills."""
    path = Path(tempfile.mkdtemp(prefix="eep"))
    job = MpiJob(4 + MPI_DEATHS, path / "job")
    yield job
    job.close()
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def make_world(folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Callable[..., World]]:
    """make_world(backend, num_ranks, **options of the socket backend) -> a connected World, closed at the end.

    Backends: `local`; `unix` (rows in shared memory); `inline` (Unix, rows in the stream); `page` (Unix, one page of shared memory:
    only small batches fit); `numpy` (as `unix`, as if the extension had not been built); `tcp`; `mixed` (odd ranks listen on TCP);
    `cuda` (ranks on streams of one GPU).
    """
    worlds: list[World] = []

    def address(backend: str, rank: int) -> str:
        if backend == "tcp" or (backend == "mixed" and rank % 2):
            return "tcp:127.0.0.1:0"
        return f"unix:{folder}/w{len(worlds)}r{rank}"

    def make(backend: str, num_ranks: int, interrupts: dict[int, Any] | None = None, **options: Any) -> World:
        if backend == "numpy":
            for module in ("rows", "socket"):
                monkeypatch.setattr(f"elastic_ep.runtime.dispatch.{module}.compiled", None)
        if backend == "local":
            world = World({r: LocalDispatcher() for r in range(num_ranks)}, {0: "local"})
        elif backend == "mpi":
            job = request.getfixturevalue("mpi_job")
            remote = {r: RemoteDispatcher(one.pipe, r, options) for r, one in enumerate(job.living()[:num_ranks])}
            world = World(dict(remote), {r: d.address for r, d in remote.items()})
        elif backend == "cuda":
            capacity = Capacity(num_ranks, 600, 2, max_tokens=1024, top_k=8, hidden=1024, itemsize=4, max_replicas=32)
            fronts = {r: CpuFront(r, address(backend, r), capacity, token=TOKEN, **options) for r in range(num_ranks)}
            world = World(dict(fronts), {r: d.listen() for r, d in fronts.items()})
        else:
            options.setdefault("shared_bytes", {"inline": 0, "page": 4096}.get(backend, 1 << 28))
            ranks = {
                r: SocketDispatcher(r, address(backend, r), token=TOKEN, interrupt=(interrupts or {}).get(r), **options)
                for r in range(num_ranks)
            }
            world = World(dict(ranks), {r: d.listen() for r, d in ranks.items()})
        worlds.append(world)
        assert world.connect() == dict.fromkeys(world.ranks)
        return world

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def make_ranks(folder: Path) -> Iterator[Callable[..., Ranks]]:
    """make_ranks(backend, num_ranks, **options) -> connected rank processes; whatever is left of them is killed at the end."""
    made: list[Ranks] = []

    def make(backend: str, num_ranks: int, **options: Any) -> Ranks:
        if backend != "cuda":
            options.setdefault("shared_bytes", 0 if backend == "inline" else 1 << 28)
        ranks = Ranks(backend, folder / str(len(made)), options)
        made.append(ranks)
        for rank in range(num_ranks):
            ranks.start(rank)
        ranks.install(range(num_ranks))
        return ranks

    yield make
    for ranks in made:
        ranks.close()
