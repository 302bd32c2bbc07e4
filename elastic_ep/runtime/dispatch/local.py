"""One process, no I/O: the backend for ep_size 1, and the oracle that the conformance suite holds the others to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.runtime.dispatch.base import DispatchHandle, StepPoint
from elastic_ep.runtime.dispatch.checks import check_combine, check_dispatch, checked_ids
from elastic_ep.runtime.dispatch.grouping import BadPairsError, plan_arrival, plan_departure
from elastic_ep.runtime.dispatch.rows import RowBuffer, as_array, gather, weighted_sum


@dataclass(frozen=True, slots=True)
class _LocalState:
    back: NDArray[np.int32]
    position: NDArray[np.int32]
    weights: torch.Tensor


class LocalDispatcher:
    """Rank 0 of 1. Rows never leave the process; nothing can fail."""

    def __init__(self) -> None:
        self._buffer = RowBuffer()
        self._routing: RoutingTable | None = None
        self._served: list[NDArray[np.bool_]] = []

    def connect(self, peers: Mapping[int, str], deadline_s: float, *, epoch: int = 0) -> None:
        """There is nobody to dial. Raises InvalidInputError if `peers` names anyone but rank 0."""
        if set(peers) - {0}:
            raise InvalidInputError(f"the local backend is rank 0 of 1, asked to connect ranks {sorted(peers)}; use the socket backend")

    def dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint
    ) -> DispatchHandle:
        """See `Dispatcher.dispatch`."""
        check_dispatch(x, topk_ids, topk_weights, routing, at)
        served = self._served_by(routing)[at.layer]
        ids = checked_ids(topk_ids, len(served))
        departure = plan_departure(ids, np.zeros(ids.shape, dtype=np.int32), 1)
        try:
            arrival = plan_arrival([departure.pairs], [len(x)], served)
        except BadPairsError:
            missing = sorted(set(ids[~served[ids]].tolist()))
            raise InvalidInputError(
                f"experts {missing} of MoE layer {at.layer} are not on rank 0; install a table in which every expert has a live replica"
            ) from None
        rows, array = self._buffer.take(len(arrival.row_of), x.shape[1], x.dtype)
        gather(array, [as_array(x)], arrival.source_of, arrival.row_of)
        return DispatchHandle(rows, arrival.groups, _LocalState(arrival.back, departure.position, topk_weights))

    def _served_by(self, routing: RoutingTable) -> list[NDArray[np.bool_]]:
        """bool [E] for each layer: experts that rank 0 holds."""
        if routing is not self._routing:
            if (routing.replica_rank > 0).any():
                ranks = sorted(set(routing.replica_rank[routing.replica_rank >= 0].tolist()))
                raise InvalidInputError(f"the local backend is rank 0 of 1, the routing table names ranks {ranks}; use the socket backend")
            self._served = list((routing.replica_rank == 0).any(-1))
            self._routing = routing
        return self._served

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        """See `Dispatcher.combine`."""
        state: _LocalState = handle.state
        y = check_combine(y, handle)
        source_of = np.zeros_like(state.back)
        return weighted_sum([as_array(y)], source_of, state.back, state.position, state.weights, y.shape[1], y.dtype)

    def close(self) -> None:
        pass
