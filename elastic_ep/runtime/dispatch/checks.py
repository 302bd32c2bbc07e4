"""What a caller may hand to dispatch and combine; the same for every backend, and cheap enough for every layer."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.runtime.dispatch.base import DispatchHandle, StepPoint

DTYPES = (torch.float32, torch.bfloat16)
"""What rows may be; the index is the code on the wire"""


def check_dispatch(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint
) -> NDArray[np.int64]:
    """`topk_ids` as an array, once everything fits together. Raises InvalidInputError."""
    if x.dim() != 2 or x.dtype not in DTYPES or not x.is_contiguous() or x.device.type != "cpu":
        raise InvalidInputError(
            f"x is {x.dtype} {list(x.shape)} on {x.device}; give a contiguous [T, H] float32 or bfloat16 tensor on the CPU"
        )
    if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        raise InvalidInputError(
            f"topk_ids {list(topk_ids.shape)} and topk_weights {list(topk_weights.shape)} must both be [T, K] with T = {x.shape[0]}"
        )
    if at.epoch != routing.epoch:
        raise InvalidInputError(f"the step is of epoch {at.epoch}, its routing table of epoch {routing.epoch}; install the epoch first")
    num_layers, num_experts, _ = routing.replica_rank.shape
    if not 0 <= at.layer < num_layers:
        raise InvalidInputError(f"MoE layer {at.layer} is not in the routing table, which has layers 0 to {num_layers - 1}")
    ids: NDArray[np.int64] = topk_ids.detach().numpy()
    if ids.dtype != np.int64:
        ids = ids.astype(np.int64)
    # seen as unsigned, a negative id is a huge one: one pass finds both kinds of wrong id
    if ids.size and ids.view(np.uint64).max() >= num_experts:
        raise InvalidInputError(f"topk_ids run from {ids.min()} to {ids.max()}; there are experts 0 to {num_experts - 1}")
    return ids


def check_combine(y: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
    """`y`, contiguous. Raises InvalidInputError unless it has the shape and dtype of the rows that were dispatched here."""
    if y.shape != handle.rows.shape or y.dtype != handle.rows.dtype:
        raise InvalidInputError(
            f"y is {y.dtype} {list(y.shape)}; give one row per dispatched row: {handle.rows.dtype} {list(handle.rows.shape)}"
        )
    return y.contiguous()
