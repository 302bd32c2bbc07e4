"""Token quotas: the share of its expert's tokens that each replica takes, so that rank loads even out; and the loads that result."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.eplb import kernels
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.load import as_load
from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.topology import Topology

QUOTA_UNITS = 65536
"""Quotas are whole multiples of 1 / QUOTA_UNITS: sums and running sums of them are exact in float32 and float64, on every machine."""


def even_quotas(placement: ExpertPlacement) -> NDArray[np.float64]:
    """float64 [L, P]: every replica of an expert takes the same share; 0 in empty slots."""
    p2l = placement.physical_to_logical_map
    share = 1.0 / np.maximum(placement.logical_replica_count, 1)
    return np.where(p2l == EMPTY, 0.0, share[np.arange(len(p2l))[:, None], np.maximum(p2l, 0)])


def level_quotas(load: Any, placement: ExpertPlacement, topology: Topology, rounds: int = 32) -> NDArray[np.float64]:
    """float64 [L, P]: shares that level the rank loads as far as the replicas allow; they add up to exactly 1 per expert.

    Args:
        load: [L, E] tokens per expert.
        placement: dead ranks' slots already empty.
        rounds: passes over the experts at most; it stops earlier when nothing moves.
    """
    weights = as_load(load)
    _check(weights, placement, topology)
    units = kernels.quota_units(weights, placement.physical_to_logical_map, topology.rank_of_slot, topology.ep_size, rounds, QUOTA_UNITS)
    return units / float(QUOTA_UNITS)


def rank_loads(load: Any, placement: ExpertPlacement, topology: Topology, quotas: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """float64 [L, ep_size]: tokens that each rank gets; an even split without ``quotas``."""
    weights = as_load(load)
    _check(weights, placement, topology)
    return sum_by_rank(weights, placement, topology, quotas)


def sum_by_rank(
    weights: NDArray[np.float64], placement: ExpertPlacement, topology: Topology, quotas: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """`rank_loads` of a load that was checked before."""
    share = even_quotas(placement) if quotas is None else quotas
    layers = np.arange(placement.num_layers)[:, None]
    tokens = weights[layers, np.maximum(placement.physical_to_logical_map, 0)] * share
    index = layers * topology.ep_size + topology.rank_of_slot
    summed = np.bincount(index.ravel(), tokens.ravel(), placement.num_layers * topology.ep_size)
    return np.asarray(summed.reshape(placement.num_layers, topology.ep_size), dtype=np.float64)


def balance_of(loads: NDArray[np.float64], ranks: NDArray[np.int64]) -> float:
    """Mean over layers of (mean / highest) load among ``ranks``; 1 is perfect. A layer without load counts as balanced."""
    if loads.shape[0] == 0 or len(ranks) == 0:
        return 1.0
    chosen = loads[:, ranks]
    peak = chosen.max(axis=1)
    return float(np.where(peak > 0, chosen.mean(axis=1) / np.where(peak > 0, peak, 1.0), 1.0).mean())


def split_tokens(quotas: NDArray[np.float64], num_tokens: int) -> NDArray[np.int64]:
    """int64 like ``quotas`` (one expert's shares): whole tokens per replica that add up to ``num_tokens``; the remainder goes to the
    largest fractions, the first among equals."""
    exact = np.asarray(quotas, dtype=np.float64) * num_tokens
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(whole - exact, kind="stable")
    whole[order[: num_tokens - int(whole.sum())]] += 1
    return whole


def _check(weights: NDArray[np.float64], placement: ExpertPlacement, topology: Topology) -> None:
    shape = (placement.num_layers, placement.num_logical_experts)
    if weights.shape != shape or placement.num_slots != topology.num_slots:
        raise InvalidInputError(
            f"load {weights.shape}, placement of {shape} over {placement.num_slots} slots and topology of {topology.num_slots} slots "
            f"do not belong together"
        )
