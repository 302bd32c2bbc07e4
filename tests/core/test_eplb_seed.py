"""The seed's algorithms: published example, ties, dead ranks, shapes, errors."""

from __future__ import annotations

import numpy as np
import pytest

from elastic_ep.core.eplb import EplbAlgorithm, compute_algorithm, deepseek, elasticity_aware, rebalance_experts
from elastic_ep.core.errors import InsufficientSlotsError, InvalidInputError

PUBLISHED_LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED_MAP = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def check_maps(maps, num_slots, live_slots=None):
    """Maps are each other's inverse, every expert is covered, dead slots are empty and live ones are not."""
    p2l, l2p, count = maps
    live = np.ones(num_slots, dtype=bool) if live_slots is None else live_slots
    assert p2l.dtype == l2p.dtype == count.dtype == np.int64
    assert p2l.shape[1] == num_slots
    assert (p2l[:, ~live] == -1).all()
    assert (p2l[:, live] >= 0).all()
    for layer in range(p2l.shape[0]):
        for expert in range(count.shape[1]):
            slots = l2p[layer, expert][l2p[layer, expert] >= 0]
            assert len(slots) == count[layer, expert] >= 1
            assert sorted(slots) == list(np.flatnonzero(p2l[layer] == expert))
        assert count[layer].sum() == live.sum()


def test_published_example():
    maps = deepseek.rebalance_experts(np.array(PUBLISHED_LOAD), 16, 4, 2, 8)
    assert maps.physical_to_logical_map.tolist() == PUBLISHED_MAP
    check_maps(maps, 16)


def test_by_hand_with_ties():
    # Three equal experts and a heavy one on two ranks of three slots: the heavy one (3) gets both spare slots. Replicas in
    # order of creation are 0 1 2 3 3 3 of weight 1 1 1 2 2 2 (6 split in three). Packing takes 3, 3, 3, then 0, 1, 2:
    # rank 0: 3 (2); rank 1: 3 (2); tie: rank 0: 3 (4); rank 1: 0 (3), rank 1: 1 (4) and is full; rank 0: 2.
    maps = deepseek.rebalance_experts(np.array([[1.0, 1.0, 1.0, 6.0]]), 6, None, 1, 2)
    assert maps.physical_to_logical_map.tolist() == [[3, 3, 2, 3, 0, 1]]
    assert maps.logical_to_physical_map.tolist() == [[[4, -1, -1], [5, -1, -1], [2, -1, -1], [0, 3, 1]]]
    assert maps.logical_replica_count.tolist() == [[1, 1, 1, 3]]


def test_equal_loads_replicate_the_lowest_expert():
    maps = deepseek.rebalance_experts(np.ones((1, 3)), 4, None, 1, 4)
    assert maps.physical_to_logical_map.tolist() == [[0, 1, 2, 0]]
    maps = deepseek.rebalance_experts(np.zeros((1, 3)), 4, None, 1, 2)
    assert maps.logical_replica_count.tolist() == [[2, 1, 1]]


def test_dead_ranks_slots_are_empty_and_keep_their_ids():
    load = np.array([[4.0, 3.0, 2.0, 1.0]])
    maps = elasticity_aware.rebalance_experts(load, 6, None, 1, 3, False, np.array([1, 0, 1]))
    # The two live ranks alone: LPT of 4 3 2 1 gives {4, 1} and {3, 2}.
    assert maps.physical_to_logical_map.tolist() == [[0, 3, -1, -1, 1, 2]]
    assert maps.logical_to_physical_map.tolist() == [[[0], [4], [5], [1]]]


@pytest.mark.parametrize("seed", range(20))
def test_any_dead_ranks(seed):
    rng = np.random.default_rng(seed)
    num_gpus, per_rank, num_layers = int(rng.integers(2, 9)), int(rng.integers(1, 6)), int(rng.integers(1, 4))
    active = np.ones(num_gpus, dtype=np.int32)
    active[rng.permutation(num_gpus)[: rng.integers(0, num_gpus)]] = 0
    num_experts = int(rng.integers(1, active.sum() * per_rank + 1))
    load = rng.lognormal(size=(num_layers, num_experts))
    maps = rebalance_experts(load, num_gpus * per_rank, per_rank, None, 1, "elasticity_aware", active)
    check_maps(maps, num_gpus * per_rank, np.repeat(active != 0, per_rank))


def test_all_alive_is_deepseek():
    load = np.random.default_rng(7).lognormal(size=(3, 16))
    for elastic, plain in (("elasticity_aware", "deepseek"), ("elasticity_aware_hierarchical", "deepseek_hierarchical")):
        first = rebalance_experts(load, 24, 3, 4, 2, elastic, np.ones(8, dtype=np.int32))
        second = rebalance_experts(load, 24, 3, 4, 2, plain)
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


def test_hierarchical_keeps_a_group_on_one_node():
    load = np.random.default_rng(3).lognormal(size=(4, 16))
    maps = rebalance_experts(load, 24, 3, 8, 2, "deepseek_hierarchical")
    check_maps(maps, 24)
    for row in maps.physical_to_logical_map:
        nodes = [set(row[:12] // 2), set(row[12:] // 2)]
        assert not nodes[0] & nodes[1]
        assert len(nodes[0]) == len(nodes[1]) == 4


def test_packs_are_full_and_heaviest_first():
    rng = np.random.default_rng(11)
    weight = rng.random((5, 24)).astype(np.float32)
    packing = deepseek.balanced_packing(weight, 6)
    for row in range(5):
        assert np.bincount(packing.pack[row]).tolist() == [4] * 6
        order = np.argsort(-weight[row])
        load, room = [0.0] * 6, [4] * 6
        for item in order:
            best = min((p for p in range(6) if room[p]), key=lambda p: load[p])
            assert packing.pack[row, item] == best
            load[best] += float(weight[row, item])
            room[best] -= 1


def test_seats_beyond_the_world_do_not_widen_the_map():
    load = np.ones((1, 4))
    active = np.array([1, 0, 1, 1, 0, 0, 0, 0])
    maps = rebalance_experts(load, 8, 2, None, 1, "elasticity_aware", active)
    assert maps.physical_to_logical_map.shape == (1, 8)
    with pytest.raises(InvalidInputError, match="marks rank 5 alive"):
        rebalance_experts(load, 8, 2, None, 1, "elasticity_aware", np.array([1, 0, 1, 1, 0, 1]))


def test_too_few_live_slots_says_how_many_are_missing():
    with pytest.raises(InsufficientSlotsError, match="4 live slots cannot hold 7 experts: 3 missing") as caught:
        rebalance_experts(np.ones((2, 7)), 8, 2, None, 1, "elasticity_aware", [1, 1, 0, 0])
    assert caught.value.missing == 3
    with pytest.raises(InsufficientSlotsError):
        deepseek.rebalance_experts(np.ones((2, 7)), 6, None, 1, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_loads_are_named(bad):
    load = np.ones((2, 4))
    load[1, 2] = bad
    with pytest.raises(InvalidInputError, match="layer 1, expert 2"):
        rebalance_experts(load, 4, 2, None, 1, "deepseek")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 2, None, 1, "deepseek"), "not a multiple"),
        ((8, 2, None, 1, "deepseek_hierarchical"), "needs num_groups"),
        ((8, 2, 3, 1, "deepseek_hierarchical"), "must divide"),
        ((8, 2, None, 1, "best"), "unknown EPLB algorithm 'best'"),
        ((8, 2, None, 1, "deepseek", [1, 1, 1, 0]), "cannot leave dead ranks out"),
        ((8, 2, None, 1, "elasticity_aware", [1, 1, 1]), "one entry for each of 4 ranks"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        rebalance_experts(np.ones((1, 8)), *arguments)


def test_snapshots_are_summed_and_auto_is_deepseek():
    load = np.random.default_rng(5).integers(0, 50, (3, 2, 8))
    assert compute_algorithm("auto", 4, 2) is EplbAlgorithm.deepseek_hierarchical
    assert compute_algorithm("auto", None, 2) is compute_algorithm("auto", 3, 2) is EplbAlgorithm.deepseek
    first = rebalance_experts(load, 12, 3, None, 1, "auto")
    second = deepseek.rebalance_experts(load.sum(0), 12, None, 1, 4)
    np.testing.assert_array_equal(first.physical_to_logical_map, second.physical_to_logical_map)


def test_tensors_come_back_as_tensors():
    torch = pytest.importorskip("torch")
    load = torch.from_numpy(np.random.default_rng(9).lognormal(size=(2, 12))).to(torch.bfloat16)
    maps = rebalance_experts(load, 20, 5, None, 1, "elasticity_aware", torch.tensor([1, 0, 1, 1]))
    assert all(isinstance(m, torch.Tensor) and m.dtype == torch.int64 for m in maps)
    check_maps([m.numpy() for m in maps], 20, np.repeat([True, False, True, True], 5))
