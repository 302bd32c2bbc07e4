"""Random steps for dispatch tests: placements with replicas and quotas, tokens, experts that mark their rows, and the sums expected."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from elastic_ep.core.placement import ExpertPlacement
from elastic_ep.core.routing import RoutingTable
from elastic_ep.core.topology import Topology
from elastic_ep.runtime.dispatch.base import DispatchHandle


@dataclass(frozen=True)
class Batch:
    """What one rank hands to dispatch."""

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


def make_routing(
    rng: np.random.Generator, ranks: list[int], num_experts: int, num_layers: int = 2, epoch: int = 1, ep_size: int | None = None
) -> RoutingTable:
    """Every expert on one to three of `ranks`, random quotas, empty slots; ranks not named hold nothing."""
    size = ep_size or max(ranks) + 1
    per_rank = -(-num_experts // len(ranks)) + int(rng.integers(0, 3))
    topology = Topology.uniform(size, size * per_rank)
    live = np.concatenate([np.arange(r * per_rank, (r + 1) * per_rank) for r in ranks])
    p2l = np.full((num_layers, topology.num_slots), -1, dtype=np.int64)
    for layer in range(num_layers):
        slots = rng.permutation(live)
        p2l[layer, slots[:num_experts]] = np.arange(num_experts)
        spare = slots[num_experts:]
        p2l[layer, spare] = np.where(rng.random(len(spare)) < 0.8, rng.integers(0, num_experts, len(spare)), -1)
    placement = ExpertPlacement(p2l, num_experts)
    share = rng.random(p2l.shape) + 0.01
    totals = np.zeros((num_layers, num_experts))
    for layer in range(num_layers):
        held = p2l[layer] >= 0
        np.add.at(totals[layer], p2l[layer][held], share[layer][held])
        share[layer][held] /= totals[layer][p2l[layer][held]]
    return RoutingTable.build(epoch, placement, topology, share)


def lone_routing(num_experts: int, num_layers: int = 2, epoch: int = 1) -> RoutingTable:
    """One rank that holds everything: what the oracle uses."""
    p2l = np.tile(np.arange(num_experts), (num_layers, 1))
    return RoutingTable.build(epoch, ExpertPlacement(p2l, num_experts), Topology.uniform(1, num_experts))


def make_batch(
    rng: np.random.Generator, num_tokens: int, top_k: int, num_experts: int, hidden: int, dtype: torch.dtype, distinct: bool = True
) -> Batch:
    """Values of many magnitudes, subnormal and negative zero among them: only an exact sum gives the expected bits."""
    values = rng.standard_normal((num_tokens, hidden)) * 10.0 ** rng.integers(-6, 6, (num_tokens, hidden))
    values[rng.random(values.shape) < 0.05] = -0.0
    values[rng.random(values.shape) < 0.02] = 1e-39
    if distinct:
        ids = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)]) if num_tokens else np.zeros((0, top_k))
    else:
        ids = rng.integers(0, num_experts, (num_tokens, top_k))
    weights = rng.random((num_tokens, top_k), dtype=np.float32)
    return Batch(torch.from_numpy(values).to(dtype), torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(weights).to(dtype))


def expert(expert_id: int, rows: torch.Tensor) -> torch.Tensor:
    """Row by row, different for each expert: a misplaced row or expert changes the result."""
    return (rows.float() * (expert_id + 1) + expert_id).to(rows.dtype)


def run_experts(handle: DispatchHandle) -> torch.Tensor:
    """What the model does between dispatch and combine."""
    out = torch.full_like(handle.rows, float("nan"))
    for expert_id, start, end in handle.groups:
        out[start:end] = expert(expert_id, handle.rows[start:end])
    return out


def expected(batch: Batch) -> torch.Tensor:
    """The definition of combine, written out with one token, one expert at a time."""
    out = torch.zeros(batch.x.shape, dtype=torch.float32)
    for t in range(batch.x.shape[0]):
        for k in range(batch.topk_ids.shape[1]):
            y = expert(int(batch.topk_ids[t, k]), batch.x[t : t + 1])[0].float()
            term = batch.topk_weights[t, k].float() * y
            out[t] = term if k == 0 else out[t] + term
    return out.to(batch.x.dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, the sign of zero included."""
    kind = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    return a.dtype == b.dtype and a.shape == b.shape and bool((a.view(kind) == b.view(kind)).all())
