"""Months of failures on the real membership, planner and installs; time and bytes by price."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from elastic_ep.brain import planner
from elastic_ep.cli.main import main
from elastic_ep.sim.capacity.group import HOUR_S, Group
from elastic_ep.sim.capacity.report import figures, mean_capacity, union_s
from elastic_ep.sim.capacity.setup import Prices, Setup

SMALL = Setup(8, 5, 4, 3, 16, 1_000_000, 3)


def run(setup=SMALL, rate=1e-3, hours=2000.0, seed=1):
    history = Group(setup, rate, seed).run(hours)
    return history, figures(setup, history, hours)


def test_every_failure_is_recovered_from_and_rejoined():
    history, found = run()
    assert 8 < found["failures"] < 24
    assert abs(found["failures"] - found["rejoins"]) <= 1
    prices = SMALL.prices
    least = prices.detect_s + prices.fence_s + prices.plan_s + prices.install_s + prices.resume_s
    assert found["failure_pause_s"]["median"] == pytest.approx(least, rel=0.02)
    assert found["paused_s"] == pytest.approx(union_s([(p.start_s, p.seconds) for p in history.pauses], 2000 * HOUR_S))
    assert 0.98 < found["mean_capacity"] < 1.0


def test_the_same_seed_gives_the_same_figures():
    first, second = (run(seed=5)[1] for _ in range(2))
    assert {**first, "solve_ms": 0} == {**second, "solve_ms": 0}
    assert run(seed=6)[1]["paused_s"] != first["paused_s"]


def test_lost_experts_cost_what_their_bytes_take():
    """One slot for each expert: a death loses two of each layer, which come from storage before serving goes on."""
    tight = replace(SMALL, slots_per_rank=3, expert_bytes=10**9)
    found = run(tight)[1]
    assert found["experts_lost"] > 0
    assert found["bytes_moved"]["checkpoint"] >= found["experts_lost"] * 10**9
    assert found["failure_pause_s"]["median"] > run()[1]["failure_pause_s"]["median"] + 0.2


def test_no_failures_cost_nothing():
    found = run(rate=0.0, hours=100.0)[1]
    assert found["failures"] == 0
    assert found["availability"] == 1.0
    assert found["mean_capacity"] == pytest.approx(1.0)


def test_overlapping_pauses_count_once():
    assert union_s([(0.0, 10.0), (5.0, 10.0), (100.0, 5.0)], 102.0) == pytest.approx(17.0)


def test_mean_capacity_weighs_by_time():
    history = run(rate=0.0)[0]
    history.capacity = [(0.0, 1.0), (50.0, 0.0), (60.0, 0.5)]
    assert mean_capacity(history, 100.0) == pytest.approx(0.7)


def test_a_slower_replacement_leaves_less_capacity():
    slow = replace(SMALL, prices=Prices(replace_s=12 * HOUR_S))
    assert run(slow)[1]["mean_capacity"] < run()[1]["mean_capacity"] - 0.005


def test_an_even_load_places_all_layers_alike():
    """While no expert is lost. So one layer may stand for all where there are too many to place."""
    settings, topology = Setup(16, 3, 4, 4, 24, 1, 4).brain_settings().plan, Setup(16, 3, 4, 4, 24, 1, 4).topology()
    rows = np.full((4, 48), -1)
    for active in ((1,) * 16, (1,) * 5 + (0,) + (1,) * 10):
        rows = planner.plan(settings, topology, active, rows).placement.physical_to_logical_map
        assert (rows == rows[0]).all()
    rows = planner.plan_change(settings, topology, (1,) * 16, rows)[-1].placement.physical_to_logical_map
    assert (rows == rows[0]).all()


@pytest.mark.parametrize("ranks", [8, 512])
def test_small_and_large_groups(ranks, capsys):
    hours = 40_000 // ranks
    arguments = ["simulate", "--hours", str(hours), "--ranks", str(ranks), "--model-shape", "2x64", "--ranks-per-node", "4", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == ranks
    assert found["failures"] > 0
    restart = next(other for other in found["others"] if other["name"] == "restart everything")
    assert found["paused_s"] < restart["paused_s"] / 10


def test_a_recorded_load_is_planned_for(tmp_path, capsys):
    load = np.random.default_rng(3).lognormal(0, 1, (2, 16))
    np.savez(tmp_path / "loads.npz", load=load)
    arguments = ["simulate", "--hours", "3000", "--ranks", "4", "--model-shape", "2x16", "--trace", str(tmp_path / "loads.npz"), "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["placed_layers"] == 2
    assert main([*arguments[:-1], "--model-shape", "2x8"]) == 2
    assert "holds loads of (2, 16)" in capsys.readouterr().err


def test_the_text_names_everyone(capsys):
    assert main(["simulate", "--hours", "500", "--ranks", "8", "--model-shape", "2x16", "--failure-rate", "1e-3"]) == 0
    shown = capsys.readouterr().out
    for name in ("elastic-ep (simulated)", "restart everything", "SGLang elastic EP", "EEP", "vLLM"):
        assert name in shown
