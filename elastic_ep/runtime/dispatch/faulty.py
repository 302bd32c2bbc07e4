"""A dispatcher with fault points around its calls, for a rank that has a fault plan; one that has none never meets this."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from elastic_ep.core.routing import RoutingTable
from elastic_ep.runtime.dispatch.base import DispatchHandle, Interrupted, MeshDispatcher, PeerFailed, StepPoint
from elastic_ep.runtime.faults import FaultPlan


class FaultyDispatcher:
    """`inner`, whatever its backend."""

    def __init__(self, inner: MeshDispatcher, faults: FaultPlan) -> None:
        self._inner = inner
        self._faults = faults

    def listen(self) -> str:
        return self._inner.listen()

    def connect(self, peers: Mapping[int, str], deadline_s: float, *, epoch: int = 0) -> PeerFailed | Interrupted | None:
        return self._inner.connect(peers, deadline_s, epoch=epoch)

    def dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint
    ) -> DispatchHandle | PeerFailed | Interrupted:
        self._faults.reach("dispatch_begin", step=at.step, layer=at.layer)
        handle = self._inner.dispatch(x, topk_ids, topk_weights, routing, at)
        self._faults.reach("dispatch_end", step=at.step, layer=at.layer)
        return handle

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> torch.Tensor | PeerFailed | Interrupted:
        self._faults.reach("combine_begin")
        out = self._inner.combine(y, handle)
        self._faults.reach("combine_end")
        return out

    def close(self) -> None:
        self._inner.close()
