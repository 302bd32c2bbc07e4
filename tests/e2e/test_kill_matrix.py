"""A sample of the kill matrix, another one with each commit; all of it is `make kill-matrix`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from elastic_ep.runtime.faults import POINTS
from tests.e2e import kill_matrix

NUM_CELLS = 14


def test_every_point_is_in_the_matrix():
    groups = [kill_matrix.IN_STEP, kill_matrix.IN_INSTALL, kill_matrix.IN_JOIN, kill_matrix.IN_PEER]
    assert sorted(point for group in groups for point in group) == sorted(POINTS)
    assert {cell.point for cell in kill_matrix.all_cells()} == set(POINTS)
    assert len(set(kill_matrix.all_cells())) == len(POINTS) * 4 * 5


def commit_seed() -> int:
    """From the commit under test, so that time makes the sample whole; 0 outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=8", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    return int(found.stdout, 16) if found.returncode == 0 else 0


@pytest.mark.timeout(300)
def test_a_sample_of_the_kill_matrix(checkpoint, tmp_path):
    seed = commit_seed()
    print("seed", seed)
    cells = kill_matrix.sample(seed, NUM_CELLS)
    problems = []
    for outcome in kill_matrix.run_cells(checkpoint("qwen3_moe"), tmp_path, cells, seed):
        print(f"{outcome.seconds:.1f} s {outcome.cell}")
        problems += [f"{outcome.cell}: {problem}" for problem in outcome.problems]
    assert problems == []
