"""The seed's elastic policy: DeepSeek's over the ranks that live, with dead ranks' slots left in their places, empty.

Mended against the seed: dead slots are -1 (not expert 0), the map always has ``num_replicas`` columns (also when ``active_ranks``
has seats beyond the world), and too few live slots is an error that says how many are missing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.eplb import deepseek
from elastic_ep.core.eplb.deepseek import ExpertMaps
from elastic_ep.core.errors import InsufficientSlotsError, InvalidInputError
from elastic_ep.core.load import as_array, as_load


def active_mask(active_ranks: Any, num_gpus: int) -> NDArray[np.bool_]:
    """bool [num_gpus] of ``active_ranks`` (1 = alive). Seats beyond the world may follow as long as they are empty."""
    active = as_array(active_ranks)
    if active.ndim != 1 or len(active) < num_gpus:
        raise InvalidInputError(f"active_ranks has shape {active.shape}; expected one entry for each of {num_gpus} ranks")
    if active[num_gpus:].any():
        extra = num_gpus + int(np.argmax(active[num_gpus:] != 0))
        raise InvalidInputError(
            f"active_ranks marks rank {extra} alive, but the physical experts are spread over {num_gpus} ranks; "
            f"raise the number of physical experts first"
        )
    return np.asarray(active[:num_gpus] != 0)


def rebalance_experts(
    weight: Any,
    num_replicas: int,
    num_groups: int | None,
    num_nodes: int,
    num_gpus: int,
    enable_hierarchical: bool,
    active_ranks: Any,
) -> ExpertMaps:
    """Placement over the live ranks; arguments as in `deepseek.rebalance_experts`, ``num_gpus`` counts dead ranks too.

    With all ranks alive it is DeepSeek's placement, to the bit. With some dead it is the global policy over the others.

    Args:
        active_ranks: int [num_gpus] or longer, 1 = alive.

    Raises:
        InsufficientSlotsError: the live ranks' slots cannot hold all experts.
    """
    alive = active_mask(active_ranks, num_gpus)
    if alive.all():
        return deepseek.rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus, enable_hierarchical)
    load = as_load(weight).astype(np.float32)
    if num_replicas % num_gpus:
        raise InvalidInputError(f"{num_replicas} physical experts do not divide over {num_gpus} ranks; make them a multiple")
    live_slots = np.flatnonzero(np.repeat(alive, num_replicas // num_gpus))
    num_live = len(live_slots)
    if num_live < load.shape[1]:
        raise InsufficientSlotsError(num_live, load.shape[1])
    placed = deepseek.place_hierarchical(load, num_live, 1, 1, int(alive.sum()), deepseek.primitives_of(weight))
    return deepseek.like_caller(weight, deepseek.to_maps(placed, live_slots, num_replicas))
