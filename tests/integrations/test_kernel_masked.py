"""The dispatch conformance cases over the adapters of Mooncake EP and NIXL EP, on fakes that hold them to the libraries' contracts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.integrations.packed import Sums
from elastic_ep.runtime.dispatch.base import DispatchHandle, StepPoint
from tests.dispatch.dispatch_cases import Batch, expected, expert, lone_routing, make_batch, make_routing, run_experts, same_bits
from tests.dispatch.dispatch_world import run_ranks
from tests.integrations.fake_fabric import multiply_add
from tests.integrations.worlds import BACKENDS, CONNECT_S, SUMS, KernelWorld

pytestmark = pytest.mark.timeout(60)
HIDDEN = 2048


def connect(world: KernelWorld, *ranks: int) -> dict[int, Any]:
    peers = world.peers(*ranks)
    return run_ranks({r: lambda r=r: world.ranks[r].connect(peers, CONNECT_S) for r in ranks})


def start(world: KernelWorld, *ranks: int) -> None:
    for rank in ranks:
        world.start(rank)
    assert connect(world, *ranks) == dict.fromkeys(ranks)


def run_layer(world: KernelWorld, rank: int, batch: Batch, routing: RoutingTable, at: StepPoint) -> Any:
    """What one rank's layer comes to: a tensor or how it failed."""
    handle = world.ranks[rank].dispatch(batch.x, batch.topk_ids, batch.topk_weights, routing, at)
    return world.ranks[rank].combine(run_experts(handle), handle) if isinstance(handle, DispatchHandle) else handle


def run_layers(world: KernelWorld, batches: dict[int, Batch], routing: RoutingTable, at: StepPoint) -> dict[int, Any]:
    return world.run({r: lambda r=r, b=b: run_layer(world, r, b, routing, at) for r, b in batches.items()})


def kernel_sum(batch: Batch) -> torch.Tensor:
    """What the libraries' kernels add up: top-k order, float32, fused, from zero."""
    out = torch.zeros(batch.x.shape, dtype=torch.bfloat16)
    for t in range(len(batch.x)):
        total = np.zeros(batch.x.shape[1], dtype=np.float32)
        for k in range(batch.topk_ids.shape[1]):
            total = multiply_add(total, expert(int(batch.topk_ids[t, k]), batch.x[t]), float(batch.topk_weights[t, k]))
        out[t] = torch.from_numpy(total).to(torch.bfloat16)
    return out


def wanted(backend: str, batch: Batch) -> torch.Tensor:
    """`Sums.OWN` gives the definition's bits, but for the sign of a zero."""
    if SUMS[backend] is Sums.KERNEL:
        return kernel_sum(batch)
    return expected(batch) + 0.0


def check(world: KernelWorld, batches: dict[int, Batch], outs: dict[int, Any]) -> None:
    for rank, batch in batches.items():
        out = outs[rank]
        assert isinstance(out, torch.Tensor), out
        assert same_bits(out + 0.0, wanted(world.backend, batch)), f"rank {rank}, {tuple(batch.topk_ids.shape)}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_sums_are_the_definitions(make_kernel_world: Any, backend: str, num_ranks: int) -> None:
    seed = num_ranks
    print(f"seed {seed}")
    world = make_kernel_world(backend, num_ranks, seed, experts_per_rank=10)
    start(world, *range(num_ranks))
    rng = np.random.default_rng(seed)
    for top_k in range(1, 5):
        num_experts = int(rng.integers(top_k, 9))
        routing = make_routing(rng, list(range(num_ranks)), num_experts)
        sizes = rng.choice([0, 1, 2, 5, 8], num_ranks)
        batches = {
            r: make_batch(rng, int(sizes[r]), top_k, num_experts, HIDDEN, torch.bfloat16, bool(sizes[r] == 8 or rng.random() < 0.7))
            for r in range(num_ranks)
        }
        for layer in range(2):
            check(world, batches, run_layers(world, batches, routing, StepPoint(1, top_k, layer)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [3, 10**7 + 1])
def test_rows_are_grouped_by_expert_then_source_then_token(make_kernel_world: Any, backend: str, step: int) -> None:
    world = make_kernel_world(backend, 3)
    start(world, 0, 1, 2)
    rng = np.random.default_rng(7)
    routing = make_routing(rng, [0, 1, 2], 6)
    at = StepPoint(1, step, 1)
    batches = {}
    for rank in range(3):
        batch = make_batch(rng, 8, 3, 6, HIDDEN, torch.bfloat16)
        batch.x[:, 0], batch.x[:, 1] = float(rank), torch.arange(8.0)
        batches[rank] = batch
    handles = run_ranks(
        {r: lambda r=r, b=b: world.ranks[r].dispatch(b.x, b.topk_ids, b.topk_weights, routing, at) for r, b in batches.items()}
    )
    served = {r: routing.destination_ranks(1, b.topk_ids.numpy(), r, step) for r, b in batches.items()}
    for rank, handle in handles.items():
        pairs = [
            (int(batches[s].topk_ids[t, k]), float(s), float(t))
            for s in range(3)
            for t in range(8)
            for k in range(3)
            if served[s][t, k] == rank
        ]
        got = [(e, *handle.rows[i, :2].tolist()) for e, first, end in handle.groups for i in range(first, end)]
        assert got == sorted(pairs)
        assert all(first < end for _, first, end in handle.groups)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_token_has_the_same_bits_wherever_its_experts_are(make_kernel_world: Any, backend: str) -> None:
    world = make_kernel_world(backend, 4, max_tokens=4)
    start(world, 0, 1, 2, 3)
    rng = np.random.default_rng(11)
    batch = make_batch(rng, 4, 4, 8, HIDDEN, torch.bfloat16)
    outs = []
    for step in range(6):
        routing = make_routing(rng, [0, 1, 2, 3], 8)
        others = {r: make_batch(rng, int(rng.integers(0, 5)), 4, 8, HIDDEN, torch.bfloat16) for r in (1, 2, 3)}
        outs.append(run_layers(world, {0: batch, **others}, routing, StepPoint(1, step, 0))[0])
    assert all(same_bits(out, outs[0]) for out in outs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_refused_by_name(make_kernel_world: Any, backend: str) -> None:
    world = make_kernel_world(backend, 1, max_tokens=4, top_k=2)
    start(world, 0)
    dispatcher, routing, at = world.ranks[0], lone_routing(4), StepPoint(1, 0, 0)
    x = torch.zeros(2, HIDDEN, dtype=torch.bfloat16)
    ids, weights = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2)
    bad = [
        (x.float(), ids, weights, at, "float32"),
        (torch.zeros(2, 4096, dtype=torch.bfloat16), ids, weights, at, "2048"),
        (torch.zeros(HIDDEN, 2, dtype=torch.bfloat16).T, ids, weights, at, "contiguous"),
        (x, ids[:1], weights[:1], at, "T = 2"),
        (x, ids, weights[:, :1], at, "topk_weights"),
        (x, ids + 4, weights, at, "4 to 4"),
        (x, ids - 1, weights, at, "-1 to -1"),
        (x, ids, weights, StepPoint(2, 0, 0), "epoch 2"),
        (x, ids, weights, StepPoint(1, 0, 2), "layer 2"),
        (x.repeat(3, 1), ids.repeat(3, 1), weights.repeat(3, 1), at, "6 tokens"),
        (x, ids.repeat(1, 2), weights.repeat(1, 2), at, "top-4"),
    ]
    for *args, point, words in bad:
        with pytest.raises(InvalidInputError, match=words):
            dispatcher.dispatch(*args, routing, point)
    with pytest.raises(InvalidInputError, match=r"rank 0 serves 9 experts .* for 8"):
        dispatcher.dispatch(x, ids, weights, lone_routing(9), at)
    handle = dispatcher.dispatch(x, ids, weights, routing, at)
    with pytest.raises(InvalidInputError, match="one row per dispatched row"):
        dispatcher.combine(handle.rows[:1], handle)
    with pytest.raises(InvalidInputError, match="follows the combine"):
        dispatcher.dispatch(x, ids, weights, routing, StepPoint(1, 0, 1))
    dispatcher.combine(handle.rows, handle)
    with pytest.raises(InvalidInputError, match="once"):
        dispatcher.combine(handle.rows, handle)
    with pytest.raises(InvalidInputError, match="does not come after"):
        dispatcher.dispatch(x, ids, weights, routing, at)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rank", "words"), [(1, r"rank 1, the mesh has ranks \[0\]"), (-1, "live replica")])
def test_a_routing_table_that_names_a_rank_outside_the_mesh_is_refused(make_kernel_world: Any, backend: str, rank: int, words: str) -> None:
    world = make_kernel_world(backend, 1)
    start(world, 0)
    whole = lone_routing(2)
    routing = RoutingTable(1, np.full_like(whole.replica_rank, rank), whole.cumulative_quota, {})
    with pytest.raises(InvalidInputError, match=words):
        world.ranks[0].dispatch(
            torch.zeros(1, HIDDEN, dtype=torch.bfloat16), torch.tensor([[0, 1]]), torch.ones(1, 2), routing, StepPoint(1, 0, 0)
        )
