"""What slots are meant to hold and what they do hold."""

from __future__ import annotations

import numpy as np
import pytest

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.placement import EMPTY, ExpertPlacement, SlotContents
from elastic_ep.core.topology import Topology


def test_maps_of_the_docstring():
    placement = ExpertPlacement(np.array([[0, 1, 2, 0], [2, 1, 0, -1]]), 3)
    assert placement.logical_to_physical_map.tolist() == [[[0, 3], [1, -1], [2, -1]], [[2, -1], [1, -1], [0, -1]]]
    assert placement.logical_replica_count.tolist() == [[2, 1, 1], [1, 1, 1]]
    assert placement.missing_experts() == []


def test_a_dead_ranks_slots_are_empty():
    placement = ExpertPlacement(np.array([[0, 1, 2, 0]]), 3).masked(Topology((2, 2)), [1, 0])
    assert placement.physical_to_logical_map.tolist() == [[0, 1, EMPTY, EMPTY]]
    assert placement.missing_experts() == [(0, 2)]


@pytest.mark.parametrize("bad", [[[3]], [[-2]]])
def test_ids_outside_the_experts_are_refused(bad):
    with pytest.raises(InvalidInputError, match="allowed: -1 to 2"):
        ExpertPlacement(np.array(bad), 3)


def test_contents_know_nothing_of_a_slot_between_order_and_report():
    contents = SlotContents(1, 2)
    contents.order(0, 0, epoch=1)
    contents.record(0, 0, expert=5, digest=9, epoch=1)
    assert contents.experts.tolist() == [[5, EMPTY]]
    contents.order(0, 0, epoch=2)
    assert contents.experts[0, 0] == EMPTY
    contents.record(0, 0, expert=5, digest=9, epoch=1)  # the report of the first order, late
    assert contents.experts[0, 0] == EMPTY
    contents.record(0, 0, expert=7, digest=3, epoch=2)
    assert contents.experts[0, 0] == 7
    assert contents.mismatches(ExpertPlacement(np.array([[5, 1]]), 8)) == [(0, 0, 5), (0, 1, 1)]


def test_a_dead_rank_takes_its_contents_with_it():
    contents = SlotContents(1, 4)
    for slot in range(4):
        contents.record(0, slot, expert=slot, digest=1)
    contents.clear_rank(Topology((2, 2)), 1)
    assert contents.experts.tolist() == [[0, 1, EMPTY, EMPTY]]


def test_a_slot_outside_is_refused():
    with pytest.raises(InvalidInputError, match=r"slot \(0, 2\)"):
        SlotContents(1, 2).record(0, 2, 1, 1)
