"""The pure part that backends share: which pair goes to which rank, and how received pairs are grouped by expert.

A pair is (row, expert): one row to run through one expert. All orders below are total, so every backend and every split over ranks
computes the same rows in the same places.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.dispatch import rows as _rows


class BadPairsError(ValueError):
    """A source named a row that it did not send, or an expert that is not served here. `source` is its index."""

    def __init__(self, source: int):
        self.source = source
        super().__init__(f"source {source} sent pairs that name unknown rows or experts")


@dataclass(frozen=True, slots=True)
class Departure:
    """Where one rank's T x K pairs go, over R destination ranks.

    Example, T=2, K=2, topk_ids [[0, 2], [2, 1]] where rank 0 serves expert 0 and rank 1 serves 1 and 2::

        pairs    = [[0, 0],  [0, 2], [1, 2], [1, 1]]    start = [0, 1, 4]
        position = [[0, 1], [2, 3]]

    Attributes:
        pairs: int32 [T * K, 2], (token, expert); by destination, within one by (token, k).
        start: where each destination's pairs begin, length R + 1.
        position: int32 [T, K], where pair (t, k) stands in `pairs`.
    """

    pairs: NDArray[np.int32]
    start: list[int]
    position: NDArray[np.int32]

    def pairs_for(self, rank: int) -> NDArray[np.int32]:
        """The pairs of one destination."""
        return self.pairs[self.start[rank] : self.start[rank + 1]]


def plan_departure(topk_ids: NDArray[np.int64], destination: NDArray[np.int32], num_ranks: int) -> Departure:
    """Order one rank's pairs by destination. `topk_ids`, `destination` [T, K]; raises InvalidInputError for a pair without a rank."""
    pairs = np.empty((topk_ids.size, 2), dtype=np.int32)
    position = np.empty(topk_ids.shape, dtype=np.int32)
    start = np.empty(num_ranks + 1, dtype=np.int64)
    if _rows.compiled is not None:
        bad = _rows.compiled.plan_departure(
            np.ascontiguousarray(topk_ids), np.ascontiguousarray(destination), topk_ids.shape[1], pairs, position, start
        )
    else:
        bad = _plan_departure(topk_ids, destination, pairs, position, start)
    if bad >= 0:
        expert, rank = int(topk_ids.reshape(-1)[bad]), int(destination.reshape(-1)[bad])
        raise InvalidInputError(
            f"expert {expert} is served by rank {rank}, the mesh has ranks 0 to {num_ranks - 1}; "
            f"install a routing table in which every expert has a live replica"
        )
    return Departure(pairs, start.tolist(), position)


def _plan_departure(
    topk_ids: NDArray[np.int64],
    destination: NDArray[np.int32],
    pairs: NDArray[np.int32],
    position: NDArray[np.int32],
    start: NDArray[np.int64],
) -> int:
    """Fill the plan. Returns the index of a pair without a rank, or -1."""
    flat = destination.reshape(-1)
    wrong = np.flatnonzero((flat < 0) | (flat >= len(start) - 1))
    if wrong.size:
        return int(wrong[0])
    order = np.argsort(flat, kind="stable")
    start[:] = np.searchsorted(flat[order], np.arange(len(start)))
    pairs[:, 0] = order // max(1, topk_ids.shape[1])
    pairs[:, 1] = topk_ids.reshape(-1)[order]
    position.reshape(-1)[order] = np.arange(len(order), dtype=np.int32)
    return -1


class DistinctRows(NamedTuple):
    """The rows to send so that each goes once. `pairs` int32 [n, 2] name them by their index in `tokens` int32 [rows]."""

    tokens: NDArray[np.int32]
    pairs: NDArray[np.int32]


def distinct_rows(pairs: NDArray[np.int32]) -> DistinctRows:
    """Number the tokens of one destination's pairs; pairs of one token stand together, as `Departure` has them."""
    tokens = pairs[:, 0]
    first = np.empty(len(tokens), dtype=bool)
    first[:1] = True
    np.not_equal(tokens[1:], tokens[:-1], out=first[1:])
    renamed = np.empty_like(pairs)
    renamed[:, 0] = np.cumsum(first) - 1
    renamed[:, 1] = pairs[:, 1]
    return DistinctRows(tokens[first], renamed)


@dataclass(frozen=True, slots=True)
class Arrival:
    """How N received pairs become rows grouped by expert.

    Attributes:
        source_of, row_of: int32 [N], for each grouped row the received row that it copies.
        groups: (expert, first row, end row), experts ascending; within a group by source, within one in the order sent.
        back: int32 [N], for each pair in order of arrival (source by source) its grouped row.
    """

    source_of: NDArray[np.int32]
    row_of: NDArray[np.int32]
    groups: tuple[tuple[int, int, int], ...]
    back: NDArray[np.int32]


def plan_arrival(pairs: Sequence[NDArray[np.int32]], num_rows: Sequence[int], served: NDArray[np.bool_]) -> Arrival:
    """Group the pairs of all sources by expert.

    Args:
        pairs: for each source, ascending by rank, int32 [n, 2] (row, expert) in the order sent.
        num_rows: how many rows each source has.
        served: bool [E], the experts that may be asked for here.

    Raises:
        BadPairsError: naming the first source that asks for what is not there.
    """
    total = sum(map(len, pairs))
    source_of, row_of, back = np.empty((3, total), dtype=np.int32)
    if _rows.compiled is not None:
        groups = _rows.compiled.plan_arrival(pairs, np.array(num_rows, dtype=np.int64), served, source_of, row_of, back)
        if isinstance(groups, int):
            raise BadPairsError(groups)
    else:
        groups = _plan_arrival(pairs, num_rows, served, source_of, row_of, back)
    return Arrival(source_of, row_of, groups, back)


def _plan_arrival(
    pairs: Sequence[NDArray[np.int32]],
    num_rows: Sequence[int],
    served: NDArray[np.bool_],
    source_of: NDArray[np.int32],
    row_of: NDArray[np.int32],
    back: NDArray[np.int32],
) -> tuple[tuple[int, int, int], ...]:
    for source, (part, limit) in enumerate(zip(pairs, num_rows, strict=True)):
        # seen as unsigned, a negative number is a huge one
        row, expert = part.view(np.uint32).T
        if ((row >= limit) | (expert >= len(served))).any() or not served[part[:, 1]].all():
            raise BadPairsError(source)
    everything = np.concatenate(pairs)
    order = np.argsort(everything[:, 1], kind="stable")
    source_of[:] = np.repeat(np.arange(len(pairs)), [len(p) for p in pairs])[order]
    row_of[:] = everything[order, 0]
    back[order] = np.arange(len(order), dtype=np.int32)
    by_expert = everything[order, 1]
    cuts = [0, *(np.flatnonzero(by_expert[1:] != by_expert[:-1]) + 1).tolist(), len(order)] if len(order) else [0]
    return tuple((int(by_expert[a]), a, b) for a, b in itertools.pairwise(cuts))
