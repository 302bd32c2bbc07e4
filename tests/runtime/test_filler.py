"""Slots filled by several readers: what is kept, adopted, copied and read, an expert that nobody has, an order that is interrupted."""

from __future__ import annotations

import threading

import pytest

from elastic_ep.brain.messages import LoadedSlot, LoadOrder
from elastic_ep.core.errors import CheckpointError
from elastic_ep.runtime.faults import FaultPlan
from elastic_ep.runtime.filler import Filler
from elastic_ep.runtime.weights.base import Loaded
from elastic_ep.runtime.weights.sources import Peers, Sources

FIRST, NUM_SLOTS = 8, 12


class FakeSlots:
    """Twelve slots in one layer. Reads of other experts than `slow` ones end at once; those wait for `go`."""

    shape = (1, 32, 64)
    checkpoint = backup = None
    wait_s = 10.0

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.staged: dict[int, int] = {}
        self.lacks: set[int] = set()
        self.slow: set[int] = set()
        self.go = threading.Event()
        self.together = threading.Barrier(readers)
        self.meets = False
        self.reads: list[tuple[int, int]] = []
        self.under_way = 0

    def bytes_of(self, layer, expert):
        return None

    def adopt(self, load):
        if self.staged.get(load.local_slot) != load.expert:
            return None
        return 1000 + self.staged.pop(load.local_slot)

    def load(self, load, sources, digest):
        self.under_way += 1
        try:
            if self.meets:
                self.together.wait(self.wait_s)
            if load.expert in self.slow:
                assert self.go.wait(self.wait_s)
            if load.expert in self.lacks:
                raise CheckpointError(f"nobody has expert {load.expert}")
            self.reads.append((load.local_slot, load.expert))
            return Loaded(1000 + load.expert, "checkpoint", 64, (f"peer: {load.expert}",) if load.expert == 3 else ())
        finally:
            self.under_way -= 1


def order(slot: int, expert: int, source: str = "checkpoint") -> LoadOrder:
    return LoadOrder(0, FIRST + slot, expert, source)


def filler(slots: FakeSlots, held: dict) -> Filler:
    return Filler(slots, FIRST, Sources(slots, Peers(0, "unix:/none", "", (1, 1, 64))), held, FaultPlan())


@pytest.fixture(params=[1, 3])
def slots(request) -> FakeSlots:
    return FakeSlots(request.param)


def test_all_ways(slots):
    held = {(0, FIRST): (5, 1005), (0, FIRST + 1): (6, 1006), (0, FIRST + 2): (7, 1007)}
    slots.staged = {1: 9}
    loads = [order(3, 3), order(0, 5), order(1, 9), order(2, 5, "local"), *(order(slot, slot + 10) for slot in range(4, NUM_SLOTS))]
    out = filler(slots, held).fill(loads, lambda: False)
    assert not out.failure
    assert not out.is_interrupted
    assert held == {(0, load.slot): (load.expert, 1000 + load.expert) for load in loads}
    assert set(out.slots) == {LoadedSlot(0, load.slot, load.expert, 1000 + load.expert) for load in loads}
    assert len(out.slots) == len(loads)
    assert slots.reads[0] == (2, 5), "copied before the slot that it is copied from may be overwritten"
    assert out.by_source == {"checkpoint": 64 * 10}
    assert out.errors == ["peer: 3"]


def test_readers_read_at_the_same_time():
    """A read that waits for two others would wait for ever if they came one after the other."""
    slots, held = FakeSlots(3), {}
    slots.meets = True
    out = filler(slots, held).fill([order(slot, slot) for slot in range(6)], lambda: False)
    assert len(out.slots) == len(held) == 6


def test_an_expert_that_nobody_has(slots):
    held = {(0, FIRST + slot): (30, 1030) for slot in range(NUM_SLOTS)}
    slots.lacks = {2}
    out = filler(slots, held).fill([order(slot, slot) for slot in range(NUM_SLOTS)], lambda: False)
    assert out.failure == "nobody has expert 2"
    assert slots.under_way == 0
    assert (0, FIRST + 2) not in held
    read = {(0, FIRST + slot): (expert, 1000 + expert) for slot, expert in slots.reads}
    assert {key: value for key, value in held.items() if value[0] != 30} == read, "what was read is held, and told"
    assert {(load.layer, load.slot): (load.expert, load.digest) for load in out.slots} == read
    assert (0, FIRST + NUM_SLOTS - 1) in held, "the rest was not begun"


def test_an_interrupt_waits_for_the_reads_under_way(slots):
    held = {(0, FIRST + slot): (30, 1030) for slot in range(NUM_SLOTS)}
    slots.slow = {1}
    asked = iter([False] * (NUM_SLOTS + 6))

    def is_interrupted() -> bool:
        if next(asked, None) is not None:
            slots.go.set()
            return False
        return True

    out = filler(slots, held).fill([order(slot, slot) for slot in range(NUM_SLOTS)], is_interrupted)
    assert out.is_interrupted
    assert not out.failure
    assert slots.under_way == 0
    assert 2 <= len(out.slots) < NUM_SLOTS
    assert sorted((load.slot - FIRST, load.expert) for load in out.slots) == sorted(slots.reads)
    lost = [slot for slot in range(NUM_SLOTS) if (0, FIRST + slot) not in held]
    assert not set(lost) & {slot for slot, _ in slots.reads}
