"""One suite for every backend: whatever the routing, each token's sum has the bits of the definition and of the one-process oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dispatch_cases import Batch, expected, lone_routing, make_batch, make_routing, run_experts, same_bits
from dispatch_cuda import needs_gpu
from dispatch_world import run_ranks

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.runtime.dispatch.base import Dispatcher, DispatchHandle, StepPoint
from elastic_ep.runtime.dispatch.local import LocalDispatcher

BACKENDS = [
    ("local", 1),
    ("unix", 1),
    ("unix", 2),
    ("unix", 3),
    ("unix", 4),
    ("numpy", 3),
    ("inline", 3),
    ("page", 3),
    ("tcp", 3),
    ("mixed", 4),
    ("mpi", 1),
    ("mpi", 4),
    *(pytest.param("cuda", n, marks=needs_gpu) for n in (1, 2, 3, 4)),
]
CUDA = pytest.param("cuda", marks=needs_gpu)
HIDDEN = 12
pytestmark = pytest.mark.timeout(60)


def run_layer(dispatcher: Dispatcher, batch: Batch, routing: RoutingTable, at: StepPoint) -> torch.Tensor:
    handle = dispatcher.dispatch(batch.x, batch.topk_ids, batch.topk_weights, routing, at)
    assert isinstance(handle, DispatchHandle), handle
    out = dispatcher.combine(run_experts(handle), handle)
    assert isinstance(out, torch.Tensor), out
    return out


def run_layers(world: Any, batches: dict[int, Batch], routing: RoutingTable, at: StepPoint) -> dict[int, torch.Tensor]:
    """One layer on every rank at once."""
    return run_ranks({r: lambda r=r: run_layer(world.dispatchers[r], batches[r], routing, at) for r in world.ranks})


def oracle(batch: Batch, num_experts: int) -> torch.Tensor:
    return run_layer(LocalDispatcher(), batch, lone_routing(num_experts), StepPoint(1, 0, 0))


@pytest.mark.parametrize(("backend", "num_ranks"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_sums_have_the_oracles_bits(make_world: Any, backend: str, num_ranks: int, dtype: torch.dtype, seed: int) -> None:
    print(f"seed {seed}")
    world = make_world(backend, num_ranks)
    rng = np.random.default_rng(seed)
    for top_k in range(1, 9):
        num_experts = int(rng.integers(top_k, 24))
        routing = make_routing(rng, world.ranks, num_experts)
        sizes = rng.choice([0, 1, 1, 2, 5, 40], num_ranks)
        batches = {r: make_batch(rng, int(sizes[r]), top_k, num_experts, HIDDEN, dtype, bool(rng.random() < 0.7)) for r in world.ranks}
        for layer in range(2):
            at = StepPoint(1, top_k, layer)
            outs = run_layers(world, batches, routing, at)
            for rank, batch in batches.items():
                assert same_bits(outs[rank], expected(batch)), f"rank {rank} of {num_ranks}, K={top_k}, T={sizes}"
                assert same_bits(outs[rank], oracle(batch, num_experts))


@pytest.mark.parametrize(("backend", "num_ranks"), BACKENDS)
@pytest.mark.parametrize("step", [3, 10**7 + 1])
def test_rows_are_grouped_by_expert_then_source_then_token(make_world: Any, backend: str, num_ranks: int, step: int) -> None:
    world = make_world(backend, num_ranks)
    rng = np.random.default_rng(7)
    routing = make_routing(rng, world.ranks, 6)
    at = StepPoint(1, step, 1)
    batches = {}
    for rank in world.ranks:
        batch = make_batch(rng, 9, 3, 6, 2, torch.float32)
        x = torch.stack([torch.full((9,), float(rank)), torch.arange(9.0)], dim=1)
        batches[rank] = Batch(x, batch.topk_ids, batch.topk_weights)
    handles = run_ranks(
        {r: lambda r=r, b=b: world.dispatchers[r].dispatch(b.x, b.topk_ids, b.topk_weights, routing, at) for r, b in batches.items()}
    )
    served = {r: routing.destination_ranks(1, b.topk_ids.numpy(), r, step) for r, b in batches.items()}
    for rank, handle in handles.items():
        wanted = [
            (int(batches[s].topk_ids[t, k]), float(s), float(t))
            for s in world.ranks
            for t in range(9)
            for k in range(3)
            if served[s][t, k] == rank
        ]
        got = [(e, *handle.rows[i].tolist()) for e, start, end in handle.groups for i in range(start, end)]
        assert got == sorted(wanted)
        ids = [e for e, _, _ in handle.groups]
        assert ids == sorted(set(ids))
        assert all(start < end for _, start, end in handle.groups)


@pytest.mark.parametrize(("backend", "num_ranks"), BACKENDS)
def test_no_tokens_anywhere(make_world: Any, backend: str, num_ranks: int) -> None:
    world = make_world(backend, num_ranks)
    rng = np.random.default_rng(0)
    routing = make_routing(rng, world.ranks, 4)
    batch = make_batch(rng, 0, 2, 4, HIDDEN, torch.bfloat16)
    outs = run_layers(world, dict.fromkeys(world.ranks, batch), routing, StepPoint(1, 0, 0))
    assert all(out.shape == (0, HIDDEN) and out.dtype == torch.bfloat16 for out in outs.values())


@pytest.mark.parametrize("backend", ["local", "unix", "mpi", CUDA])
def test_bad_input_is_refused_by_name(make_world: Any, backend: str) -> None:
    dispatcher = make_world(backend, 1).dispatchers[0]
    routing = lone_routing(4)
    x, ids, weights = torch.zeros(2, 8), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2)
    at = StepPoint(1, 0, 0)
    bad = [
        (x.double(), ids, weights, at, "float64"),
        (torch.zeros(8, 2).T, ids, weights, at, "contiguous"),
        (x, ids[:1], weights[:1], at, "T = 2"),
        (x, ids, weights[:, :1], at, "topk_weights"),
        (x, ids + 4, weights, at, "4 to 4"),
        (x, ids - 1, weights, at, "-1 to -1"),
        (x, ids, weights, StepPoint(2, 0, 0), "epoch 2"),
        (x, ids, weights, StepPoint(1, 0, 2), "layer 2"),
    ]
    for *args, point, words in bad:
        with pytest.raises(InvalidInputError, match=words):
            dispatcher.dispatch(*args, routing, point)
    handle = dispatcher.dispatch(x, ids, weights, routing, at)
    with pytest.raises(InvalidInputError, match="one row per dispatched row"):
        dispatcher.combine(handle.rows[:1], handle)


@pytest.mark.parametrize("backend", ["local", "unix", "mpi", CUDA])
def test_an_expert_without_a_replica_is_refused(make_world: Any, backend: str) -> None:
    dispatcher = make_world(backend, 1).dispatchers[0]
    whole = lone_routing(2)
    routing = RoutingTable(1, np.where(np.arange(2)[None, :, None] == 1, -1, whole.replica_rank), whole.cumulative_quota, {})
    with pytest.raises(InvalidInputError, match=r"experts? \[?1\]? .* live replica"):
        dispatcher.dispatch(torch.zeros(1, 4), torch.tensor([[0, 1]]), torch.ones(1, 2), routing, StepPoint(1, 0, 0))


@pytest.mark.parametrize("backend", ["unix", "inline", "tcp", "mpi", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_larger_than_any_socket_buffer(make_world: Any, backend: str, dtype: torch.dtype) -> None:
    world = make_world(backend, 2)
    rng = np.random.default_rng(5)
    routing = make_routing(rng, world.ranks, 16)
    for step, sizes in enumerate(((700, 700), (0, 900), (3, 1))):
        batches = {r: make_batch(rng, n, 8, 16, 1024, dtype) for r, n in enumerate(sizes)}
        outs = run_layers(world, batches, routing, StepPoint(1, step, 0))
        for rank, batch in batches.items():
            assert same_bits(outs[rank], oracle(batch, 16))


@pytest.mark.parametrize("backend", ["unix", CUDA])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"),
    [pytest.param((700, 1), 3, 4, id="most tokens choose the same few"), pytest.param((5, 20), 8, 600, id="most experts get nothing")],
)
def test_pairs_are_spread_unevenly(
    make_world: Any, backend: str, num_ranks: int, tokens: tuple[int, int], top_k: int, num_experts: int
) -> None:
    world = make_world(backend, num_ranks)
    rng = np.random.default_rng(3)
    routing = make_routing(rng, world.ranks, num_experts)
    batches = {r: make_batch(rng, tokens[r], top_k, num_experts, HIDDEN, torch.bfloat16) for r in world.ranks}
    outs = run_layers(world, batches, routing, StepPoint(1, 0, 0))
    assert all(same_bits(outs[rank], expected(batch)) for rank, batch in batches.items())


@pytest.mark.parametrize("backend", ["unix", "mpi", CUDA])
def test_a_routing_table_that_names_a_rank_outside_the_mesh_is_refused(make_world: Any, backend: str) -> None:
    dispatcher = make_world(backend, 1).dispatchers[0]
    whole = lone_routing(2)
    for rank, words in ((3, r"rank 3, the mesh has ranks 0 to 0"), (-1, "live replica")):
        routing = RoutingTable(1, np.full_like(whole.replica_rank, rank), whole.cumulative_quota, {})
        with pytest.raises(InvalidInputError, match=words):
            dispatcher.dispatch(torch.zeros(1, 4), torch.tensor([[0, 1]]), torch.ones(1, 2), routing, StepPoint(1, 0, 0))


@pytest.mark.parametrize("backend", ["unix", "mpi", CUDA])
def test_a_point_that_does_not_grow_is_refused(make_world: Any, backend: str) -> None:
    dispatcher = make_world(backend, 1).dispatchers[0]
    batch = make_batch(np.random.default_rng(0), 1, 1, 2, 4, torch.float32)
    run_layer(dispatcher, batch, lone_routing(2), StepPoint(1, 5, 1))
    for at in (StepPoint(1, 5, 1), StepPoint(1, 5, 0), StepPoint(1, 4, 1)):
        with pytest.raises(InvalidInputError, match="does not come after"):
            run_layer(dispatcher, batch, lone_routing(2), at)


def test_a_routing_table_of_several_ranks_is_not_for_the_local_backend() -> None:
    with pytest.raises(InvalidInputError, match="use the socket backend"):
        LocalDispatcher().connect({0: "a", 1: "b"}, 1.0)
    routing = make_routing(np.random.default_rng(0), [0, 1], 4)
    with pytest.raises(InvalidInputError, match=r"names ranks \[0, 1\]; use the socket backend"):
        LocalDispatcher().dispatch(torch.zeros(1, 4), torch.tensor([[0, 1]]), torch.ones(1, 2), routing, StepPoint(1, 0, 0))
