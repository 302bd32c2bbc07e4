"""The compiled loops and the Python form give the very same results, on random problems of every kind."""

from __future__ import annotations

import numpy as np
import pytest

from elastic_ep.core.eplb import kernels
from elastic_ep.core.eplb.kernels import Problem, quota_units, solve_layers
from elastic_ep.core.eplb.partners import offsets, partner_ranks
from elastic_ep.core.topology import Topology

pytestmark = pytest.mark.skipif(kernels.native is None, reason="nothing was compiled here")

FIELDS = ("rows", "reference", "covers", "peak", "bound", "moves", "fresh", "steps", "trace_moves", "trace_peak")


def assert_same(problem, load, held=None, limits=None):
    compiled = solve_layers(problem, load, held, limits, 40, kernels.native)
    plain = solve_layers(problem, load, held, limits, 40, None)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(compiled, name), getattr(plain, name), err_msg=name)
    arguments = (load, compiled.rows, problem.rank_of_slot, len(problem.alive), 32, 65536)
    np.testing.assert_array_equal(quota_units(*arguments, kernels.native), quota_units(*arguments, None))
    return compiled


def random_load(rng, shape):
    kind = rng.integers(5)
    if kind == 0:
        return np.zeros(shape)
    if kind == 1:
        return rng.integers(0, 4, shape).astype(float)
    if kind == 2:
        return np.minimum(rng.zipf(1.5, shape), 1000).astype(float)
    if kind == 3:
        return rng.lognormal(0, 20, shape)
    return rng.lognormal(0, 1.5, shape)


@pytest.mark.parametrize("seed", range(150))
def test_small_problems(seed):
    rng = np.random.default_rng(seed)
    ep_size = int(rng.integers(1, 12))
    slots = rng.integers(0, 6, ep_size) if rng.random() < 0.5 else np.full(ep_size, rng.integers(1, 6))
    alive = rng.random(ep_size) < 0.8
    topology = Topology(tuple(slots.tolist()))
    live = int(alive[topology.rank_of_slot].sum())
    if live == 0:
        return
    shape = (2, int(rng.integers(1, live + 1)))
    domain = np.unique(rng.integers(0, max(1, ep_size // 2), ep_size), return_inverse=True)[1]
    usable = {int(domain[r]) for r in range(ep_size) if alive[r] and slots[r]}
    need = min(int(rng.integers(1, 4)), len(usable))
    partners = partner_ranks(domain.tolist(), slots.tolist()) if need > 1 else [[] for _ in range(ep_size)]
    tolerance = float(rng.choice([0.0, 0.02, 0.1]))
    problem = Problem(topology.rank_of_slot, alive, domain, partners, need, tolerance, float(rng.choice([-1.0, tolerance / 4])))
    load = random_load(rng, shape)
    held = None
    if rng.random() < 0.7:
        held = np.where(alive[topology.rank_of_slot], rng.integers(-1, shape[1], (2, topology.num_slots)), -1)
        if rng.random() < 0.5:
            everyone = Problem(topology.rank_of_slot, slots >= 0, domain, partners, need, tolerance, -1.0)
            before = assert_same(everyone, load * rng.lognormal(0, 0.3, shape)).rows
            held = np.where(alive[topology.rank_of_slot], before, -1)
    limits = rng.integers(0, 5, (2, 3)) if held is not None and rng.random() < 0.3 else None
    assert_same(problem, load, held, limits)


@pytest.mark.parametrize(
    ("num_experts", "ep_size", "num_slots", "need", "num_domains"),
    [(256, 32, 288, 1, 32), (128, 16, 160, 1, 16), (64, 8, 208, 3, 4), (96, 16, 224, 2, 4), (96, 50, 100, 1, 50), (12, 70, 140, 2, 70)],
)
def test_larger_problems(num_experts, ep_size, num_slots, need, num_domains):
    domain = np.arange(ep_size) // (ep_size // num_domains)
    topology = Topology.uniform(ep_size, num_slots)
    partners = partner_ranks(domain.tolist(), topology.slots_per_rank) if need > 1 else [[] for _ in range(ep_size)]
    load = np.random.default_rng(num_slots).lognormal(0, 1, (1, num_experts))
    problem = Problem(topology.rank_of_slot, np.ones(ep_size, dtype=bool), domain, partners, need, 0.02, 0.005)
    first = assert_same(problem, load)
    alive = np.arange(ep_size) != 2
    held = np.where(alive[topology.rank_of_slot], first.rows, -1)
    assert_same(Problem(topology.rank_of_slot, alive, domain, partners, need, 0.02, 0.005), load, held)


def test_partners_are_few_elsewhere_and_mutual():
    for domain in (list(range(32)), [r // 8 for r in range(32)], [r // 4 for r in range(8)], [0, 0, 0, 1, 1, 2], list(range(3)), [0, 0]):
        partners = partner_ranks(domain, [1] * len(domain))
        for rank, others in enumerate(partners):
            assert len(others) <= 4
            assert all(domain[rank] != domain[other] and rank in partners[other] for other in others)
            assert others or len(set(domain)) == 1
    assert offsets(32, 4) == [1, 14]


def test_partners_join_all_ranks():
    for domain in (list(range(32)), [r // 8 for r in range(32)], list(range(5)), [r // 2 for r in range(6)]):
        partners = partner_ranks(domain, [1] * len(domain))
        reached, todo = {0}, [0]
        while todo:
            new = set(partners[todo.pop()]) - reached
            reached |= new
            todo += new
        assert reached == set(range(len(domain)))
