"""A rank's dispatcher over one of the kernel-masked libraries, from what `elastic-ep serve` was told. The worker names `make_dispatcher` by
path, as it may not import what is above it."""

from __future__ import annotations

import socket
from typing import Any

from elastic_ep.integrations.kernel_masked import KernelMaskedDispatcher
from elastic_ep.integrations.mooncake import MooncakeDispatcher, parse_ib_devices
from elastic_ep.integrations.nixl import NixlDispatcher
from elastic_ep.integrations.packed import PackedCapacity


def make_dispatcher(
    backend: str,
    rank: int,
    capacity: dict[str, Any],
    *,
    store: str,
    gpu: int,
    ib_devices: str,
    timeout_s: float,
    interrupt: socket.socket,
    library: Any = None,
) -> KernelMaskedDispatcher:
    """The dispatcher of a rank. Nothing of the library is imported before `listen`.

    Args:
        backend: "mooncake" or "nixl"; capacity: the fields of `PackedCapacity`; store: where the ranks meet, "tcp:HOST:PORT".
        ib_devices: `--mooncake-ib-device` as given, "" for all.
        library: for tests: in place of the real one.

    Raises InvalidInputError for sizes that the library has no kernels for.
    """
    options: dict[str, Any] = {"device": f"cuda:{gpu}", "timeout_us": int(timeout_s * 1e6), "interrupt": interrupt, "library": library}
    sizes = PackedCapacity(**capacity)
    if backend == "nixl":
        return NixlDispatcher(rank, sizes, store, **options)
    devices = parse_ib_devices(ib_devices, gpu) if ib_devices else ()
    return MooncakeDispatcher(rank, sizes, store, ib_devices=devices, **options)
