"""The seed's state record: its names, and the faults that it no longer has."""

from __future__ import annotations

import numpy as np
import pytest

from elastic_ep.core.elastic_state import ElasticEPState, healthy_rank_state
from elastic_ep.core.errors import IllegalTransitionError, InvalidInputError


def test_names_and_types_of_the_seed():
    state = ElasticEPState.healthy(3)
    assert state.active_ranks.dtype == state.last_active_ranks.dtype == state.active_ranks_cpu.dtype == np.int32
    assert state.active_ranks.tolist() == [1, 1, 1]
    assert state.is_active_equal_last()


def test_a_death_is_seen_agreed_and_synced():
    state = ElasticEPState.healthy(3)
    seen = state.active_ranks
    assert state.observe([1, 0, 1])
    assert not state.is_active_equal_last()
    assert seen.tolist() == [1, 0, 1], "the kernel's own array is changed in place"
    assert state.active_ranks_cpu.tolist() == state.last_active_ranks.tolist() == [1, 1, 1]
    state.snapshot_active_to_last()
    state.sync_active_to_cpu()
    assert state.is_active_equal_last()
    assert state.active_ranks_cpu.tolist() == [1, 0, 1]
    assert state.membership().epoch == 1
    assert state.membership().ranks == (0, 2)
    state.snapshot_active_to_last()
    assert state.epoch == 1, "no change, no epoch"


def test_a_masked_rank_comes_back_by_admission_only():
    state = ElasticEPState.healthy(2)
    state.observe([1, 0])
    with pytest.raises(IllegalTransitionError, match=r"ranks \[1\] are masked in epoch 0"):
        state.observe([1, 1])
    assert state.active_ranks.tolist() == [1, 0]
    state.admit([1])
    assert state.is_active_equal_last()


def test_empty_seats_stay_empty_until_someone_joins():
    state = ElasticEPState.healthy(2, capacity=4)
    assert state.active_ranks.tolist() == [1, 1, 0, 0]
    assert state.observe([1, 0, 0, 0])
    state.admit([3])
    assert state.active_ranks.tolist() == [1, 0, 0, 1]
    with pytest.raises(InvalidInputError, match="rank 4 has no seat"):
        state.admit([4])


def test_tensors_are_taken_and_changed_in_place():
    torch = pytest.importorskip("torch")
    mask = torch.ones(3, dtype=torch.int32)
    state = ElasticEPState(mask, healthy_rank_state(3), healthy_rank_state(3))
    assert state.observe(torch.tensor([1, 1, 0]))
    assert mask.tolist() == [1, 1, 0]
    mask[0] = 0
    assert not state.is_active_equal_last()
    state.snapshot_active_to_last()
    assert state.last_active_ranks.tolist() == [0, 1, 0]


@pytest.mark.parametrize(("mask", "message"), [([1, 1], "has 3 seats"), ([1, 2, 1], "entries are 1 for alive")])
def test_bad_masks(mask, message):
    with pytest.raises(InvalidInputError, match=message):
        ElasticEPState.healthy(3).observe(mask)


def test_bad_sizes():
    with pytest.raises(InvalidInputError, match="4 ranks for 3 seats"):
        healthy_rank_state(4, 3)
