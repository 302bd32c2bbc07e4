"""The Mooncake dispatcher: Mooncake EP's `Buffer` with `active_ranks` and `timeout_us` behind this project's dispatch interface.

Extra `[mooncake]`. The library needs its own process group, whose coordinator lives on rank 0 (a TCPStore does not help): if rank 0
dies, the group ends, and every other rank fails over to nothing. That is the library's limit, and why this backend is not the default.

The seats are fixed: all ranks found the group together, later a process may take the seat of a dead one. What `Sums.KERNEL` gives was read
in the kernel's source (0.3.14, CUDA): a token's outputs are added in top-k order in float32 by fused multiply-adds, whatever rank they came
from. The library's collective fallback, which it takes without NVLink or RDMA between the ranks, adds in an order that depends on
the placement, and rounds to bfloat16 in between; it is refused.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.integrations.kernel_masked import KernelMaskedDispatcher, Packed
from elastic_ep.integrations.packed import PackedCapacity
from elastic_ep.runtime.dispatch.base import FailureKind

_NAP_S = 0.005
_FOUNDED = "elastic-ep/mooncake/founded"
_EP_DEVICES = "MOONCAKE_EP_DEVICE_FILTER"
"""the only way to tell the EP half of the library which devices to use"""


def parse_ib_devices(text: str, gpu: int = 0) -> tuple[str, ...]:
    """`--mooncake-ib-device`: names with commas between, or JSON that maps GPU numbers to such lists. Raises InvalidInputError.

    "mlx5_1,mlx5_2" is ("mlx5_1", "mlx5_2") for every GPU; '{"0": "mlx5_1", "1": "mlx5_2"}' is ("mlx5_2",) for GPU 1.
    """
    if text.lstrip().startswith("{"):
        try:
            of_gpu = {int(key): str(value) for key, value in json.loads(text).items()}
        except ValueError as error:
            raise InvalidInputError(f"--mooncake-ib-device is no JSON of GPU numbers and device names: {error}") from error
        if gpu not in of_gpu:
            raise InvalidInputError(f"--mooncake-ib-device names no device for GPU {gpu}, only for {sorted(of_gpu)}")
        text = of_gpu[gpu]
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise InvalidInputError(f"--mooncake-ib-device {text!r} has an empty name; give, for example, mlx5_1,mlx5_2")
    return names


class Mooncake:
    """The library: `Buffer`, `pg` (its process group, which some versions compile when it is first imported), and torch's groups."""

    def __init__(self) -> None:
        _import("mooncake.ep")  # comes before pg
        self.Buffer = _import("mooncake.mooncake_ep_buffer").Buffer
        dist = importlib.import_module("torch.distributed")
        self.init_process_group, self.destroy_process_group = dist.init_process_group, dist.destroy_process_group
        self.world = lambda: dist.group.WORLD

    @cached_property
    def pg(self) -> Any:
        return _import("mooncake.pg")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise InvalidInputError(f"the mooncake backend cannot load Mooncake EP: {error}; pip install 'elastic-ep[mooncake]'") from error


class MooncakeDispatcher(KernelMaskedDispatcher):
    """See `KernelMaskedDispatcher` for what is not said here.

    Args:
        ib_devices: RDMA devices to use (`parse_ib_devices`); all if empty.
        library: for tests: a `Mooncake`.

    Attributes:
        active_ranks: int32 [ep_size] on the device, 1 = alive: the mask that kernels read, and clear at a timeout. Always the same memory
            once connected; after a failed step, the epoch's mask without those who failed.
    """

    kind = "mooncake"
    HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
    MAX_TOP_K = 11

    def __init__(
        self, rank: int, capacity: PackedCapacity, store: Any, *, ib_devices: tuple[str, ...] = (), library: Any = None, **options: Any
    ):
        super().__init__(rank, capacity, store, **options)
        if capacity.ep_size > 256:
            raise InvalidInputError(f"mooncake has 256 connections for all ranks; ep_size is {capacity.ep_size}, give at most 256")
        self.ib_devices = ib_devices
        self.active_ranks = torch.zeros(0, dtype=torch.int32)
        self._library = library
        self._buffer: Any = None
        self._joins = False
        self._members: dict[int, str] = {}
        self._zero: torch.Tensor | None = None
        self._side: Any = None

    def _load(self) -> None:
        self._library = self._library or Mooncake()

    def connect(self, peers: Mapping[int, str], deadline_s: float, *, epoch: int = 0) -> Any:
        """See `KernelMaskedDispatcher.connect`. The founding epoch names all ranks."""
        self.listen()
        if self._buffer is None:
            # looked up before the first meeting: nobody can have founded the group we are a founder of
            self._joins = self.store.check([_FOUNDED])
        return super().connect(peers, deadline_s, epoch=epoch)

    def _enrol(self, others: Mapping[int, str], deadline: float) -> dict[int, FailureKind]:
        if self._buffer is None:
            self._found(others)
            if not self._joins:
                self._members = dict(others)
                return {}
        if self.capacity.ep_size == 1:
            return {}
        pg, group = self._library.pg, self._library.world
        if self._joins:
            if self._meet("left", others, deadline) is not None:  # who joins earlier is thrown out with the seat's old process
                return dict.fromkeys(others, FailureKind.DEADLINE)
            self._joins = False
            pg.join_group(group())
        else:
            gone = sorted(r for r, address in self._members.items() if others.get(r) != address)
            came = sorted(r for r, address in others.items() if self._members.get(r) != address)
            if gone:
                pg.deactivate_ranks(group(), gone)
            self._members = {r: a for r, a in self._members.items() if r not in gone}
            if came and self._meet("left", others, deadline) is not None:
                # a late proposal that a seat's old process is gone would throw out its new one
                return dict.fromkeys(others, FailureKind.DEADLINE)
            if came:
                while not all(ready := list(pg.get_peer_state(group(), came))):
                    if time.monotonic() >= deadline:
                        return {r: FailureKind.DEADLINE for r, is_ready in zip(came, ready, strict=True) if not is_ready}
                    time.sleep(_NAP_S)
                pg.recover_ranks(group(), came)
            if not gone and not came:
                return {}
        self._buffer.update_ep_member()
        self._members = dict(others)
        self._refuse_fallback()
        return {}

    def _found(self, others: Mapping[int, str]) -> None:
        """Enter the process group, and make the buffer."""
        size = self.capacity.ep_size
        if not self._joins and len(others) + 1 < size:
            raise InvalidInputError(f"mooncake is founded with all {size} ranks, got {sorted([self.rank, *others])}; wait for the others")
        library, limit = self._library, self.capacity
        if self.ib_devices:
            os.environ[_EP_DEVICES] = ",".join(self.ib_devices)
        if size == 1:
            # nobody to meet: any group does
            library.init_process_group(backend="gloo", store=self.store, rank=0, world_size=1)
        else:
            if self.ib_devices:
                library.pg.set_device_filter(list(self.ib_devices))
            options = library.pg.MooncakeBackendOptions(size, self._joins)
            library.init_process_group(backend="mooncake", store=self.store, rank=self.rank, world_size=size, pg_options=options)
        num_bytes = library.Buffer.get_ep_buffer_size_hint(limit.messages, limit.hidden, size, limit.num_experts)
        self._buffer = library.Buffer(library.world(), num_bytes)
        self._refuse_fallback()
        self.active_ranks = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._zero = torch.zeros(1, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        if self.device.type == "cuda":
            self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.store.set(_FOUNDED, "yes")

    def _refuse_fallback(self) -> None:
        if getattr(self._buffer, "_use_fallback", False):
            raise InvalidInputError(
                "Mooncake EP has neither NVLink nor RDMA between all ranks and would use collectives, whose sums depend on where experts "
                "live; name the devices (--mooncake-ib-device), or use the socket backend"
            )

    def _install(self, mask: NDArray[np.int32]) -> None:
        self.active_ranks.copy_(torch.from_numpy(mask))

    def _observed(self) -> NDArray[np.int32]:
        mask: NDArray[np.int32] = self.active_ranks.cpu().numpy()
        return mask

    def _release(self, ranks: Iterable[int]) -> None:
        """A waiting kernel looks at `active_ranks`; a copy gets there by itself, a kernel might wait for a free multiprocessor."""
        zero = self._zero
        if zero is None:
            return
        for rank in ranks:
            if self._side is None:
                self.active_ranks[rank : rank + 1].copy_(zero)
            else:
                with torch.cuda.stream(self._side):
                    self.active_ranks[rank : rank + 1].copy_(zero, non_blocking=True)

    def _run_dispatch(self, x: torch.Tensor, physical: torch.Tensor) -> Packed:
        limit = self.capacity
        rows, _, handle, _, _ = self._buffer.dispatch(
            x, physical, self.active_ranks, limit.messages, limit.num_experts, self.timeout_us, use_fp8=False
        )
        return Packed(rows, handle[1], handle[0], handle)

    def _run_combine(self, outputs: torch.Tensor, physical: torch.Tensor, weights: torch.Tensor, packed: Packed) -> torch.Tensor:
        combined: torch.Tensor
        combined, _, _ = self._buffer.combine(outputs, physical, weights, self.active_ranks, self.timeout_us, packed.handle)
        return combined

    def _destroy(self) -> None:
        if self._buffer is not None:
            self._buffer = None
            self._library.destroy_process_group()
