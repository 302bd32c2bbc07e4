"""Ranks that stop answering in a kernel-masked backend: masked after `timeout_us`, named, bypassed, replaced; what a void step leaves."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from elastic_ep.core.elastic_state import ElasticEPState
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.runtime.dispatch.base import DispatchHandle, FailureKind, Interrupted, PeerFailed, StepPoint
from tests.dispatch.dispatch_cases import Batch, make_batch, make_routing, run_experts
from tests.dispatch.dispatch_world import run_ranks
from tests.integrations.fake_fabric import ContractError
from tests.integrations.test_kernel_masked import HIDDEN, check, connect, run_layer, run_layers, start
from tests.integrations.worlds import BACKENDS, CONNECT_S, KernelWorld

pytestmark = pytest.mark.timeout(60)
TIMEOUT_S = 0.25
EXPERTS = 8
ONE_EACH = ("mooncake", "nixl")


def make_step(seed: int, ranks: list[int], epoch: int) -> tuple[RoutingTable, dict[int, Batch]]:
    rng = np.random.default_rng(seed)
    batches = {r: make_batch(rng, int(rng.integers(0, 6)), 3, EXPERTS, HIDDEN, torch.bfloat16) for r in ranks}
    return make_routing(rng, ranks, EXPERTS, epoch=epoch, ep_size=4), batches


def run_steps(world: KernelWorld, ranks: list[int], epoch: int, count: int = 3) -> None:
    """Whole steps of two layers, each sum looked at."""
    for step in range(count):
        routing, batches = make_step(100 * epoch + step, ranks, epoch)
        for layer in range(2):
            check(world, batches, run_layers(world, batches, routing, StepPoint(epoch, step, layer)))


def run_until_failed(world: KernelWorld, rank: int, batch: Batch, routing: RoutingTable, epoch: int, step: int = 50) -> Any:
    """A step as an engine runs it: layers until one fails."""
    for layer in range(2):
        out = run_layer(world, rank, batch, routing, StepPoint(epoch, step, layer))
        if not isinstance(out, torch.Tensor):
            return out
    return None


def fail_step(world: KernelWorld, ranks: list[int], epoch: int, victims: dict[int, str]) -> dict[int, Any]:
    """A step in which the victims stop before the given phase of its first layer. Returns what it came to for the others."""
    routing, batches = make_step(7, ranks, epoch)

    def stop_before(rank: int, phase: str) -> None:
        if phase == "combine":
            batch = batches[rank]
            world.ranks[rank].dispatch(batch.x, batch.topk_ids, batch.topk_weights, routing, StepPoint(epoch, 50, 0))

    bodies: dict[int, Any] = {r: lambda r=r: run_until_failed(world, r, batches[r], routing, epoch) for r in ranks if r not in victims}
    bodies.update({r: lambda r=r, phase=phase: stop_before(r, phase) for r, phase in victims.items()})
    outcomes = world.run(bodies)
    return {r: outcomes[r] for r in ranks if r not in victims}


@pytest.mark.parametrize(
    ("backend", "phase"),
    [(b, p) for b in ONE_EACH for p in ("dispatch", "combine")] + [("mooncake-own", "combine"), ("nixl-own", "dispatch")],
)
def test_a_rank_that_stops_is_named_after_the_timeout_and_bypassed(make_kernel_world: Any, backend: str, phase: str) -> None:
    world = make_kernel_world(backend, 4, timeout_us=int(TIMEOUT_S * 1e6))
    start(world, 0, 1, 2, 3)
    run_steps(world, [0, 1, 2, 3], 1)
    began = time.monotonic()
    outcomes = fail_step(world, [0, 1, 2, 3], 1, {2: phase})
    took_s = time.monotonic() - began
    assert outcomes == dict.fromkeys((0, 1, 3), PeerFailed({2: FailureKind.DEADLINE}))
    assert TIMEOUT_S <= took_s < TIMEOUT_S + 3
    batch = make_step(7, [0, 1, 2, 3], 1)
    assert run_layer(world, 0, batch[1][0], batch[0], StepPoint(1, 51, 0)) == outcomes[0], "the epoch is over"
    assert connect(world, 0, 1, 3) == dict.fromkeys((0, 1, 3))
    run_steps(world, [0, 1, 3], 2)


@pytest.mark.parametrize("backend", ONE_EACH)
def test_two_at_once_then_one_then_alone(make_kernel_world: Any, backend: str) -> None:
    world = make_kernel_world(backend, 4, timeout_us=int(TIMEOUT_S * 1e6))
    start(world, 0, 1, 2, 3)
    both = PeerFailed({0: FailureKind.DEADLINE, 3: FailureKind.DEADLINE})
    assert fail_step(world, [0, 1, 2, 3], 1, {0: "dispatch", 3: "dispatch"}) == {1: both, 2: both}
    connect(world, 1, 2)
    run_steps(world, [1, 2], 2)
    assert fail_step(world, [1, 2], 2, {1: "combine"}) == {2: PeerFailed({1: FailureKind.DEADLINE})}
    assert connect(world, 2) == {2: None}
    run_steps(world, [2], 3)


@pytest.mark.parametrize("backend", ONE_EACH)
def test_a_new_process_takes_the_seat(make_kernel_world: Any, backend: str) -> None:
    world = make_kernel_world(backend, 4, timeout_us=int(TIMEOUT_S * 1e6))
    start(world, 0, 1, 2, 3)
    fail_step(world, [0, 1, 2, 3], 1, {2: "combine"})
    connect(world, 0, 1, 3)
    run_steps(world, [0, 1, 3], 2, count=1)
    world.ranks[2].close()
    world.start(2)
    assert connect(world, 0, 1, 2, 3) == dict.fromkeys(range(4))
    run_steps(world, [0, 1, 2, 3], 3)


@pytest.mark.parametrize("backend", ONE_EACH)
def test_a_seat_may_change_hands_from_one_epoch_to_the_next(make_kernel_world: Any, backend: str) -> None:
    world = make_kernel_world(backend, 4)
    start(world, 0, 1, 2, 3)
    run_steps(world, [0, 1, 2, 3], 1, count=1)
    world.start(3)
    assert connect(world, 0, 1, 2, 3) == dict.fromkeys(range(4))
    run_steps(world, [0, 1, 2, 3], 2)


def leave_rows_behind(world: KernelWorld) -> None:
    """Ranks 0 and 2 dispatch, rank 1 does not: their rows and counts lie in its buffer. Then all three go on together."""
    start(world, 0, 1, 2)
    outcomes = fail_step(world, [0, 1, 2], 1, {1: "dispatch"})
    assert outcomes == dict.fromkeys((0, 2), PeerFailed({1: FailureKind.DEADLINE}))
    assert connect(world, 0, 1, 2) == dict.fromkeys(range(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_void_step_left_is_not_taken_for_rows_of_a_later_one(make_kernel_world: Any, backend: str) -> None:
    world = make_kernel_world(backend, 3, timeout_us=int(TIMEOUT_S * 1e6))
    leave_rows_behind(world)
    run_steps(world, [0, 1, 2], 2)


@pytest.mark.parametrize("backend", ONE_EACH)
def test_without_the_clearing_it_would_be(make_kernel_world: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_ep.integrations.kernel_masked.KernelMaskedDispatcher._clear_buffers", lambda self: None)
    world = make_kernel_world(backend, 3, timeout_us=int(TIMEOUT_S * 1e6))
    leave_rows_behind(world)
    with pytest.raises((AssertionError, ContractError)):
        run_steps(world, [0, 1, 2], 2)


@pytest.mark.parametrize("backend", ONE_EACH)
def test_without_the_void_combine_halves_would_be_out_of_step(
    make_kernel_world: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_ep.integrations.kernel_masked.KernelMaskedDispatcher._end_pair", lambda self: None)
    world = make_kernel_world(backend, 3, timeout_us=int(TIMEOUT_S * 1e6))
    start(world, 0, 1, 2)
    fail_step(world, [0, 1, 2], 1, {1: "dispatch"})
    peers = world.peers(0, 1, 2)
    with pytest.raises(ContractError, match="out of step"):
        run_ranks({r: lambda r=r: world.ranks[r].connect(peers, 0.3) for r in peers})


@pytest.mark.parametrize("backend", ONE_EACH)
def test_cut_names_a_dead_rank(make_kernel_world: Any, backend: str) -> None:
    """Mooncake's kernels stop waiting at once, NIXL's at their timeout."""
    world = make_kernel_world(backend, 3, timeout_us=20_000_000 if backend == "mooncake" else int(TIMEOUT_S * 1e6))
    start(world, 0, 1, 2)
    routing, batches = make_step(7, [0, 1, 2], 1)
    begun = threading.Barrier(3)

    def run(rank: int) -> Any:
        begun.wait(CONNECT_S)
        return run_until_failed(world, rank, batches[rank], routing, 1)

    def tell() -> None:
        begun.wait(CONNECT_S)
        for rank in (0, 2):
            world.ranks[rank].cut(1)

    began = time.monotonic()
    outcomes = world.run({0: lambda: run(0), 2: lambda: run(2), 1: tell})
    assert time.monotonic() - began < 10
    assert outcomes[0] == outcomes[2] == PeerFailed({1: FailureKind.CLOSED})
    connect(world, 0, 2)
    run_steps(world, [0, 2], 2)


@pytest.mark.parametrize("backend", ONE_EACH)
def test_an_interrupt_ends_the_step(make_kernel_world: Any, backend: str) -> None:
    """Mooncake's kernels stop waiting at once, NIXL's at their timeout; either way it is an interrupt, nobody is accused."""
    world = make_kernel_world(backend, 3, timeout_us=20_000_000 if backend == "mooncake" else int(TIMEOUT_S * 1e6))
    start(world, 0, 1, 2)
    routing, batches = make_step(7, [0, 1, 2], 1)
    for rank in (0, 2):
        world.interrupts[rank].send(b"!")
    began = time.monotonic()
    outcomes = world.run({r: lambda r=r: run_until_failed(world, r, batches[r], routing, 1) for r in (0, 2)})
    assert outcomes == {0: Interrupted(), 2: Interrupted()}
    assert time.monotonic() - began < 10
    with pytest.raises(InvalidInputError, match="connect the epoch's peers first"):
        run_layer(world, 0, batches[0], routing, StepPoint(1, 60, 0))


def test_a_late_writer_reaches_nobody_after_mooncake_made_new_connections(make_kernel_world: Any) -> None:
    world = make_kernel_world("mooncake", 4, timeout_us=int(TIMEOUT_S * 1e6))
    start(world, 0, 1, 2, 3)
    fail_step(world, [0, 1, 2, 3], 1, {3: "dispatch"})
    connect(world, 0, 1, 2)
    routing, batches = make_step(7, [0, 1, 2, 3], 1)
    late: list[Any] = []
    # its library still believes in the old members, as a process does that was stopped
    world.libraries[3].buffers[0]._epoch = world.cluster.epoch
    woken = threading.Thread(target=lambda: late.append(run_until_failed(world, 3, batches[3], routing, 1)))
    woken.start()
    run_steps(world, [0, 1, 2], 2)
    woken.join(20)
    assert late == [PeerFailed(dict.fromkeys((0, 1, 2), FailureKind.DEADLINE))]


@pytest.mark.parametrize("backend", ONE_EACH)
def test_who_does_not_come_is_named(make_kernel_world: Any, backend: str) -> None:
    world = make_kernel_world(backend, 3)
    for rank in range(3):
        world.start(rank)
    peers = world.peers(0, 1, 2)
    outcomes = run_ranks({r: lambda r=r: world.ranks[r].connect(peers, 0.3) for r in (0, 2)})
    assert outcomes == dict.fromkeys((0, 2), PeerFailed({1: FailureKind.DEADLINE}))
    assert connect(world, 0, 1, 2) == dict.fromkeys(range(3))
    run_steps(world, [0, 1, 2], 1, count=1)


@pytest.mark.parametrize("backend", ONE_EACH)
def test_rows_that_no_batch_has_are_a_broken_peer(make_kernel_world: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_kernel_world(backend, 2)
    start(world, 0, 1)
    routing, batches = make_step(7, [0, 1], 1)
    dispatcher = world.ranks[0]
    run_dispatch = type(dispatcher)._run_dispatch

    def spoiled(self: Any, x: torch.Tensor, physical: torch.Tensor) -> Any:
        packed = run_dispatch(self, x, physical)
        while not self._stream().query():
            pass
        if self.rank == 0:
            packed.layout[0, 1] += 10_000
        return packed

    monkeypatch.setattr(type(dispatcher), "_run_dispatch", spoiled)
    outcomes = run_ranks(
        {
            r: lambda r=r: world.ranks[r].dispatch(batches[r].x, batches[r].topk_ids, batches[r].topk_weights, routing, StepPoint(1, 0, 0))
            for r in (0, 1)
        }
    )
    assert outcomes[0] == PeerFailed({1: FailureKind.PROTOCOL})
    assert isinstance(outcomes[1], DispatchHandle)
    assert run_experts(outcomes[1]).shape == outcomes[1].rows.shape


def test_the_seeds_state_takes_the_kernels_mask(make_kernel_world: Any) -> None:
    world = make_kernel_world("mooncake", 4, timeout_us=int(TIMEOUT_S * 1e6))
    start(world, 0, 1, 2, 3)
    state = ElasticEPState.healthy(4)
    mask = world.ranks[0].active_ranks
    state.observe(mask)
    assert state.is_active_equal_last()
    fail_step(world, [0, 1, 2, 3], 1, {2: "combine"})
    state.observe(mask)
    assert not state.is_active_equal_last()
    assert mask is world.ranks[0].active_ranks
    assert mask.tolist() == [1, 1, 0, 1]
    assert world.ranks[0].timeout_us == int(TIMEOUT_S * 1e6)


@pytest.mark.parametrize("backend", ["mooncake-own", "nixl"])
def test_random_failures_change_no_sum(make_kernel_world: Any, backend: str) -> None:
    """Epoch after epoch: some ranks stop at a random phase, the seats are taken again, or the rank was only late and goes on."""
    seed = 40 + BACKENDS.index(backend)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    world = make_kernel_world(backend, 4, seed, timeout_us=int(TIMEOUT_S * 1e6))
    start(world, 0, 1, 2, 3)
    ranks = [0, 1, 2, 3]
    for epoch in range(1, 8, 2):
        run_steps(world, ranks, epoch, count=1)
        # Mooncake's coordinator lives on rank 0, and needs it
        victims = {int(r): str(rng.choice(["dispatch", "combine"])) for r in rng.permutation(ranks[1:])[: int(rng.integers(1, 3))]}
        outcomes = fail_step(world, ranks, epoch, victims)
        for rank, outcome in outcomes.items():
            assert isinstance(outcome, PeerFailed), (rank, outcome)
            assert set(outcome.peers) & set(victims), (rank, outcome, victims)
        late = [r for r in victims if rng.random() < 0.3]
        ranks = sorted(set(ranks) - set(victims) | set(late))
        assert connect(world, *ranks) == dict.fromkeys(ranks)
        run_steps(world, ranks, epoch + 1, count=1)
        for rank in sorted(set(victims) - set(late)):
            world.ranks[rank].close()
            world.start(rank)
        ranks = [0, 1, 2, 3]
        assert connect(world, *ranks) == dict.fromkeys(ranks)


@pytest.mark.parametrize("backend", ONE_EACH)
def test_nobody_sends_before_everybody_has_cleared(make_kernel_world: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_kernel_world(backend, 2)
    start(world, 0, 1)
    slow, other = world.ranks[1], world.ranks[0]
    other_is_done = threading.Event()
    order: list[str] = []
    clear, meet = slow._clear_buffers, other._meet

    def clear_late() -> None:
        assert other_is_done.wait(CONNECT_S)
        clear()
        order.append("cleared")

    def meet_and_tell(place: str, *args: Any) -> Any:
        if place == "clear":
            other_is_done.set()
        return meet(place, *args)

    def connect_and_tell(rank: int) -> Any:
        outcome = world.ranks[rank].connect(world.peers(0, 1), CONNECT_S)
        order.append("connected")
        other_is_done.set()
        return outcome

    monkeypatch.setattr(slow, "_clear_buffers", clear_late)
    monkeypatch.setattr(other, "_meet", meet_and_tell)
    assert run_ranks({r: lambda r=r: connect_and_tell(r) for r in range(2)}) == {0: None, 1: None}
    assert order == ["cleared", "connected", "connected"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_gives_up_sends_nothing_that_could_be_taken_for_outputs(make_kernel_world: Any, backend: str) -> None:
    world = make_kernel_world(backend, 3, timeout_us=int(TIMEOUT_S * 1e6))
    start(world, 0, 1, 2)
    routing, batches = make_step(9, [0, 1, 2], 1)
    world.ranks[0].cut(2)
    outcomes = run_layers(world, batches, routing, StepPoint(1, 50, 1))
    assert outcomes[0] == PeerFailed({2: FailureKind.CLOSED})
    for rank in (1, 2):
        assert isinstance(outcomes[rank], PeerFailed)
        assert 0 in outcomes[rank].peers


def test_a_late_proposal_does_not_throw_out_the_seats_new_process(make_kernel_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_kernel_world("mooncake", 3)
    start(world, 0, 1, 2)
    world.start(2)
    slow, quick = world.libraries[0].pg, world.libraries[1].pg
    quick_is_ahead = threading.Event()
    deactivate, recover, meet = slow.deactivate_ranks, quick.recover_ranks, world.ranks[1]._meet

    def deactivate_late(*args: Any) -> None:
        assert quick_is_ahead.wait(CONNECT_S)
        deactivate(*args)

    def recover_and_tell(*args: Any) -> None:
        recover(*args)
        quick_is_ahead.set()

    def meet_and_tell(place: str, *args: Any) -> Any:
        if place == "left":
            quick_is_ahead.set()
        return meet(place, *args)

    monkeypatch.setattr(slow, "deactivate_ranks", deactivate_late)
    monkeypatch.setattr(quick, "recover_ranks", recover_and_tell)
    monkeypatch.setattr(world.ranks[1], "_meet", meet_and_tell)
    assert connect(world, 0, 1, 2) == dict.fromkeys(range(3))
    run_steps(world, [0, 1, 2], 2, count=1)
