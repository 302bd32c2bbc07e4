"""DeepSeek's placement policy: replicate the hottest expert, then pack heaviest first with equal numbers of items per rank.

The maps are those of the published policy, ties included, wherever it gives a result: an engine can switch by an import.
Arithmetic is float32; among experts whose replicas are equally hot the lowest is replicated; items are packed in descending
order of weight; among equally loaded packs the lowest takes the item. The order of equal weights, and the rounding of a group's
sum, the original leaves to its tensor library: given a tensor, this one asks that library too; given an array, equal weights go
by ascending index and a sum is rounded once, so that every machine computes the same.
It knows neither failures nor what slots held before: `resilient` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.errors import InsufficientSlotsError, InvalidInputError
from elastic_ep.core.load import as_load
from elastic_ep.core.placement import EMPTY

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class ExpertMaps(NamedTuple):
    """What the seed's entry points return.

    Example, L=1, E=2, P=3::

        physical_to_logical_map = [[0, 1, 0]]
        logical_to_physical_map = [[[0, 2], [1, -1]]]
        logical_replica_count   = [[2, 1]]

    Attributes:
        physical_to_logical_map: int64 [L, P], -1 in a dead rank's slots.
        logical_to_physical_map: int64 [L, E, X], the slots of each expert in order of creation, -1 padded.
        logical_replica_count: int64 [L, E].
    """

    physical_to_logical_map: Any
    logical_to_physical_map: Any
    logical_replica_count: Any


class Replicas(NamedTuple):
    """Physical experts before they have slots: expert [X, P], which replica of it [X, P], replicas per expert [X, E]."""

    expert: Ints
    replica: Ints
    counts: Ints


class Packing(NamedTuple):
    """Pack of each item and its position in it, both int64 [X, n]."""

    pack: Ints
    position: Ints


class Primitives(NamedTuple):
    """The two operations whose result depends on who computes them.

    Attributes:
        descending: float32 [X, n] -> int64 [X, n], indices by descending weight.
        group_sum: float32 [L, G, n] -> float32 [L, G].
    """

    descending: Callable[[Floats], Ints]
    group_sum: Callable[[Floats], Floats]


ARRAY_PRIMITIVES = Primitives(
    lambda weight: np.argsort(-weight, axis=-1, kind="stable"),
    lambda weight: weight.sum(axis=-1, dtype=np.float64).astype(np.float32),
)


def primitives_of(weight: Any) -> Primitives:
    """The tensor library's own, if ``weight`` is a tensor; `ARRAY_PRIMITIVES` otherwise."""
    if not hasattr(weight, "new_tensor"):
        return ARRAY_PRIMITIVES
    to_tensor = weight.new_empty(0).cpu().float().new_tensor
    return Primitives(
        lambda rows: np.asarray(to_tensor(rows).sort(-1, descending=True).indices),
        lambda groups: np.asarray(to_tensor(groups).sum(-1)),
    )


def balanced_packing(weight: Floats, num_packs: int, ops: Primitives = ARRAY_PRIMITIVES) -> Packing:
    """Put n items into packs of n / num_packs items each, heaviest first, each into the lightest pack that has room."""
    rows, num_items = weight.shape
    capacity = num_items // num_packs
    if capacity == 1:
        return Packing(np.tile(np.arange(num_items), (rows, 1)), np.zeros((rows, num_items), dtype=np.int64))
    order = ops.descending(weight)
    pack = np.empty((rows, num_items), dtype=np.int64)
    position = np.empty((rows, num_items), dtype=np.int64)
    load = np.zeros((rows, num_packs), dtype=np.float32)
    taken = np.zeros((rows, num_packs), dtype=np.int64)
    row = np.arange(rows)
    for item in order.T:
        target = load.argmin(axis=1)
        pack[row, item] = target
        position[row, item] = taken[row, target]
        taken[row, target] += 1
        load[row, target] += weight[row, item]
        load[row, target] = np.where(taken[row, target] == capacity, np.float32(np.inf), load[row, target])
    return Packing(pack, position)


def replicate_experts(weight: Floats, num_physical: int) -> Replicas:
    """One replica of each expert, then one more of the expert whose replicas carry most, until ``num_physical`` exist."""
    rows, num_experts = weight.shape
    expert = np.tile(np.arange(num_physical), (rows, 1))
    replica = np.zeros((rows, num_physical), dtype=np.int64)
    count = np.ones((rows, num_experts), dtype=np.int64)
    per_replica = weight.copy()
    row = np.arange(rows)
    for slot in range(num_experts, num_physical):
        hottest = per_replica.argmax(axis=1)
        expert[:, slot] = hottest
        replica[:, slot] = count[row, hottest]
        count[row, hottest] += 1
        per_replica[row, hottest] = weight[row, hottest] / count[row, hottest].astype(np.float32)
    return Replicas(expert, replica, count)


def inverse_permutation(permutation: Ints) -> Ints:
    """Row-wise inverse of permutations int64 [X, n]."""
    inverse = np.empty_like(permutation)
    np.put_along_axis(inverse, permutation, np.broadcast_to(np.arange(permutation.shape[1]), permutation.shape), axis=1)
    return inverse


def place_hierarchical(
    weight: Floats, num_physical: int, num_groups: int, num_nodes: int, num_ranks: int, ops: Primitives = ARRAY_PRIMITIVES
) -> Replicas:
    """Expert groups to nodes, replicas within each node, then replicas to the node's ranks; columns of the result are slots.

    With one group and one node it is the global policy. ``num_groups``, ``num_ranks`` and E must divide as the checks of
    `rebalance_experts` say.
    """
    num_layers, num_experts = weight.shape
    group_size, per_node = num_experts // num_groups, num_experts // num_nodes
    packed: Packing = balanced_packing(ops.group_sum(weight.reshape(num_layers, num_groups, -1)), num_nodes, ops)
    first = (packed.pack * (num_groups // num_nodes) + packed.position) * group_size
    sorted_of_expert = (first[..., None] + np.arange(group_size)).reshape(num_layers, num_experts)
    expert_of_sorted = inverse_permutation(sorted_of_expert)

    node_load = np.take_along_axis(weight, expert_of_sorted, axis=1).reshape(-1, per_node)
    replicas = replicate_experts(node_load, num_physical // num_nodes)
    per_replica: Floats = np.divide(node_load, replicas.counts, dtype=np.float32)
    replica_load: Floats = np.take_along_axis(per_replica, replicas.expert, axis=1)
    packed = balanced_packing(replica_load, num_ranks // num_nodes, ops)
    replica_of_slot = inverse_permutation(packed.pack * (num_physical // num_ranks) + packed.position)

    within_node = np.take_along_axis(replicas.expert, replica_of_slot, axis=1).reshape(num_layers, num_nodes, -1)
    position = (within_node + np.arange(num_nodes)[:, None] * per_node).reshape(num_layers, -1)
    return Replicas(
        np.take_along_axis(expert_of_sorted, position, axis=1),
        np.take_along_axis(replicas.replica, replica_of_slot, axis=1).reshape(num_layers, -1),
        np.take_along_axis(replicas.counts.reshape(num_layers, -1), sorted_of_expert, axis=1),
    )


def check_shape(num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    """What the policy needs of its arguments. Raises InvalidInputError, or InsufficientSlotsError when not all experts fit."""
    for name, value in (("num_groups", num_groups), ("num_nodes", num_nodes), ("num_gpus", num_gpus)):
        if value < 1:
            raise InvalidInputError(f"{name} is {value}; give 1 or more")
    if num_replicas % num_gpus:
        raise InvalidInputError(f"{num_replicas} physical experts do not divide over {num_gpus} ranks; make them a multiple")
    if num_experts % num_groups or num_groups % num_nodes or num_gpus % num_nodes:
        raise InvalidInputError(
            f"{num_experts} experts, {num_groups} groups, {num_nodes} nodes, {num_gpus} ranks: experts must divide by groups, "
            f"groups and ranks by nodes; use the global policy instead"
        )
    if num_replicas < num_experts:
        raise InsufficientSlotsError(num_replicas, num_experts)


def to_maps(placed: Replicas, slot_ids: Ints, num_slots: int) -> ExpertMaps:
    """Maps of replicas whose i-th column lives in slot ``slot_ids[i]`` of ``num_slots``; other slots are empty."""
    num_layers, num_experts = placed.counts.shape
    physical_to_logical = np.full((num_layers, num_slots), EMPTY, dtype=np.int64)
    physical_to_logical[:, slot_ids] = placed.expert
    width = int(placed.counts.max(initial=1))
    logical_to_physical = np.full((num_layers, num_experts, width), EMPTY, dtype=np.int64)
    layer = np.broadcast_to(np.arange(num_layers)[:, None], placed.expert.shape)
    logical_to_physical[layer, placed.expert, placed.replica] = np.broadcast_to(slot_ids, placed.expert.shape)
    return ExpertMaps(physical_to_logical, logical_to_physical, placed.counts)


def like_caller(weight: Any, maps: ExpertMaps) -> ExpertMaps:
    """The maps as int64 tensors on the CPU if the caller's weight was a tensor, as NumPy arrays otherwise."""
    if not hasattr(weight, "new_tensor"):
        return maps
    to_tensor = weight.new_empty(0).cpu().long().new_tensor
    return ExpertMaps(*(to_tensor(array) for array in maps))


def rebalance_experts(
    weight: Any, num_replicas: int, num_groups: int | None, num_nodes: int, num_gpus: int, enable_hierarchical: bool | None = None
) -> ExpertMaps:
    """DeepSeek's and the seed's entry point.

    Args:
        weight: [L, E] load per expert; array or tensor, the maps come back as the same kind.
        num_replicas: physical experts per layer, a multiple of ``num_gpus``.
        num_groups: expert groups of the router; None with the global policy.
        num_nodes, num_gpus: servers, and ranks over all of them.
        enable_hierarchical: pack groups to nodes first; None decides as DeepSeek does, by whether groups divide over the nodes.

    Raises:
        InvalidInputError: a load or a number that cannot be served.
        InsufficientSlotsError: fewer physical than logical experts.
    """
    load = as_load(weight).astype(np.float32)
    if enable_hierarchical is None:
        enable_hierarchical = num_groups is not None and num_groups % max(1, num_nodes) == 0
    if enable_hierarchical and num_groups is None:
        raise InvalidInputError("the hierarchical policy needs num_groups, got None; give the router's number of expert groups")
    groups, nodes = (int(num_groups or 1), num_nodes) if enable_hierarchical else (1, 1)
    check_shape(load.shape[1], num_replicas, groups, nodes, num_gpus)
    placed = place_hierarchical(load, num_replicas, groups, nodes, num_gpus, primitives_of(weight))
    return like_caller(weight, to_maps(placed, np.arange(num_replicas), num_replicas))
