"""Which replica serves a token: tables of one epoch, and the counter-based rule that every rank computes alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.topology import Topology

_GOLDEN = 0.6180339887498949
_PLASTIC = 0.7548776662466927


@dataclass(frozen=True, eq=False)
class RoutingTable:
    """The replicas of each expert under one epoch. X is the largest replica count.

    Example, one layer, E=2, rank 0 holds expert 0, ranks 0 and 1 hold expert 1 with quotas 0.25 and 0.75::

        replica_rank     = [[[0, -1], [0, 1]]]
        cumulative_quota = [[[1.0, 1.0], [0.25, 1.0]]]

    Attributes:
        epoch: the membership epoch these tables belong to.
        replica_rank: int32 [L, E, X], the rank of each replica, -1 padded.
        cumulative_quota: float64 [L, E, X], running sum of the shares of an expert's tokens; 1.0 at and after its last replica.
        streamed: (layer, expert) -> rank, for experts that no slot holds and that this rank reads in when a token needs them.
    """

    epoch: int
    replica_rank: NDArray[np.int32]
    cumulative_quota: NDArray[np.float64]
    streamed: Mapping[tuple[int, int], int]

    @classmethod
    def build(
        cls,
        epoch: int,
        placement: ExpertPlacement,
        topology: Topology,
        quotas: NDArray[np.float64] | None = None,
        streamed: Mapping[tuple[int, int], int] | None = None,
    ) -> RoutingTable:
        """Tables for a placement whose dead slots are already empty.

        Args:
            quotas: float64 [L, P], the share of its expert's tokens that each slot takes (sums to 1 per expert); None splits evenly.
            streamed: ranks that stand in for experts without a slot.
        """
        l2p = placement.logical_to_physical_map
        held = l2p != EMPTY
        slot = np.where(held, l2p, 0)
        replica_rank = np.where(held, topology.rank_of_slot[slot] if topology.num_slots else EMPTY, EMPTY).astype(np.int32)
        if quotas is None:
            share = held / np.maximum(1, held.sum(-1, keepdims=True))
        else:
            layer = np.arange(placement.num_layers)[:, None, None]
            share = np.where(held, quotas[layer, slot], 0.0)
        cumulative = np.cumsum(share, axis=-1)
        last = np.maximum(held.sum(-1, keepdims=True) - 1, 0)
        cumulative[np.arange(cumulative.shape[-1]) >= last] = 1.0
        streamed = dict(streamed or {})
        for (layer_id, expert), rank in streamed.items():
            replica_rank[layer_id, expert, 0] = rank
        return cls(epoch, replica_rank, cumulative, streamed)

    def destination_ranks(self, layer: int, topk_ids: NDArray[np.integer], source_rank: int, step: int) -> NDArray[np.int32]:
        """int32 [T, K]: the rank that serves each (token, expert) pair of one source rank's batch.

        The i-th pair draws u = frac(i φ + step ρ + source_rank ρ²) (a low-discrepancy sequence) and goes to the first replica whose
        cumulative quota exceeds u. It affects the load of the ranks, never a result.
        """
        stride, at_step, at_source = sequence_phases(source_rank, step)
        pairs = np.arange(topk_ids.size, dtype=np.float64).reshape(topk_ids.shape)
        u = np.mod(pairs * stride + at_step + at_source, 1.0)
        cumulative = self.cumulative_quota[layer][topk_ids]
        choice = (cumulative <= u[..., None]).sum(-1)
        ranks: NDArray[np.int32] = np.take_along_axis(self.replica_rank[layer][topk_ids], choice[..., None], -1)[..., 0]
        return ranks


def sequence_phases(source_rank: int, step: int) -> tuple[float, float, float]:
    """(φ, step ρ, source_rank ρ²): pair i draws frac(i φ + step ρ + source_rank ρ²), the sums taken in this order."""
    return _GOLDEN, step * _PLASTIC, source_rank * _PLASTIC * _PLASTIC
