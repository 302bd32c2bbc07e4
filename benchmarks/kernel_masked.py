"""One rank of Mooncake EP or NIXL EP through its adapter, on a GPU: that its rows and sums are right, and what a layer costs.

python benchmarks/kernel_masked.py mooncake|nixl [--tokens 8 128] [--json]

One rank exchanges with itself only: the kernels, the packed layout, the order of the sum and the adapter are what is looked at. For
`Sums.KERNEL` the sum is compared with fused multiply-adds in top-k order; for `Sums.OWN` with the definition that all backends share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.distributed import HashStore

from elastic_ep.core.placement import ExpertPlacement
from elastic_ep.core.routing import RoutingTable
from elastic_ep.core.topology import Topology
from elastic_ep.integrations.mooncake import MooncakeDispatcher
from elastic_ep.integrations.nixl import NixlDispatcher
from elastic_ep.integrations.packed import PackedCapacity, Sums
from elastic_ep.runtime.dispatch.base import DispatchHandle, StepPoint

EXPERTS, TOP_K, HIDDEN, STEPS = 64, 8, 7168, 30
KINDS: dict[str, Any] = {"mooncake": MooncakeDispatcher, "nixl": NixlDispatcher}


def make_batch(tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(tokens)
    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)])
    x = torch.from_numpy(rng.standard_normal((tokens, HIDDEN))).to(torch.bfloat16)
    weights = torch.from_numpy(rng.random((tokens, TOP_K), dtype=np.float32))
    return x.to(device), torch.from_numpy(ids).to(device), weights.to(device)


def run_experts(handle: DispatchHandle) -> torch.Tensor:
    out = torch.empty_like(handle.rows)
    for expert, first, end in handle.groups:
        out[first:end] = (handle.rows[first:end].float() * (expert + 1) / EXPERTS).to(out.dtype)
    return out


def wanted(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, fused: bool) -> torch.Tensor:
    """[T, H] bfloat16, computed on the CPU; a product of bfloat16 and float32 is exact in float64."""
    x, ids, weights = x.cpu(), ids.cpu(), weights.cpu()
    total = torch.zeros(x.shape, dtype=torch.float32)
    for k in range(ids.shape[1]):
        y = (x.float() * (ids[:, k, None] + 1).float() / EXPERTS).to(torch.bfloat16)
        if fused:
            total = (total.double() + y.double() * weights[:, k, None].double()).float()
        else:
            term = weights[:, k, None] * y.float()
            total = term if k == 0 else total + term
    return total.to(torch.bfloat16)


def measure(kind: str, sums: Sums, tokens: int, device: str, **options: Any) -> dict[str, Any]:
    capacity = PackedCapacity(1, EXPERTS, tokens, TOP_K, HIDDEN, sums)
    dispatcher = KINDS[kind](0, capacity, HashStore(), device=device, timeout_us=5_000_000, **options)
    placement = ExpertPlacement(np.arange(EXPERTS)[None], EXPERTS)
    routing = RoutingTable.build(1, placement, Topology.uniform(1, EXPERTS))
    began = time.perf_counter()
    outcome = dispatcher.connect({0: dispatcher.listen()}, 300.0)
    assert outcome is None, outcome
    connect_s = time.perf_counter() - began
    x, ids, weights = make_batch(tokens, device)
    times, different = [], 0
    reference = wanted(x, ids, weights, sums is Sums.KERNEL) + 0.0
    for step in range(STEPS):
        began = time.perf_counter()
        handle = dispatcher.dispatch(x, ids, weights, routing, StepPoint(1, step, 0))
        assert isinstance(handle, DispatchHandle), handle
        half = time.perf_counter()
        y = run_experts(handle)
        if device != "cpu":
            torch.cuda.synchronize()
        ran = time.perf_counter()
        out = dispatcher.combine(y, handle)
        assert isinstance(out, torch.Tensor), out
        times.append(half - began + time.perf_counter() - ran)
        different += int((out.cpu() + 0.0 != reference).sum())
    dispatcher.close()
    return {
        "library": kind,
        "sums": sums.value,
        "tokens": tokens,
        "connect_s": round(connect_s, 2),
        "layer_us": round(1e6 * statistics.median(times[5:]), 1),
        "values_that_differ": different,
        "of": STEPS * out.numel(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", nargs="?", choices=KINDS, default="mooncake")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 120])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("nothing measured: torch sees no GPU")
        return
    for sums in Sums:
        for tokens in args.tokens:
            row = measure(args.backend, sums, tokens, "cuda")
            print(json.dumps(row) if args.json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
