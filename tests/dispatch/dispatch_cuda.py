"""The cuda backend behind CPU tensors, so that the suites written for the others run on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # streams of one process that wait for each other must not share a queue

import pytest
import torch

from elastic_ep.core.routing import RoutingTable
from elastic_ep.runtime.dispatch.base import DispatchHandle, StepPoint
from elastic_ep.runtime.dispatch.cuda.build import find_nvcc
from elastic_ep.runtime.dispatch.cuda.dispatcher import CudaDispatcher
from elastic_ep.runtime.dispatch.cuda.region import Capacity


def why_not() -> str | None:
    """Why the cuda backend cannot run here."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None if find_nvcc() else "nvcc is not installed"


needs_gpu = pytest.mark.skipif(why_not() is not None, reason=f"the cuda backend: {why_not()}")


class CpuFront:
    """A `CudaDispatcher` that takes and gives CPU tensors and runs on a stream of its own, as ranks in one process must."""

    def __init__(self, rank: int, address: str, capacity: Capacity, **options: Any):
        self.inner = CudaDispatcher(rank, address, capacity, **options)
        self._own_stream: Any = None

    address = property(lambda self: self.inner.address)

    @property
    def _stream(self) -> Any:
        if self._own_stream is None:
            self._own_stream = torch.cuda.Stream()
        return torch.cuda.stream(self._own_stream)

    def __enter__(self) -> CpuFront:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def listen(self) -> str:
        return self.inner.listen()

    def connect(self, peers: Mapping[int, str], deadline_s: float, *, epoch: int = 0) -> Any:
        with self._stream:
            return self.inner.connect(peers, deadline_s)

    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint) -> Any:
        with self._stream:
            handle = self.inner.dispatch(x.cuda(), topk_ids.cuda(), topk_weights.cuda(), routing, at)
            if isinstance(handle, DispatchHandle):
                return DispatchHandle(handle.rows.cpu(), handle.groups, handle)
            return handle

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> Any:
        with self._stream:
            out = self.inner.combine(y.cuda(), handle.state)
            return out.cpu() if isinstance(out, torch.Tensor) else out

    def close(self) -> None:
        self.inner.close()
