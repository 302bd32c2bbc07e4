"""How the low-latency kernels of Mooncake EP, NIXL EP and DeepEP lay tokens out, and how that becomes this project's rows and back.

These libraries know physical experts only: `experts_per_rank` numbers for each rank, rank r's from r * experts_per_rank on. Here the n-th
expert that a rank serves in a layer, ascending, has its n-th number; every rank derives that from the routing table. A dispatch returns
[experts_per_rank, ep_size * max_tokens, H]: for each expert the rows of each source rank in one run, sources and tokens in the order in
which their atomics happened to fall. `unpack` restores the order that `DispatchHandle` promises.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError

_COUNT_BITS = 32
_MESSAGE_LIMIT = 1024
"""the kernels count a rank's messages to one expert towards a tag of 1024, and would take more for the end"""


class Sums(enum.Enum):
    """Who adds up the outputs of a token's experts."""

    KERNEL = "kernel"
    """The library: float32, in top-k order, fused multiply-adds from zero. The same wherever experts live, not the other backends' bits."""

    OWN = "own"
    """This project: the library brings each output home by itself, and the sum is the one that every other backend computes, but for
    the sign of a zero output. Buffers are `top_k` times as large; what crosses the wire is the same."""


@dataclass(frozen=True)
class PackedCapacity:
    """The largest batch, alike on all ranks of a run.

    Attributes:
        ep_size: ranks, dead ones and empty seats included.
        experts_per_rank: logical experts that one rank may serve in a layer, streamed ones included.
        max_tokens: per rank and step; top_k: K, exactly; hidden: H, exactly.
    """

    ep_size: int
    experts_per_rank: int
    max_tokens: int
    top_k: int
    hidden: int
    sums: Sums = Sums.KERNEL

    def __post_init__(self) -> None:
        for name in ("ep_size", "experts_per_rank", "max_tokens", "top_k", "hidden"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.messages >= _MESSAGE_LIMIT:
            each = "each" if self.sums is Sums.KERNEL else f"{self.top_k} messages each"
            raise InvalidInputError(
                f"{self.max_tokens} tokens per rank, {each}, are too many for the kernels' counters; they must be fewer than "
                f"{_MESSAGE_LIMIT} messages: give max_tokens up to {(_MESSAGE_LIMIT - 4) // self.messages_per_token}"
            )

    @property
    def messages_per_token(self) -> int:
        """Tokens as the library sees them, for each of ours."""
        return self.top_k if self.sums is Sums.OWN else 1

    @property
    def messages(self) -> int:
        """The library's `num_max_dispatch_tokens_per_rank`; a multiple of 4, as its bulk copies want."""
        return -(-self.max_tokens * self.messages_per_token // 4) * 4

    @property
    def num_experts(self) -> int:
        """Physical experts over all ranks."""
        return self.ep_size * self.experts_per_rank


def number_experts(replica_rank: NDArray[np.int32], ep_size: int) -> NDArray[np.int32]:
    """int32 [ep_size, E]: the number of each expert on each rank that serves it, -1 elsewhere. `replica_rank` int32 [E, X], one layer's.

    Example, E=3, rank 0 serves experts 0 and 2, rank 1 serves 1 and 2::

        replica_rank = [[0, -1], [1, -1], [0, 1]]   ->   [[0, -1, 1], [-1, 0, 1]]
    """
    serves = np.zeros((ep_size, len(replica_rank)), dtype=bool)
    expert, copy = np.nonzero((replica_rank >= 0) & (replica_rank < ep_size))
    serves[replica_rank[expert, copy], expert] = True
    numbers = np.cumsum(serves, axis=1, dtype=np.int32) - 1
    return np.where(serves, numbers, -1).astype(np.int32)


class Unpacked(NamedTuple):
    """How the packed rows become `DispatchHandle` rows.

    Attributes:
        order: int64 [N], for each row its place among the experts_per_rank * width packed ones.
        groups: (logical expert, first row, end row).
    """

    order: NDArray[np.int64]
    groups: tuple[tuple[int, int, int], ...]


class BrokenSourceError(ValueError):
    """What arrived cannot have been sent by a rank in step with us. `rank` is its source."""

    def __init__(self, rank: int):
        self.rank = rank
        super().__init__(f"rank {rank} sent counts or token numbers that no batch has")


def unpack(layout: NDArray[np.int64], sent_as: NDArray[np.int32], experts: NDArray[np.int64], messages: int) -> Unpacked:
    """Order what arrived by (expert, source rank, token).

    Args:
        layout: int64 [experts_per_rank, ep_size], for each expert and source (first << 32 | count) of its run.
        sent_as: int32 [experts_per_rank, width], the number of the source's token in each row; arbitrary outside the runs.
        experts: the logical expert behind each number, length at most experts_per_rank.

    Raises:
        BrokenSourceError: a run outside of the buffer, a token that no source can have, rows for an expert that is not served here.
    """
    width = sent_as.shape[1]
    count = (layout & ((1 << _COUNT_BITS) - 1)).astype(np.int64)
    first = layout >> _COUNT_BITS
    bad = (count > messages) | (first < 0) | (first + count > width)
    bad[len(experts) :] |= count[len(experts) :] > 0
    if bad.any():
        raise BrokenSourceError(int(np.nonzero(bad)[1][0]))
    index, source = np.nonzero(count)
    counts, firsts = count[index, source], first[index, source]
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    within = np.arange(total) - np.repeat(ends - counts, counts)
    place = np.repeat(index * width + firsts, counts) + within
    token = sent_as.reshape(-1)[place]
    source_of = np.repeat(source, counts)
    strange = (token < 0) | (token >= messages)
    if strange.any():
        raise BrokenSourceError(int(source_of[strange][0]))
    index_of = np.repeat(index, counts)
    order = place[np.lexsort((token, source_of, index_of))]
    cuts = np.concatenate(([0], np.cumsum(np.bincount(index_of, minlength=len(experts))))).tolist()
    groups = tuple((int(e), cuts[n], cuts[n + 1]) for n, e in enumerate(experts) if cuts[n] < cuts[n + 1])
    return Unpacked(order, groups)
