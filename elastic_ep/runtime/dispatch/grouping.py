"""The pure part that backends share: who gets which row, how received rows are grouped by expert, and the sum at the end.

A token's row goes once to each rank that serves at least one of its experts; the pairs (row, expert) that go with it say which. Each
pair comes back as one row. All orders below are total, so every backend and every split over ranks gives the same bits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError

_SUM_BLOCK_BYTES = 1 << 18
"""float32 scratch of one block of `weighted_sum`: small enough to stay in a core's own cache"""


@dataclass(frozen=True, slots=True)
class Departure:
    """How one rank's T x K (token, expert) pairs leave it, over R destination ranks.

    Example, T=2, K=2, topk_ids [[0, 2], [2, 1]] where rank 0 serves expert 0 and rank 1 serves 1 and 2::

        pairs      = [[0, 0],  [0, 2], [1, 2], [1, 1]]   pair_start = [0, 1, 4]
        tokens     = [0,       0, 1]                     row_start  = [0, 1, 3]
        position   = [[0, 1], [2, 3]]

    Attributes:
        tokens: int64 [rows], the token of each outgoing row; by destination, within one by token.
        row_start: where each destination's rows begin in `tokens`, length R + 1.
        pairs: int32 [T * K, 2], (row counted from its destination's first, expert); by destination, within one by (token, k).
        pair_start: where each destination's pairs begin in `pairs`, length R + 1.
        position: int64 [T, K], where pair (t, k) stands in `pairs`.
    """

    tokens: NDArray[np.int64]
    row_start: list[int]
    pairs: NDArray[np.int32]
    pair_start: list[int]
    position: NDArray[np.int64]


def plan_departure(topk_ids: NDArray[np.int64], destination: NDArray[np.int32], num_ranks: int) -> Departure:
    """Order one rank's pairs by destination. `topk_ids`, `destination` [T, K]; raises InvalidInputError for a pair without a rank."""
    num_tokens, top_k = topk_ids.shape
    num_pairs = num_tokens * top_k
    flat = destination.reshape(-1)
    order = np.argsort(flat, kind="stable")
    by_rank = flat[order]
    if num_pairs and (by_rank[0] < 0 or by_rank[-1] >= num_ranks):
        bad = int(order[0] if by_rank[0] < 0 else order[-1])
        raise InvalidInputError(
            f"expert {int(topk_ids.reshape(-1)[bad])} has rank {int(flat[bad])}, connected are ranks below {num_ranks}; "
            f"install a routing table in which every expert has a live replica"
        )
    token = order // top_k if top_k else order
    first = np.empty(num_pairs, dtype=bool)
    first[:1] = True
    np.not_equal(token[1:], token[:-1], out=first[1:])
    first[1:] |= by_rank[1:] != by_rank[:-1]
    row = np.cumsum(first)
    pair_start = np.searchsorted(by_rank, np.arange(num_ranks + 1))
    # row[i] counts rows up to and with pair i, so the rows before a destination are those up to the pair before its first
    row_start = np.concatenate(([0], row))[pair_start]
    pairs = np.empty((num_pairs, 2), dtype=np.int32)
    pairs[:, 0] = row - 1 - row_start[by_rank]
    pairs[:, 1] = topk_ids.reshape(-1)[order]
    return Departure(token[first], row_start.tolist(), pairs, pair_start.tolist(), inverse(order).reshape(num_tokens, top_k))


@dataclass(frozen=True, slots=True)
class Arrival:
    """How N received pairs become rows grouped by expert.

    Attributes:
        source_row: int64 [N], for each grouped row the index of the received row it copies.
        groups: (expert, first row, end row), experts ascending; within a group the order of arrival.
        back: int64 [N], for each pair in order of arrival, its grouped row.
    """

    source_row: NDArray[np.int64]
    groups: tuple[tuple[int, int, int], ...]
    back: NDArray[np.int64]


def plan_arrival(rows: NDArray[Any], experts: NDArray[np.int32]) -> Arrival:
    """Group received pairs. `rows`, `experts` [N]: by source rank, within one in the order sent."""
    order = np.argsort(experts, kind="stable")
    by_expert = experts[order]
    cuts = [0, *(np.flatnonzero(by_expert[1:] != by_expert[:-1]) + 1).tolist(), len(order)] if len(order) else [0]
    groups = tuple((int(by_expert[a]), a, b) for a, b in itertools.pairwise(cuts))
    return Arrival(rows[order], groups, inverse(order))


def inverse(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The permutation that undoes `order`."""
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return back


def as_array(tensor: torch.Tensor) -> NDArray[Any]:
    """A NumPy view of a contiguous CPU tensor; bfloat16 shows as int16 of the same bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def take_rows(rows: NDArray[Any], index: NDArray[np.int64], out: NDArray[Any]) -> None:
    """out[i] = rows[index[i]]; the caller vouches for the indices."""
    np.take(rows, index, axis=0, out=out, mode="clip")


def weighted_sum(rows: NDArray[Any], position: NDArray[np.int64], weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """out[t] = sum over k = 0, 1, … in this order of float32(weights[t, k]) * float32(rows[position[t, k]]), rounded once to `dtype`.

    Every product and every partial sum is rounded to float32 on its own (no fused multiply-add), so neither the number of tokens
    nor their place in the batch changes a bit. rows [N, H] as `as_array` shows them; position, weights [T, K]; returns [T, H].
    """
    num_tokens, top_k = position.shape
    hidden = rows.shape[1]
    out = torch.empty((num_tokens, hidden), dtype=torch.float32)
    total = out.numpy()
    if not top_k:
        total.fill(0.0)
        return out.to(dtype)
    weight = weights.detach().to(torch.float32).numpy()[:, :, None]
    block = max(1, min(num_tokens, _SUM_BLOCK_BYTES // (4 * top_k * hidden or 1)))
    scratch = np.empty((block, top_k, hidden), dtype=np.float32)
    half = np.empty((block, top_k, hidden), dtype=np.int16) if dtype == torch.bfloat16 else None
    for start in range(0, num_tokens, block):
        end = min(start + block, num_tokens)
        part = scratch[: end - start]
        if half is None:
            np.take(rows, position[start:end], axis=0, out=part, mode="clip")
        else:
            narrow = half[: end - start]
            np.take(rows, position[start:end], axis=0, out=narrow, mode="clip")
            np.left_shift(narrow, 16, out=part.view(np.int32), dtype=np.int32)
        part *= weight[start:end]
        into = total[start:end]
        if top_k == 1:
            into[:] = part[:, 0]
            continue
        np.add(part[:, 0], part[:, 1], out=into)
        for k in range(2, top_k):
            into += part[:, k]
    return out.to(dtype)
