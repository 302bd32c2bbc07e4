"""Backends under test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dispatch_world import TOKEN, World

from elastic_ep.runtime.dispatch.local import LocalDispatcher
from elastic_ep.runtime.dispatch.socket import SocketDispatcher


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for Unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="eep"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def make_world(folder: Path) -> Iterator[Callable[..., World]]:
    """make_world(backend, num_ranks, **options of the socket backend) -> a connected World, closed at the end."""
    worlds: list[World] = []

    def make(backend: str, num_ranks: int, **options: Any) -> World:
        if backend == "local":
            world = World({r: LocalDispatcher() for r in range(num_ranks)}, {0: "local"})
        else:
            ranks = {
                r: SocketDispatcher(
                    r, f"unix:{folder}/w{len(worlds)}r{r}" if backend == "unix" else "tcp:127.0.0.1:0", token=TOKEN, **options
                )
                for r in range(num_ranks)
            }
            world = World(dict(ranks), {r: d.listen() for r, d in ranks.items()})
        worlds.append(world)
        assert world.connect() == dict.fromkeys(world.ranks)
        return world

    yield make
    for world in worlds:
        world.close()
