"""Routing tables on the device, at addresses that never change: an epoch changes what is there, and no captured graph."""

from __future__ import annotations

import numpy as np
import torch

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.runtime.dispatch.cuda.region import Capacity


class DeviceTables:
    """replica_rank int32 and cumulative_quota float64, both [L, E, max_replicas] of the installed table, padded with -1 and 1.0."""

    def __init__(self, capacity: Capacity, device: torch.device):
        self._capacity = capacity
        size = capacity.num_layers * capacity.num_experts * capacity.max_replicas
        self._replica_rank = torch.full((size,), -1, dtype=torch.int32, device=device)
        self._quota = torch.ones(size, dtype=torch.float64, device=device)
        self.num_experts = capacity.num_experts

    def install(self, routing: RoutingTable) -> None:
        """Copy a table to the device, in the order of the current stream. Raises InvalidInputError if it is too large."""
        layers, experts, width = routing.replica_rank.shape
        limits = (self._capacity.num_layers, self._capacity.num_experts, self._capacity.max_replicas)
        if layers > limits[0] or experts > limits[1] or width > limits[2]:
            raise InvalidInputError(
                f"the routing table has {layers} layers, {experts} experts and up to {width} replicas, the cuda dispatch backend was "
                f"made for {limits[0]}, {limits[1]} and {limits[2]}; give it a larger Capacity"
            )
        rank = np.full((layers, experts, limits[2]), -1, dtype=np.int32)
        rank[..., :width] = routing.replica_rank
        quota = np.ones(rank.shape, dtype=np.float64)
        quota[..., :width] = routing.cumulative_quota
        self._replica_rank[: rank.size].copy_(torch.from_numpy(rank.reshape(-1)))
        self._quota[: quota.size].copy_(torch.from_numpy(quota.reshape(-1)))
        self.num_experts = experts

    def layer(self, layer: int) -> tuple[int, int]:
        """Addresses of one layer's replica ranks and quotas."""
        skip = layer * self.num_experts * self._capacity.max_replicas
        return self._replica_rank.data_ptr() + 4 * skip, self._quota.data_ptr() + 8 * skip
