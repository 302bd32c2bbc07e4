"""The cuda backend with real processes, on all GPUs there are: killed, stopped, masked and new ranks; and the hot path that never waits."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dispatch_cases import expected, make_batch, make_routing, same_bits
from dispatch_cuda import needs_gpu, why_not
from dispatch_processes import Fault
from dispatch_world import TOKEN, run_ranks

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.dispatch.base import FailureKind, PeerFailed, StepPoint
from elastic_ep.runtime.dispatch.cuda.build import build_kernels
from elastic_ep.runtime.dispatch.cuda.dispatcher import CudaDispatcher
from elastic_ep.runtime.dispatch.cuda.region import Capacity, Layout

pytestmark = pytest.mark.timeout(100)
SMALL = Capacity(4, 8, 2, max_tokens=16, top_k=3, hidden=8)
SLEEP_CYCLES = 100_000
"""some 50 us"""
SOON_S = 4.0
"""ranks that share a GPU by time slices are slow"""


# ---- without a GPU


def test_regions_hold_what_is_said_and_do_not_overlap() -> None:
    layout = Layout.of(SMALL)
    assert layout.counts_at - layout.pairs_at >= 16 * 3 * 8
    assert layout.x_at - layout.counts_at >= 4 * 8 * 4
    assert layout.y_at - layout.x_at >= 16 * 8 * 2
    assert layout.num_bytes - layout.y_at >= 4 * 16 * 3 * 8 * 2
    assert all(at % 256 == 0 for at in layout)


def test_a_capacity_that_kernels_cannot_serve_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="top_k is 33"):
        Capacity(4, 8, 2, max_tokens=16, top_k=33, hidden=8)
    with pytest.raises(InvalidInputError, match="rank 4 has no seat among 4"):
        CudaDispatcher(4, "unix:/unused", SMALL, token=TOKEN)


@pytest.mark.skipif(why_not() is None, reason="there is a GPU here")
def test_without_a_gpu_it_says_so(folder: Path) -> None:
    dispatcher = CudaDispatcher(0, f"unix:{folder}/a", SMALL, token=TOKEN)
    with pytest.raises(InvalidInputError, match=r"needs a GPU|needs nvcc"):
        dispatcher.connect({}, 1.0)


def test_without_a_compiler_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_ep.runtime.dispatch.cuda.build.find_nvcc", lambda: None)
    with pytest.raises(InvalidInputError, match="install the CUDA toolkit"):
        build_kernels((9, 0), folder)


# ---- faults


@needs_gpu
@pytest.mark.parametrize(
    "fault",
    [Fault("before_dispatch"), Fault("before_dispatch", layer=1), Fault("before_combine"), Fault("waiting")],
    ids=lambda f: f"{f.point}-layer{f.layer}",
)
def test_killed(make_ranks: Any, fault: Fault) -> None:
    ranks = make_ranks("cuda", 4, grace_s=0.5)
    ranks.check_steps(range(4), 3)
    ranks.install(range(4))
    reports = ranks.run(range(4), faults={2: fault}, hidden=4096, max_tokens=64)
    ranks.wait_dead(2)
    print("took", {r: round(report.took_s, 3) for r, (report,) in reports.items()})
    for rank, (report,) in reports.items():
        assert report.outcome == PeerFailed({2: FailureKind.CLOSED}), f"rank {rank}"
        assert report.wrong == ()
        assert report.took_s < SOON_S
    ranks.install([0, 1, 3])
    ranks.check_steps([0, 1, 3], 30, dtype=torch.bfloat16)


@needs_gpu
def test_two_killed_at_once_then_one_then_alone(make_ranks: Any) -> None:
    ranks = make_ranks("cuda", 4, grace_s=0.5)
    reports = ranks.run(range(4), faults={0: Fault("before_dispatch"), 3: Fault("before_dispatch")})
    for (report,) in reports.values():
        assert report.outcome == PeerFailed({0: FailureKind.CLOSED, 3: FailureKind.CLOSED})
    ranks.wait_dead(0)
    ranks.wait_dead(3)
    ranks.install([1, 2])
    ranks.check_steps([1, 2], 10)
    ranks.run([1, 2], faults={2: Fault("before_combine")})
    ranks.wait_dead(2)
    ranks.install([1])
    ranks.check_steps([1], 10)


@needs_gpu
@pytest.mark.parametrize("point", ["before_dispatch", "before_combine"])
def test_stopped_is_named_at_the_deadline_and_changes_nothing_when_it_wakes(make_ranks: Any, point: str) -> None:
    ranks = make_ranks("cuda", 3, deadline_s=1.0)
    reports = ranks.run(range(3), faults={1: Fault(point, signal=signal.SIGSTOP)})
    for (report,) in reports.values():
        assert report.outcome == PeerFailed({1: FailureKind.DEADLINE})
        assert 0.9 < report.took_s < SOON_S
    ranks.install([0, 2])
    ranks.check_steps([0, 2], 10)
    os.kill(ranks.pid(1), signal.SIGCONT)
    (woken,) = ranks.answer(1)
    assert woken.outcome == PeerFailed({0: FailureKind.CLOSED, 2: FailureKind.CLOSED})
    ranks.check_steps([0, 2], 10)


@needs_gpu
def test_a_masked_seat_gets_nothing_and_is_not_waited_for_and_a_newcomer_takes_it(make_ranks: Any) -> None:
    ranks = make_ranks("cuda", 3, num_seats=4)
    ranks.check_steps(range(3), 5)
    ranks.install([0, 2])
    ranks.check_steps([0, 2], 5)
    ranks.start(3)
    ranks.install([0, 2, 3])
    ranks.check_steps([0, 2, 3], 5)
    ranks.install(range(4))
    ranks.check_steps(range(4), 5, dtype=torch.bfloat16)


# ---- the hot path, ranks on streams of one process


@pytest.fixture
def dispatchers(folder: Path) -> Any:
    made: dict[int, CudaDispatcher] = {}

    def make(num_ranks: int, num_experts: int = 8, top_k: int = 3, **options: Any) -> dict[int, CudaDispatcher]:
        capacity = Capacity(num_ranks, num_experts, 3, max_tokens=32, top_k=top_k, hidden=64, max_replicas=32)
        made.update({r: CudaDispatcher(r, f"unix:{folder}/{r}", capacity, token=TOKEN, **options) for r in range(num_ranks)})
        addresses = {r: d.listen() for r, d in made.items()}
        assert run_ranks({r: lambda d=d: d.connect(addresses, 20.0) for r, d in made.items()}) == dict.fromkeys(made)
        return made

    yield make
    for dispatcher in made.values():
        dispatcher.close()


def _experts(handle: Any, held: torch.Tensor) -> None:
    """`dispatch_cases.expert` over all rows, on the device, without knowing how many there are: +id, *(id + 1)."""
    state = handle.state
    row = torch.arange(len(state.rows), device=held.device)
    expert = torch.searchsorted(state.offsets[1:].contiguous(), row, right=True).to(torch.float32)[:, None]
    state.outputs.copy_((state.rows.float() * (expert + 1) + expert).to(state.rows.dtype))


@needs_gpu
@pytest.mark.parametrize("in_place", [False, True], ids=["rows from elsewhere", "rows in the region"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_step_is_captured_once_and_replayed_under_new_epochs_without_waiting(dispatchers: Any, num_ranks: int, in_place: bool) -> None:
    """Each layer has rows of its own, and rank 0 is late for each: it must not find those of the next."""
    ranks = dispatchers(num_ranks)
    rng = np.random.default_rng(3)
    streams = {r: torch.cuda.Stream() for r in ranks}
    buffers = {
        r: (torch.zeros(3, 9, 64, dtype=torch.bfloat16).cuda(), torch.zeros(9, 3, dtype=torch.int64).cuda(), torch.zeros(9, 3).cuda())
        for r in ranks
    }
    outs: dict[int, list[torch.Tensor]] = {}
    graphs = {}
    for r, d in ranks.items():
        d.begin_step(make_routing(rng, list(ranks), 8, 3, 0), 0, 0)
        graphs[r] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[r], stream=streams[r]):
            outs[r] = []
            for layer in range(3):
                x = buffers[r][0][layer]
                if in_place:
                    x = d.token_buffer(*x.shape, x.dtype).copy_(x)
                if r == 0:
                    torch.cuda._sleep(SLEEP_CYCLES)
                handle = d.enqueue_dispatch(x, *buffers[r][1:], layer)
                _experts(handle, x)
                outs[r].append(d.enqueue_combine(handle))
    for step in range(1, 13):
        epoch = step // 4 + 1
        routing = make_routing(np.random.default_rng(epoch), list(ranks), 8, 3, epoch)
        batches = {r: make_batch(rng, 9, 3, 8, 64, torch.bfloat16) for r in ranks}
        for r, batch in batches.items():
            x = torch.stack([batch.x.roll(layer, 0) for layer in range(3)])
            for buffer, value in zip(buffers[r], (x, batch.topk_ids, batch.topk_weights), strict=True):
                buffer.copy_(value)
        for r, d in ranks.items():
            with torch.cuda.stream(streams[r]):
                d.begin_step(routing, epoch, step)
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        try:
            for r in ranks:
                with torch.cuda.stream(streams[r]):
                    graphs[r].replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for r, d in ranks.items():
            with torch.cuda.stream(streams[r]):
                assert d.wait() is None
            for layer, out in enumerate(outs[r]):
                batch = replace(batches[r], x=batches[r].x.roll(layer, 0))
                assert same_bits(out.cpu(), expected(batch)), f"rank {r}, step {step}, layer {layer}"


@needs_gpu
@pytest.mark.parametrize("top_k", [9, 16, 31, 32])
def test_more_than_eight_experts_a_token(dispatchers: Any, top_k: int) -> None:
    """The kernels take a token's pairs a few at a time: up to a warp's lanes."""
    ranks = dispatchers(2, num_experts=40, top_k=top_k)
    rng = np.random.default_rng(top_k)
    streams = {r: torch.cuda.Stream() for r in ranks}
    for step in range(1, 4):
        routing = make_routing(rng, list(ranks), 40, 3, step)
        batches = {r: make_batch(rng, 32 - step * r, top_k, 40, 64, torch.bfloat16) for r in ranks}
        inputs = {r: (b.x.cuda(), b.topk_ids.cuda(), b.topk_weights.float().cuda()) for r, b in batches.items()}
        torch.cuda.synchronize()
        handles, outs = {}, {}
        for r, d in ranks.items():
            with torch.cuda.stream(streams[r]):
                d.begin_step(routing, step, step)
        for r, d in ranks.items():
            with torch.cuda.stream(streams[r]):
                handles[r] = d.enqueue_dispatch(*inputs[r], 0)
        torch.cuda.synchronize()  # no other kernel, which might have to be loaded first, while these wait for each other
        for r, handle in handles.items():
            with torch.cuda.stream(streams[r]):
                _experts(handle, inputs[r][0])
        for r, d in ranks.items():
            with torch.cuda.stream(streams[r]):
                outs[r] = d.enqueue_combine(handles[r])
        for r, d in ranks.items():
            with torch.cuda.stream(streams[r]):
                assert d.wait() is None
                assert same_bits(outs[r].cpu(), expected(batches[r])), f"rank {r}, step {step}"


@needs_gpu
def test_a_failure_shows_in_pinned_memory_and_ends_the_rest_of_the_step_at_once(dispatchers: Any) -> None:
    ranks = dispatchers(2, deadline_s=5.0)
    routing = make_routing(np.random.default_rng(0), [0, 1], 8, 3)
    batch = make_batch(np.random.default_rng(0), 4, 3, 8, 64, torch.bfloat16)
    rank = ranks[0]
    rank.begin_step(routing, 1, 1)
    assert rank.outcome() is None
    threading.Timer(0.1, rank.cut, [1]).start()
    for layer in range(3):
        handle = rank.enqueue_dispatch(batch.x.cuda(), batch.topk_ids.cuda(), batch.topk_weights.cuda(), layer)
        rank.enqueue_combine(handle)
    assert rank.wait() == PeerFailed({1: FailureKind.CLOSED})
    assert rank.dispatch(batch.x.cuda(), batch.topk_ids.cuda(), batch.topk_weights.cuda(), routing, StepPoint(1, 2, 0)) == rank.outcome()


@needs_gpu
@pytest.mark.parametrize("where", [(slice(None), slice(None)), (2, 1), (3, 2)], ids=["all", "one among good ones", "the last"])
def test_a_pair_without_a_rank_is_reported_by_the_device(dispatchers: Any, where: Any) -> None:
    (rank,) = dispatchers(1).values()
    batch = make_batch(np.random.default_rng(0), 4, 3, 8, 64, torch.bfloat16)
    rank.begin_step(make_routing(np.random.default_rng(0), [0], 8, 3), 1, 1)
    ids = batch.topk_ids.cuda()
    ids[where] += 8
    handle = rank.enqueue_dispatch(batch.x.cuda(), ids, batch.topk_weights.cuda(), 0)
    rank.enqueue_combine(handle)
    with pytest.raises(InvalidInputError, match="does not exist or has no live replica"):
        rank.wait()
