"""Which failures lose an expert, against looking at every failure."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from elastic_ep.core import survivability
from elastic_ep.core.eplb.resilient import solve_placement
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.survivability import required_slots, survives, survives_one
from elastic_ep.core.topology import Topology


def lost_by(placement, topology, active, size):
    """Experts lost by each set of ``size`` live ranks, by looking at every set."""
    held = placement.masked(topology, active)
    before = len(held.missing_experts())
    out = {}
    for gone in combinations([r for r, a in enumerate(active) if a], size):
        left = np.where(np.isin(topology.rank_of_slot, gone), EMPTY, held.physical_to_logical_map)
        out[gone] = len(ExpertPlacement(left, placement.num_logical_experts).missing_experts()) - before
    return out


def random_case(seed):
    """A placement of any quality over up to 12 ranks, some dead."""
    rng = np.random.default_rng(seed)
    ep_size = int(rng.integers(1, 13))
    topology = Topology(tuple(rng.integers(0, 4, ep_size).tolist()), {"node": tuple(rng.choice(list("abcd"), ep_size))})
    num_experts = int(rng.integers(1, 9))
    rows = rng.integers(-1, num_experts, (2, topology.num_slots))
    active = (rng.random(ep_size) < 0.8).astype(int)
    active[rng.integers(ep_size)] = 1
    if rng.random() < 0.5:
        plan = solve_placement(rng.lognormal(size=(2, num_experts)), topology, active, min_replicas=int(rng.integers(1, 4)))
        rows = plan.placement.physical_to_logical_map
    return ExpertPlacement(rows, num_experts), topology, active


@pytest.mark.parametrize("seed", range(80))
@pytest.mark.parametrize("enumerate_all", [True, False])
def test_against_every_failure_of_up_to_three_ranks(seed, enumerate_all, monkeypatch):
    placement, topology, active = random_case(seed)
    if not enumerate_all:
        monkeypatch.setattr(survivability, "MAX_SETS", 0)
    found = survives(placement, topology, active)
    assert found.missing == len(placement.masked(topology, active).missing_experts())
    for size in range(1, min(3, int(active.sum())) + 1):
        every = lost_by(placement, topology, active, size)
        worst = found.worst_sets[size - 1]
        assert found.expected_lost[size] == pytest.approx(np.mean(list(every.values())))
        assert every[worst.ranks] == worst.lost
        assert worst.num_sets == len(every)
        if found.missing == 0:
            assert (found.any_ranks >= size) == (max(every.values()) == 0)
        if enumerate_all:
            assert worst.lost == max(every.values())
            assert worst.is_exact
            assert worst.losing_sets == sum(n > 0 for n in every.values())
            assert worst.ranks == min(s for s, n in every.items() if n == worst.lost)
        else:
            assert worst.lost <= max(every.values()) <= worst.at_most


@pytest.mark.parametrize("seed", range(40))
def test_single_domains_against_losing_them(seed):
    placement, topology, active = random_case(seed)
    found = survives(placement, topology, active)
    before = placement.masked(topology, active)
    for level in ("rank", "node"):
        labels = topology.labels(level)
        losses = {}
        for label in {labels[r] for r in np.flatnonzero(active)}:
            left = active * np.array([x != label for x in labels])
            losses[label] = len(placement.masked(topology, left).missing_experts()) - len(before.missing_experts())
        assert found.domain_losses[level] == losses
        assert found.domains[level] == (found.missing == 0 and not any(losses.values()))
        if found.missing == 0:
            assert (found.any_domains[level] >= 1) == found.domains[level]


@pytest.mark.parametrize("seed", range(60))
def test_the_short_answer_is_the_long_one(seed):
    placement, topology, active = random_case(seed)
    for where in (topology, Topology(topology.slots_per_rank)):
        found = survives(placement, where, active)
        assert survives_one(placement, where, active) == (found.any_ranks, found.any_node)


def test_worked_example():
    # Expert 0 on ranks 0 and 1, expert 1 on ranks 0 and 2, expert 2 on rank 2 alone.
    topology = Topology((2, 1, 2), {"node": ("a", "a", "b")})
    found = survives(ExpertPlacement(np.array([[0, 1, 0, 1, 2]]), 3), topology)
    assert found.any_ranks == 0
    assert found.domains == {"rank": False, "node": False}
    assert found.domain_losses == {"rank": {"0": 0, "1": 0, "2": 1}, "node": {"a": 1, "b": 1}}
    assert found.expected_lost == pytest.approx({1: 1 / 3, 2: (1 + 2 + 1) / 3, 3: 3.0})
    assert [(w.ranks, w.lost) for w in found.worst_sets] == [((2,), 1), ((0, 2), 2), ((0, 1, 2), 3)]
    assert not found.any_node


def test_many_ranks_are_exact_for_pairs_and_bracketed_for_triples():
    topology = Topology.uniform(400, 800)
    placement = solve_placement(np.ones((2, 256)), topology, np.ones(400), min_replicas=2).placement
    found = survives(placement, topology)
    assert found.any_ranks >= 1
    assert found.worst_sets[1].is_exact
    assert found.worst_sets[2].losing_sets is None
    assert found.worst_sets[2].lost <= found.worst_sets[2].at_most


def test_partners_keep_the_number_of_losing_pairs_small():
    rng = np.random.default_rng(0)
    topology = Topology.uniform(32, 544, nodes=[str(r // 8) for r in range(32)])
    plan = solve_placement(rng.lognormal(0, 1, (16, 256)), topology, np.ones(32), min_replicas=2, spread="node")
    pairs = survives(plan.placement, topology).worst_sets[1]
    assert pairs.losing_sets is not None
    assert 64 <= pairs.losing_sets <= 90, "32 ranks with four partners each make 64 pairs; at random nearly all of 496 lose something"


@pytest.mark.parametrize("seed", range(60))
def test_what_is_required_is_enough_and_not_too_much(seed):
    rng = np.random.default_rng(seed)
    num_domains = int(rng.integers(2, 5))
    nodes = [str(d) for d in range(num_domains) for _ in range(rng.integers(1, 4))]
    failures = int(rng.integers(0, num_domains))
    num_experts = int(rng.integers(1, 12))
    need = required_slots(num_experts, Topology((1,) * len(nodes), {"node": tuple(nodes)}), failures, "node")
    for per_rank, enough in ((need.slots_per_rank, True), (need.slots_per_rank - 1, False)):
        topology = Topology((per_rank,) * len(nodes), {"node": tuple(nodes)})
        again = required_slots(num_experts, topology, failures, "node")
        assert again.is_met == enough
        if per_rank * len(nodes) < num_experts:
            continue
        load = rng.lognormal(0, 1, (2, num_experts))
        plan = solve_placement(load, topology, np.ones(len(nodes)), min_replicas=failures + 1, spread="node")
        assert (plan.shortfall == 0) == enough
        assert (survives(plan.placement, topology).any_domains["node"] >= failures) == enough


def test_what_cannot_be_had_is_refused():
    topology = Topology.uniform(4, 8, nodes=["a", "a", "b", "b"])
    with pytest.raises(InvalidInputError, match="surviving any 2 of the node domains needs 3 of them, there are 2"):
        required_slots(8, topology, 2, "node")
    with pytest.raises(InvalidInputError, match="unknown failure domain level 'rack'"):
        required_slots(8, topology, 1, "rack")
