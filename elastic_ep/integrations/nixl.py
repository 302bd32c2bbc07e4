"""NIXL EP behind this project's dispatch interface: ranks are connected and disconnected one by one, and no rank is special.

Extra `[nixl]`. The library's mask is the other way round (1 = masked; an unconnected rank shows as -1): it is turned here and nowhere else.

What `Sums.KERNEL` gives was read in the kernel's source: a token's outputs are added in top-k order in float32 by fused multiply-adds,
whatever rank they came from. A waiting kernel does not look at the mask, so neither `cut` nor an interrupt ends a wait before its timeout;
they only make the call say so when it returns.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.integrations.kernel_masked import KernelMaskedDispatcher, Packed
from elastic_ep.integrations.packed import PackedCapacity
from elastic_ep.integrations.rendezvous import PeerStore
from elastic_ep.runtime.dispatch.base import FailureKind


def load_nixl_ep() -> Any:
    """The module `nixl_ep`. Raises InvalidInputError."""
    try:
        return importlib.import_module("nixl_ep")
    except (ImportError, OSError) as error:
        raise InvalidInputError(f"the nixl backend cannot load NIXL EP: {error}; pip install 'elastic-ep[nixl]'") from error


class NixlDispatcher(KernelMaskedDispatcher):
    """See `KernelMaskedDispatcher` for what is not said here. The library counts its timeout in ms: `timeout_us` is rounded up.

    Args:
        library: for tests: the module `nixl_ep`.
    """

    kind = "nixl"
    HIDDEN = (2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192)
    MAX_TOP_K = 16

    def __init__(self, rank: int, capacity: PackedCapacity, store: Any, *, library: Any = None, **options: Any):
        super().__init__(rank, capacity, store, **options)
        if capacity.ep_size >= 8 and capacity.ep_size % 8:
            raise InvalidInputError(f"nixl takes fewer than 8 ranks or a multiple of 8; ep_size is {capacity.ep_size}, leave seats empty")
        self._library = library
        self._buffer: Any = None
        self._metadata: PeerStore | None = None
        self._connected: dict[int, str] = {}

    def _load(self) -> None:
        self._library = self._library or load_nixl_ep()

    def _enrol(self, others: Mapping[int, str], deadline: float) -> dict[int, FailureKind]:
        if self._buffer is None:
            self._allocate()
        assert self._metadata is not None
        gone = sorted(r for r, address in self._connected.items() if others.get(r) != address)
        if gone:
            self._buffer.disconnect_ranks(gone)
            self._connected = {r: a for r, a in self._connected.items() if r not in gone}
        new = sorted(r for r in others if r not in self._connected)
        if new:
            self._metadata.expect(others, deadline)
            try:
                self._buffer.connect_ranks(new)
            except TimeoutError:
                # they met us a moment ago, so which of them died is not known: the next epoch tells
                return dict.fromkeys(new, FailureKind.DEADLINE)
            self._connected.update((r, others[r]) for r in new)
        return {}

    def _allocate(self) -> None:
        limit = self.capacity
        self._metadata = PeerStore(self.store, self.rank, self.address)
        self._buffer = self._library.Buffer(
            rank=self.rank, explicitly_destroy=True, tcp_store_group=self._metadata, timeout_ms=-(-self.timeout_us // 1000)
        )
        num_bytes = self._library.Buffer.get_rdma_size_hint(limit.messages, limit.hidden, limit.ep_size, limit.num_experts)
        self._buffer.update_memory_buffers(limit.ep_size, limit.experts_per_rank, num_bytes)

    def _install(self, mask: NDArray[np.int32]) -> None:
        for rank in self._connected:
            self._buffer.update_mask_buffer(rank, not mask[rank])

    def _observed(self) -> NDArray[np.int32]:
        masked = torch.empty(self.capacity.ep_size, dtype=torch.int32, device=self.device)
        self._buffer.query_mask_buffer(masked)
        alive: NDArray[np.int32] = (masked.cpu().numpy() == 0).astype(np.int32)
        return alive

    def _release(self, ranks: Iterable[int]) -> None:
        """Nothing ends a wait of these kernels but its timeout."""

    def _run_dispatch(self, x: torch.Tensor, physical: torch.Tensor) -> Packed:
        limit = self.capacity
        rows, _, handle, _, _ = self._buffer.dispatch(
            x, physical.to(self._library.topk_idx_t), limit.messages, limit.num_experts, use_fp8=False
        )
        return Packed(rows, handle[1], handle[0], handle)

    def _run_combine(self, outputs: torch.Tensor, physical: torch.Tensor, weights: torch.Tensor, packed: Packed) -> torch.Tensor:
        combined: torch.Tensor
        combined, _, _ = self._buffer.combine(outputs, physical.to(self._library.topk_idx_t), weights, packed.handle)
        return combined

    def _destroy(self) -> None:
        if self._buffer is not None:
            self._buffer.destroy()
            self._buffer = None
