"""Placement algorithms: the seed's names and entry point. `resilient` is this project's own and the default."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np

from elastic_ep.core.eplb import deepseek, elasticity_aware
from elastic_ep.core.eplb.deepseek import ExpertMaps
from elastic_ep.core.errors import InsufficientSlotsError, InvalidInputError
from elastic_ep.core.load import as_array, as_load

__all__ = ["EplbAlgorithm", "ExpertMaps", "compute_algorithm", "rebalance_experts"]


class EplbAlgorithm(Enum):
    """Who computes the placement."""

    deepseek = "deepseek"
    deepseek_hierarchical = "deepseek_hierarchical"
    elasticity_aware = "elasticity_aware"
    elasticity_aware_hierarchical = "elasticity_aware_hierarchical"
    resilient = "resilient"


def compute_algorithm(raw_algorithm: str, num_groups: int | None, num_nodes: int) -> EplbAlgorithm:
    """The algorithm of that name; ``auto`` is DeepSeek's, hierarchical when the router's groups divide over the nodes."""
    if raw_algorithm == "auto":
        divides = num_groups is not None and num_groups % num_nodes == 0
        return EplbAlgorithm.deepseek_hierarchical if divides else EplbAlgorithm.deepseek
    if raw_algorithm not in EplbAlgorithm.__members__:
        known = ", ".join(["auto", *EplbAlgorithm.__members__])
        raise InvalidInputError(f"unknown EPLB algorithm {raw_algorithm!r}; choose from {known}")
    return EplbAlgorithm[raw_algorithm]


def rebalance_experts(
    tokens_per_expert: Any,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
    algorithm: EplbAlgorithm | str,
    active_ranks: Any = None,
) -> ExpertMaps:
    """Placement by one of the named algorithms: the seed's signature, with the mask as an argument instead of a global.

    Args:
        tokens_per_expert: [L, E], or [T, L, E] snapshots that are summed; array or tensor, the maps come back as the same kind.
        num_physical_experts, num_local_physical_experts: P over all ranks, dead ones included, and per rank.
        num_groups: expert groups of the router, or None.
        num_nodes: servers the ranks are spread over evenly.
        active_ranks: int [ep_size], 1 = alive; None when all are. Only the elastic algorithms can leave ranks out.

    Raises:
        InvalidInputError: an argument that cannot be served, named with its value.
        InsufficientSlotsError: too few live slots for all experts; it says how many are missing.
    """
    algorithm = compute_algorithm(algorithm, num_groups, num_nodes) if isinstance(algorithm, str) else algorithm
    if num_local_physical_experts < 1 or num_physical_experts % num_local_physical_experts:
        raise InvalidInputError(
            f"{num_physical_experts} physical experts are not a multiple of {num_local_physical_experts} per rank; give whole ranks"
        )
    num_gpus = num_physical_experts // num_local_physical_experts
    weight = tokens_per_expert.sum(0) if len(tokens_per_expert.shape) == 3 else tokens_per_expert
    hierarchical = algorithm in (EplbAlgorithm.deepseek_hierarchical, EplbAlgorithm.elasticity_aware_hierarchical)
    if active_ranks is None:
        active_ranks = np.ones(num_gpus, dtype=np.int32)
    if algorithm in (EplbAlgorithm.deepseek, EplbAlgorithm.deepseek_hierarchical):
        if not (as_array(active_ranks) != 0).all():
            raise InvalidInputError(f"algorithm {algorithm.name} cannot leave dead ranks out; use elasticity_aware or resilient")
        return deepseek.rebalance_experts(weight, num_physical_experts, num_groups, num_nodes, num_gpus, hierarchical)
    if algorithm is EplbAlgorithm.resilient:
        return _resilient(weight, num_physical_experts, num_gpus, num_nodes, active_ranks)
    return elasticity_aware.rebalance_experts(weight, num_physical_experts, num_groups, num_nodes, num_gpus, hierarchical, active_ranks)


def _resilient(weight: Any, num_physical_experts: int, num_gpus: int, num_nodes: int, active_ranks: Any) -> ExpertMaps:
    """A first placement by `resilient`. Repairs need what slots hold and are asked of `solve_placement` itself."""
    # Here and not above: the solver imports quotas, which import this package's kernels.
    from elastic_ep.core.eplb.resilient import solve_placement
    from elastic_ep.core.topology import Topology

    if num_nodes < 1 or num_gpus % num_nodes:
        raise InvalidInputError(f"{num_gpus} ranks do not divide over {num_nodes} nodes; make them a multiple")
    alive = elasticity_aware.active_mask(active_ranks, num_gpus)
    load = as_load(weight)
    num_live = int(alive.sum()) * (num_physical_experts // num_gpus)
    if num_live < load.shape[1]:
        raise InsufficientSlotsError(num_live, load.shape[1])
    nodes = [str(rank // (num_gpus // num_nodes)) for rank in range(num_gpus)]
    placed = solve_placement(load, Topology.uniform(num_gpus, num_physical_experts, nodes), alive).placement
    maps = ExpertMaps(placed.physical_to_logical_map, placed.logical_to_physical_map, placed.logical_replica_count)
    return deepseek.like_caller(weight, maps)
