"""Experts read beside the steps: several at a time, within the budget, and no answer to an order that was given up."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import pytest
import torch

from elastic_ep.brain.messages import LoadOrder, Stage, Staged, StageFailed
from elastic_ep.core.errors import CheckpointError
from elastic_ep.runtime.faults import FaultPlan
from elastic_ep.runtime.stager import Stager
from elastic_ep.runtime.weights.base import Loaded
from elastic_ep.runtime.weights.sources import Peers, Sources

BYTES, WAIT_S = 256, 20.0


class FakeSlots:
    """Whoever stages expert 9 fails; while `gate` is closed nothing is done."""

    shape = (2, 16, BYTES)
    checkpoint = backup = None

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.gate = threading.Event()
        self.gate.set()
        self.begun: queue.Queue[int] = queue.Queue()
        self.under_way, self.most = 0, 0
        self.staged: list[int] = []
        self._lock = threading.Lock()

    def stage(self, load: Any, sources: Any, digest: int | None) -> Loaded:
        with self._lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        self.begun.put(load.expert)
        assert self.gate.wait(WAIT_S)
        with self._lock:
            self.under_way -= 1
            self.staged.append(load.expert)
        if load.expert == 9:
            raise CheckpointError("no source has it")
        return Loaded(load.expert, "checkpoint", BYTES)

    def drop_staged(self) -> None:
        self.staged.clear()

    def bytes_of(self, layer: int, expert: int) -> torch.Tensor | None:
        return None


class NoUpkeep:
    def step(self) -> float:
        return WAIT_S


class Bench:
    """A stager and what it has said."""

    def __init__(self, readers: int) -> None:
        self.slots = FakeSlots(readers)
        self.said: queue.Queue[Any] = queue.Queue()
        slots: Any = self.slots
        upkeep: Any = NoUpkeep()
        self.stager = Stager(
            slots,
            0,
            lambda: Sources(slots, Peers(0, "unix:/none", "", (2, 16, BYTES))),
            upkeep,
            self.said.put,
            FaultPlan(),
            lambda order: None,
        )

    def order(self, change: int, experts: list[int], bytes_per_s: float = 0.0) -> None:
        loads = tuple(LoadOrder(0, i, expert) for i, expert in enumerate(experts))
        self.stager.order(Stage(change, loads, bytes_per_s, {}))


@pytest.mark.parametrize("readers", [1, 3])
def test_an_order_is_read_by_so_many_readers_and_answered(readers: int) -> None:
    bench = Bench(readers)
    bench.slots.gate.clear()
    bench.order(1, list(range(8)))
    for _ in range(readers):
        bench.slots.begun.get(timeout=WAIT_S)
    bench.slots.gate.set()
    answer = bench.said.get(timeout=WAIT_S)
    assert (type(answer), answer.change, answer.bytes_read) == (Staged, 1, {"checkpoint": 8 * BYTES})
    assert bench.slots.most == readers
    assert sorted(bench.slots.staged) == list(range(8))


@pytest.mark.parametrize("readers", [1, 3])
def test_the_budget_holds_for_a_short_order(readers: int) -> None:
    bench = Bench(readers)
    started = time.monotonic()
    bench.order(1, [0, 1], bytes_per_s=10 * BYTES)
    assert isinstance(bench.said.get(timeout=WAIT_S), Staged)
    assert time.monotonic() - started >= 0.2


@pytest.mark.parametrize("readers", [1, 3])
def test_an_order_that_is_given_up_is_not_answered(readers: int) -> None:
    bench = Bench(readers)
    bench.slots.gate.clear()
    bench.order(1, [0])
    bench.slots.begun.get(timeout=WAIT_S)
    bench.stager.cancel()
    bench.slots.gate.set()
    bench.order(2, [5])
    assert bench.said.get(timeout=WAIT_S).change == 2


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_an_order_that_is_given_up_is_not_read_to_its_end(readers: int) -> None:
    """Only what was begun is: a recovery needs the disk and the memory for what somebody waits for."""
    bench = Bench(readers)
    bench.slots.gate.clear()
    bench.order(1, [*range(9), *range(10, 16), 0, 1])
    for _ in range(readers):
        bench.slots.begun.get(timeout=WAIT_S)
    bench.stager.cancel()
    bench.order(2, [5])
    bench.slots.gate.set()
    assert bench.said.get(timeout=WAIT_S) == Staged(2, {"checkpoint": BYTES}, ())
    begun = []
    while not bench.slots.begun.empty():
        begun.append(bench.slots.begun.get())
    assert begun == [5]


@pytest.mark.parametrize("readers", [1, 3])
def test_an_expert_without_a_source_fails_the_order_once_nobody_reads(readers: int) -> None:
    bench = Bench(readers)
    bench.order(1, [0, 9, 1, 2, 3])
    answer = bench.said.get(timeout=WAIT_S)
    assert isinstance(answer, StageFailed)
    assert "no source has it" in answer.error
    assert bench.slots.under_way == 0
