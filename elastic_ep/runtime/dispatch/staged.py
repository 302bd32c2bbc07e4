"""Ranks on GPUs behind a backend that moves host memory: rows go through pinned buffers. For GPUs that share no memory, and for several
ranks on one GPU, where kernels that wait for each other would take turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from elastic_ep.core.routing import RoutingTable
from elastic_ep.runtime.dispatch.base import Dispatcher, DispatchHandle, Interrupted, MeshDispatcher, PeerFailed, StepPoint


@dataclass(frozen=True)
class StagedBatch:
    """Like `DeviceBatch` of the cuda backend, with as many rows as came. `inner` is the host backend's handle."""

    rows: torch.Tensor
    outputs: torch.Tensor
    offsets: torch.Tensor
    inner: DispatchHandle


class StagedDispatcher:
    """A `MeshDispatcher` of device tensors over one of host tensors. Not thread-safe; all calls on one stream."""

    def __init__(self, inner: MeshDispatcher | Dispatcher, device: torch.device):
        self._inner = inner
        self._device = device
        self._pinned: dict[str, torch.Tensor] = {}

    def listen(self) -> str:
        """See `MeshDispatcher.listen`."""
        return self._inner.listen()  # type: ignore[union-attr]

    def connect(self, peers: Mapping[int, str], deadline_s: float, *, epoch: int = 0) -> PeerFailed | Interrupted | None:
        """See `Dispatcher.connect`."""
        return self._inner.connect(peers, deadline_s, epoch=epoch)

    def close(self) -> None:
        self._inner.close()

    def dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint
    ) -> DispatchHandle | PeerFailed | Interrupted:
        """See `Dispatcher.dispatch`; all tensors on the device. Waits for the device if there are tokens."""
        host = [self._to_host(name, t) for name, t in (("x", x), ("ids", topk_ids), ("weights", topk_weights))]
        if len(x):
            torch.cuda.current_stream(self._device).synchronize()
        handle = self._inner.dispatch(host[0], host[1], host[2], routing, at)
        if not isinstance(handle, DispatchHandle):
            return handle
        counts = np.zeros(routing.replica_rank.shape[1] + 1, dtype=np.int32)
        for expert, begin, end in handle.groups:
            counts[expert + 1] = end - begin
        rows = self._to_device("rows", handle.rows)
        offsets = self._to_device("offsets", torch.from_numpy(counts.cumsum(dtype=np.int32)))
        return DispatchHandle(rows, handle.groups, StagedBatch(rows, torch.empty_like(rows), offsets, handle))

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> torch.Tensor | PeerFailed | Interrupted:
        """See `Dispatcher.combine`. Waits for the device if rows came."""
        host = self._to_host("y", y)
        if len(y):
            torch.cuda.current_stream(self._device).synchronize()
        out = self._inner.combine(host, handle.state.inner)
        return self._to_device("out", out) if isinstance(out, torch.Tensor) else out

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Pinned memory of that shape; what was there before is gone, and no copy from it may be under way."""
        num_bytes = like.numel() * like.element_size()
        memory = self._pinned.get(name)
        if memory is None or len(memory) < num_bytes:
            memory = self._pinned[name] = torch.empty(max(4096, 2 * num_bytes), dtype=torch.uint8, pin_memory=True)
        return memory[:num_bytes].view(like.dtype).view(like.shape)

    def _to_host(self, name: str, source: torch.Tensor) -> torch.Tensor:
        target = self._buffer(name, source)
        return target.copy_(source, non_blocking=True)

    def _to_device(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """Every buffer is used once between two waits of this rank for its device, but for a rank without tokens and rows."""
        return self._buffer(name, source).copy_(source).to(self._device, non_blocking=True)
