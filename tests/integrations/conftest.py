"""Worlds of kernel-masked backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.integrations.worlds import KernelWorld


@pytest.fixture
def make_kernel_world() -> Iterator[Callable[..., KernelWorld]]:
    """make_kernel_world(backend, ep_size, **options) -> a world whose ranks are yet to be started."""
    worlds: list[KernelWorld] = []

    def make(*args: Any, **options: Any) -> KernelWorld:
        worlds.append(KernelWorld(*args, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
