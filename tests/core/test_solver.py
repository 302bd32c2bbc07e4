"""The placement solver against the rules it promises, on random cases."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.core.eplb.resilient import PlacementPlan, solve_placement
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.placement import ExpertPlacement
from elastic_ep.core.topology import Topology

FEW = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def cases(draw, max_ranks=6, max_experts=12):
    """(load, topology, active_ranks, min_replicas, spread): ranks of different size, some dead, domains of any shape."""
    ep_size = draw(st.integers(1, max_ranks))
    slots = tuple(draw(st.lists(st.integers(0, 5), min_size=ep_size, max_size=ep_size)))
    nodes = tuple(draw(st.lists(st.sampled_from("abc"), min_size=ep_size, max_size=ep_size)))
    active = draw(st.lists(st.integers(0, 1), min_size=ep_size, max_size=ep_size).filter(any))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, max_experts)))
    kind = draw(st.sampled_from(["lognormal", "zero", "hot", "integers"]))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    load = {
        "lognormal": rng.lognormal(0, 1.5, shape),
        "zero": np.zeros(shape),
        "hot": np.eye(1, shape[1], shape[1] - 1) * np.ones((shape[0], 1)) * 1e9,
        "integers": rng.integers(0, 4, shape).astype(float),
    }[kind]
    topology = Topology(slots, {"node": nodes})
    return load, topology, np.array(active), draw(st.integers(1, 3)), draw(st.sampled_from(["rank", "node"]))


def check_plan(plan: PlacementPlan, load, topology, active, previous=None, limit=None):
    """Everything a plan promises whatever was asked."""
    rows = plan.placement.physical_to_logical_map
    num_layers, num_experts = load.shape
    live = topology.live_slot_mask(active)
    assert rows.shape == (num_layers, topology.num_slots)
    assert (rows[:, ~live] == -1).all()
    assert (plan.quotas[rows == -1] == 0).all()
    assert (plan.quotas >= 0).all()
    short = int(live.sum()) < num_experts
    for layer, row in enumerate(rows):
        held = Counter(row[row >= 0].tolist())
        streamed = {e for (a, e) in plan.streamed if a == layer}
        assert set(held) | streamed == set(range(num_experts))
        assert not set(held) & streamed
        for expert in held:
            assert plan.quotas[layer][row == expert].sum() == 1.0
        if short:
            assert len(streamed) == num_experts - int(live.sum())
            if limit is None:
                assert load[layer][list(held)].min(initial=np.inf) * 1.02 >= load[layer][list(streamed)].max()
        else:
            assert not streamed
        for rank in range(topology.ep_size):
            mine = row[list(topology.slots_of(rank))]
            assert len(set(mine[mine >= 0])) == (mine >= 0).sum(), "two replicas of an expert on one rank"
        per_rank = Counter(r for (a, _), r in plan.streamed.items() if a == layer)
        assert not per_rank or max(per_rank.values()) - min(per_rank.get(r, 0) for r in np.flatnonzero(active)) <= 1
    check_moves(plan, previous, live)


def can_spread(load, topology, active, need, level):
    """Whether every expert can have ``need`` distinct domains (Gale and Ryser)."""
    domain = topology.domain_ids(level)
    room = np.bincount(domain, np.where(active, topology.slots_per_rank, 0))
    return np.minimum(room, load.shape[1]).sum() >= need * load.shape[1]


def check_moves(plan, previous, live):
    """Moves turn what slots held into the placement; the mandatory prefix alone covers every resident expert."""
    rows = plan.placement.physical_to_logical_map
    contents = np.full_like(rows, -1) if previous is None else np.where(live, previous.physical_to_logical_map, -1)
    lost = {(a, e) for a, row in enumerate(contents) for e in range(plan.placement.num_logical_experts) if e not in row}
    if previous is not None and not plan.streamed:
        assert set(plan.lost) == lost
        assert plan.num_mandatory == len(lost)
    for index, move in enumerate(plan.moves):
        if index == plan.num_mandatory:
            check_covered(contents, plan)
        assert contents[move.layer, move.slot] != move.expert
        contents[move.layer, move.slot] = move.expert
    if len(plan.moves) == plan.num_mandatory:
        check_covered(contents, plan)
    np.testing.assert_array_equal(np.where(rows == -1, -1, contents), rows)


def check_covered(contents, plan):
    for layer, row in enumerate(contents):
        for expert in range(plan.placement.num_logical_experts):
            assert expert in row or (layer, expert) in plan.streamed


@FEW
@given(cases())
def test_first_placement(case):
    load, topology, active, need, spread = case
    plan = solve_placement(load, topology, active, min_replicas=need, spread=spread)
    check_plan(plan, load, topology, active)
    assert plan.balance <= plan.bound + 1e-9
    assert plan.balance_with_quotas >= plan.balance - 1e-3
    if can_spread(load, topology, active, need, spread):
        assert plan.shortfall == 0


@FEW
@given(cases(), st.data())
def test_repair_from_anything(case, data):
    load, topology, active, need, spread = case
    seed = data.draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    held = rng.integers(-1, load.shape[1], (load.shape[0], topology.num_slots))
    previous = ExpertPlacement(held, load.shape[1])
    limit = data.draw(st.sampled_from([None, 0, 2]))
    plan = solve_placement(load, topology, active, previous, min_replicas=need, spread=spread, max_moves=limit)
    check_plan(plan, load, topology, active, previous, limit)
    if limit is not None and not plan.streamed:
        assert len(plan.moves) <= max(limit, plan.num_mandatory)
    if limit is None and can_spread(load, topology, active, need, spread):
        assert plan.shortfall == 0


@FEW
@given(cases())
def test_solving_again_moves_nothing(case):
    load, topology, active, need, spread = case
    first = solve_placement(load, topology, active, min_replicas=need, spread=spread)
    again = solve_placement(load, topology, active, first.placement, min_replicas=need, spread=spread)
    assert again.moves == ()
    assert again.placement == first.placement


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"active_ranks": [1, 1, 1]}, "active_ranks has shape"),
        ({"active_ranks": [0, 0]}, "no rank is alive"),
        ({"min_replicas": 0}, "min_replicas is 0"),
        ({"spread": "rack"}, "unknown failure domain level 'rack'"),
        ({"max_moves": -1}, "max_moves is -1"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"load": np.full((1, 4), np.nan)}, "layer 0, expert 0 is nan"),
        ({"load": np.full((1, 4), np.inf)}, "layer 0, expert 0 is inf"),
        ({"load": np.full((1, 4), -1.0)}, "layer 0, expert 0 is -1"),
        ({"load": np.ones(4)}, "expert load has shape"),
        ({"previous": ExpertPlacement(np.zeros((1, 4)), 4)}, "previous has"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"load": np.ones((1, 4)), "topology": Topology.uniform(2, 6), "active_ranks": [1, 1], **change}
    with pytest.raises(InvalidInputError, match=message):
        solve_placement(**arguments)
