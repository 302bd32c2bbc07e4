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


def check_dispatch(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint) -> None:
    """Raises InvalidInputError unless shapes, dtypes, epoch and layer fit together. Expert ids are looked at by `checked_ids`."""
    shape = x.shape
    if len(shape) != 2 or not shape[1] or x.dtype not in DTYPES or not x.is_cpu or not x.is_contiguous():
        raise InvalidInputError(
            f"x is {x.dtype} {list(shape)} on {x.device}; give a contiguous [T, H] float32 or bfloat16 tensor on the CPU, H at least 1"
        )
    ids_shape = topk_ids.shape
    if len(ids_shape) != 2 or ids_shape[0] != shape[0] or ids_shape != topk_weights.shape or not ids_shape[1]:
        raise InvalidInputError(
            f"topk_ids {list(ids_shape)} and topk_weights {list(topk_weights.shape)} must both be [T, K] with T = {shape[0]}, K at least 1"
        )
    if at.epoch != routing.epoch:
        raise InvalidInputError(f"the step is of epoch {at.epoch}, its routing table of epoch {routing.epoch}; install the epoch first")
    if not 0 <= at.layer < len(routing.replica_rank):
        raise InvalidInputError(f"MoE layer {at.layer} is not in the routing table, which has layers 0 to {len(routing.replica_rank) - 1}")


def checked_ids(topk_ids: torch.Tensor, num_experts: int) -> NDArray[np.int64]:
    """`topk_ids` as an int64 array. Raises InvalidInputError for an expert that does not exist."""
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
    return y if y.is_contiguous() else y.contiguous()
