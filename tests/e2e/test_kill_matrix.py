"""A sample of the kill matrix, another one with each commit; all of it is `make kill-matrix`."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from elastic_ep.runtime.faults import AGENT_POINTS, POINTS, SHELL_POINTS, parse_fault
from tests.e2e import kill_cells, kill_matrix
from tests.e2e.kill_cells import EP_SIZE, JOINER, Setting

NUM_CELLS = {Setting.PLAIN: 11, Setting.SOCKETS: 1, Setting.BACKUP: 2, Setting.AGENTS: 2}


def test_every_point_is_in_the_matrix():
    assert sorted(point for group in kill_cells.GROUPS for point in group) == sorted(POINTS)
    assert {cell.point for cell in kill_cells.all_cells()} == set(POINTS)
    assert len(set(kill_cells.all_cells())) == len(POINTS) * 4 * 5


@pytest.mark.parametrize("seed", range(3))
def test_every_cell_has_faults_at_its_point(seed):
    """As many as it says, in different processes, each after one that can happen; the rank is one that there is."""
    rng = random.Random(seed)
    for cell in kill_cells.all_cells():
        cast = kill_cells.cast_of(cell, rng.sample(range(EP_SIZE), 3), [5] * EP_SIZE, rng)
        faults = kill_cells.faults_of(cell, cast, rng)
        own = [f for f in faults if f["point"] == cell.point and f["action"] == cell.action]
        assert own, cell
        if cell.who == "two at once":
            assert len(own) == 2, cell
            assert len({f["rank"] for f in own}) == (1 if own[0]["rank"] == -1 else 2), cell
        for place, fault in enumerate(faults):
            assert parse_fault(**fault).after < place, cell
            assert fault["rank"] in range(-1, JOINER + 1), cell
            assert fault["point"] not in AGENT_POINTS or fault["rank"] in kill_cells.AGENT_RANKS, cell
            assert fault["point"] not in SHELL_POINTS or fault["rank"] >= 0, cell
        if cell.who == "in a recovery" and cell.point not in kill_cells.SHELL_OPERATION:
            assert any(f["point"] == "step_begin" and f["action"] == "kill" for f in faults), cell


def commit_seed() -> int:
    """From the commit under test, so that time makes the sample whole; 0 outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=8", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    return int(found.stdout, 16) if found.returncode == 0 else 0


@pytest.mark.timeout(600)
def test_a_sample_of_the_kill_matrix(checkpoint, tmp_path):
    seed = commit_seed()
    print("seed", seed)
    cells = kill_cells.sample(seed, NUM_CELLS)
    problems = []
    for outcome in kill_matrix.run_all(checkpoint("qwen3_moe"), tmp_path, cells, seed, jobs=2):
        print(f"{outcome.seconds:.1f} s {outcome.cell}")
        problems += [f"{outcome.cell}: {problem}" for problem in outcome.problems]
    assert problems == []
