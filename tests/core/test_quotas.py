"""Quotas: exact shares, loads that cannot be levelled further, whole tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.load import as_load, drift_load, generate_load
from elastic_ep.core.placement import ExpertPlacement
from elastic_ep.core.quotas import QUOTA_UNITS, balance_of, even_quotas, level_quotas, rank_loads, split_tokens
from elastic_ep.core.routing import RoutingTable
from elastic_ep.core.topology import Topology

FEW = settings(max_examples=80, deadline=None, derandomize=True)


@st.composite
def placed(draw):
    """(load, placement, topology): any covering placement without two replicas of an expert on a rank."""
    ep_size, per_rank = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 100_000)))
    num_experts = draw(st.integers(per_rank, 12))
    rows = np.stack([np.concatenate([rng.permutation(num_experts)[:per_rank] for _ in range(ep_size)]) for _ in range(2)])
    rows[rng.random(rows.shape) < 0.1] = -1
    scale = draw(st.sampled_from([1.0, 1e-280, 1e280, 0.0]))
    return (
        rng.lognormal(0, draw(st.sampled_from([0.3, 2.0])), (2, num_experts)) * scale,
        ExpertPlacement(rows, num_experts),
        (Topology((per_rank,) * ep_size)),
    )


@FEW
@given(placed())
def test_shares_are_exact_and_add_up(case):
    load, placement, topology = case
    quotas = level_quotas(load, placement, topology)
    rows = placement.physical_to_logical_map
    assert ((quotas * QUOTA_UNITS) % 1 == 0).all()
    assert (quotas >= 0).all()
    assert (quotas[rows == -1] == 0).all()
    for layer in range(2):
        for expert in set(rows[layer].tolist()) - {-1}:
            shares = quotas[layer][rows[layer] == expert]
            assert shares.sum() == 1.0
            assert shares.astype(np.float32).cumsum(dtype=np.float32)[-1] == 1.0


@FEW
@given(placed())
def test_no_load_can_go_to_a_less_loaded_rank(case):
    load, placement, topology = case
    quotas = level_quotas(load, placement, topology, rounds=2000)
    loads = rank_loads(load, placement, topology, quotas)
    for layer, row in enumerate(placement.physical_to_logical_map):
        close = 3e-3 * max(load[layer].sum(), 1e-300)
        for expert in set(row.tolist()) - {-1}:
            slots = np.flatnonzero(row == expert)
            ranks = topology.rank_of_slot[slots]
            taking = ranks[quotas[layer][slots] * load[layer, expert] > close]
            if len(taking):
                assert loads[layer][taking].max() <= loads[layer][ranks].min() + close


def test_one_expert_evens_out_what_others_left():
    # Rank 0 has 5 of its own, rank 1 has 1; both hold expert 2 of load 4: 0 + 4 would be level at 5, so rank 1 takes it all.
    placement = ExpertPlacement(np.array([[0, 2, 1, 2]]), 3)
    topology = Topology((2, 2))
    load = [[5.0, 1.0, 4.0]]
    quotas = level_quotas(load, placement, topology)
    assert quotas.tolist() == [[1.0, 0.0, 1.0, 1.0]]
    assert rank_loads(load, placement, topology, quotas).tolist() == [[5.0, 5.0]]
    assert rank_loads(load, placement, topology).tolist() == [[7.0, 3.0]]
    assert even_quotas(placement).tolist() == [[1.0, 0.5, 1.0, 0.5]]


def test_a_router_sends_what_quotas_say():
    placement = ExpertPlacement(np.array([[0, 1, 0, 2, 0, 3]]), 4)
    topology = Topology((2, 2, 2))
    quotas = level_quotas([[6.0, 1.0, 2.0, 3.0]], placement, topology)
    table = RoutingTable.build(0, placement, topology, quotas)
    ranks = table.destination_ranks(0, np.zeros((4000, 1), dtype=np.int64), source_rank=1, step=3)
    share = np.bincount(ranks.ravel(), minlength=3) / 4000
    np.testing.assert_allclose(share, quotas[0, [0, 2, 4]], atol=0.01)


@pytest.mark.parametrize("seed", range(30))
def test_whole_tokens(seed):
    rng = np.random.default_rng(seed)
    shares = rng.multinomial(QUOTA_UNITS, rng.dirichlet(np.ones(int(rng.integers(1, 9))))) / QUOTA_UNITS
    tokens = int(rng.integers(0, 1000))
    whole = split_tokens(shares, tokens)
    assert whole.sum() == tokens
    assert (np.abs(whole - shares * tokens) < 1).all()


def test_balance():
    assert balance_of(np.array([[1.0, 3.0], [0.0, 0.0]]), np.array([0, 1])) == pytest.approx((2 / 3 + 1) / 2)
    assert balance_of(np.array([[1.0, 3.0]]), np.array([1])) == 1.0


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(InvalidInputError, match="do not belong together"):
        level_quotas(np.ones((1, 3)), ExpertPlacement(np.array([[0, 1]]), 2), Topology((2,)))


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (np.ones(3), "has shape"),
        (np.ones((2, 0)), "has shape"),
        ([["a"]], "give numbers"),
        (np.array([[1.0, np.nan]]), "layer 0, expert 1 is nan"),
        (np.full((1, 3), 1e308), "add up to infinity"),
    ],
)
def test_loads_that_cannot_be(load, message):
    with pytest.raises(InvalidInputError, match=message):
        as_load(load)


def test_generators_are_what_they_say_and_repeat():
    for kind in ("uniform", "lognormal", "zipf", "bursty"):
        first = generate_load(kind, 3, 50, seed=4)
        assert first.shape == (3, 50)
        assert (first >= 0).all()
        np.testing.assert_array_equal(first, generate_load(kind, 3, 50, seed=4))
    assert not np.array_equal(generate_load("lognormal", 3, 50, 4), generate_load("lognormal", 3, 50, 5))
    ranked = np.sort(generate_load("zipf", 1, 50, 0)[0])[::-1]
    np.testing.assert_allclose(ranked[0] / ranked, np.arange(1, 51))
    with pytest.raises(InvalidInputError, match="unknown load generator 'gauss'"):
        generate_load("gauss", 1, 1, 0)
    load = generate_load("lognormal", 58, 256, 0)
    assert np.log(drift_load(load, 0.1, 1) / load).std() == pytest.approx(0.1, rel=0.05)
