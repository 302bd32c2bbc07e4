"""NIXL EP (1.5.1) as the module `nixl_ep` shows it, for threads: connections one by one, a mask of 1 for masked, -1 for never connected."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

from tests.integrations.fake_fabric import Fabric, Kernels, Memory, Shape, Stream, check_batch, check_combine, garbage, require

MAX_TOP_K = 16


class FakeNixl:
    """One process's module."""

    topk_idx_t = torch.int64

    def __init__(self, fabric: Fabric, stream: Stream, memories: dict[bytes, Memory]):
        self.fabric, self.stream, self.memories = fabric, stream, memories
        self.buffers: list[FakeBuffer] = []

        def make_buffer(**options: Any) -> FakeBuffer:
            self.buffers.append(FakeBuffer(self, **options))
            return self.buffers[-1]

        make_buffer.get_rdma_size_hint = size_hint  # type: ignore[attr-defined]
        self.Buffer = make_buffer


def size_hint(messages: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    require(num_ranks * messages % 4 == 0, f"{num_ranks} x {messages} tokens are no multiple of 4")
    return -(-4 * num_experts * (8 + messages * (16 + 2 * hidden)) // 128) * 128


class FakeBuffer:
    def __init__(self, library: FakeNixl, *, rank: int, explicitly_destroy: bool, tcp_store_group: Any, timeout_ms: int):
        require(timeout_ms > 0, f"timeout_ms {timeout_ms}")
        self._library, self.rank, self._store, self._timeout_s = library, rank, tcp_store_group, timeout_ms / 1e3
        self._explicit = explicitly_destroy
        self._memory: Memory | None = None
        self._connected: dict[int, Memory] = {}
        self._open: tuple[Any, ...] | None = None
        self.destroyed = False

    def update_memory_buffers(self, num_ranks: int, num_experts_per_rank: int, num_rdma_bytes: int) -> None:
        require(self._memory is None, "update_memory_buffers is called once")
        require(num_ranks < 8 or num_ranks % 8 == 0, f"{num_ranks} ranks")
        require(num_rdma_bytes % 128 == 0, f"{num_rdma_bytes} bytes are not aligned")
        self._num_ranks, self._per_rank, self._num_bytes = num_ranks, num_experts_per_rank, num_rdma_bytes
        self._memory = Memory(self.rank, num_ranks * num_experts_per_rank)
        self.mask = torch.full((num_ranks,), -1, dtype=torch.int32)
        self.mask[self.rank] = 0

    def connect_ranks(self, remote_ranks: list[int]) -> None:
        assert self._memory is not None
        require(remote_ranks and all(0 <= r < self._num_ranks and r != self.rank for r in remote_ranks), f"connect_ranks({remote_ranks})")
        require(not set(remote_ranks) & set(self._connected), f"{remote_ranks} are connected already: disconnect_ranks first")
        require(self._library.stream.query(), "connecting while kernels run")
        own = f"NIXL_EP/{self.rank}"
        described = f"memory {id(self._memory)}".encode()
        self._library.memories[described] = self._memory
        self._store.set(own, described)
        keys = [f"NIXL_EP/{r}" for r in remote_ranks]
        self._store.wait(keys, timedelta(seconds=300))
        found = [self._library.memories[bytes(d)] for d in self._store.multi_get(keys)]
        self._store.delete_key(own)
        for rank, memory in zip(remote_ranks, found, strict=True):
            require(memory.rank == rank, f"rank {rank} is described as rank {memory.rank}")
            self._connected[rank] = memory
            self.mask[rank] = 0

    def disconnect_ranks(self, remote_ranks: list[int]) -> None:
        require(remote_ranks and set(remote_ranks) <= set(self._connected), f"disconnect_ranks({remote_ranks})")
        for rank in remote_ranks:
            del self._connected[rank]
            self.mask[rank] = 1

    def update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        require(not (rank_to_mask == self.rank and mask), "the local rank cannot be masked")
        require(mask or rank_to_mask in self._connected or rank_to_mask == self.rank, f"rank {rank_to_mask} is not connected")
        self.mask[rank_to_mask] = int(mask)

    def query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        require(mask_status.dtype == torch.int32 and mask_status.shape == self.mask.shape, f"mask_status {mask_status.shape}")
        mask_status.copy_(self.mask)

    def destroy(self) -> None:
        require(self._explicit and not self.destroyed, "destroy is called once, after explicitly_destroy=True")
        self.destroyed = True

    def _kernels(self) -> Kernels:
        assert self._memory is not None

        def drop(rank: int) -> None:
            self.mask[rank] = 1

        return Kernels(
            self._library.fabric, self._memory, dict(self._connected), lambda r: self.mask[r] == 0, drop, self._timeout_s, heeds=False
        )

    def dispatch(
        self, x: torch.Tensor, topk_idx: torch.Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int, use_fp8: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...], None, None]:
        require(not use_fp8, "the fake has bfloat16 only")
        require(self._open is None, "the combine of the last dispatch is missing: the halves are out of step")
        check_batch(x, topk_idx, FakeNixl.topk_idx_t, num_max_dispatch_tokens_per_rank, num_experts, MAX_TOP_K)
        require(num_experts == self._num_ranks * self._per_rank, f"{num_experts} experts; the layout must be alike on all ranks")
        require(self._num_ranks * num_max_dispatch_tokens_per_rank % 4 == 0, "bulk copies take a multiple of 4 tokens")
        shape = Shape(num_max_dispatch_tokens_per_rank, x.size(1), num_experts, self._num_ranks)
        require(size_hint(shape.messages, shape.hidden, shape.num_ranks, num_experts) <= self._num_bytes, "the buffer is too small")
        self._library.fabric.agree(shape)
        named = topk_idx[topk_idx >= 0] // shape.per_rank
        connected = {self.rank, *self._connected}
        require(set(named.tolist()) <= connected, f"experts of ranks {sorted(set(named.tolist()))}, connected {connected}")
        rows, sent_as, layout, count = garbage(shape)
        self._open = (sent_as, layout, shape.messages, shape.hidden)
        kernels = self._kernels()
        self._library.stream.enqueue(lambda: kernels.dispatch(shape, x, topk_idx, rows, sent_as, layout, count))
        return rows, count, self._open, None, None

    def combine(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, handle: tuple[Any, ...]
    ) -> tuple[torch.Tensor, None, None]:
        require(handle is self._open, "combine takes the handle of the last dispatch")
        self._open = None
        shape = self._library.fabric.shape
        assert shape is not None
        check_combine(x, topk_idx, topk_weights, shape)
        out = torch.full((len(topk_weights), shape.hidden), float("nan"), dtype=torch.bfloat16)
        kernels = self._kernels()
        self._library.stream.enqueue(lambda: kernels.combine(shape, x, topk_idx, topk_weights, handle, out))
        return out, None, None
