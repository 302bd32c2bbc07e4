"""The common case of a layer, compiled: every peer of the mesh shares its outbox, frames are small, nothing is left over from before.

It saves most of the interpreter's work per layer, and decides nothing: whatever is not the common case is left, untouched, to the general
path in `socket.py`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.runtime.dispatch.base import DispatchHandle, StepPoint
from elastic_ep.runtime.dispatch.channel import Channel
from elastic_ep.runtime.dispatch.frames import FrameFormat
from elastic_ep.runtime.dispatch.grouping import Departure
from elastic_ep.runtime.dispatch.mesh import Mesh
from elastic_ep.runtime.dispatch.rows import RowBuffer, compiled


class LayerTables(NamedTuple):
    """What one layer's routing needs, cut from a RoutingTable once: `served` bool [E] marks the experts with a replica here."""

    replica_rank: NDArray[np.int32]
    cumulative_quota: NDArray[np.float64]
    served: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class LinkedState:
    """What combine needs of a dispatch that went this way, as the extension keeps it.

    Attributes:
        generation, ranks: of the link it went through; its ranks ascending, this one among them, are the sources.
        plan: start int64 [R + 1], pairs int32 [T * K, 2], position int32 [T, K] of `Departure`, one after the other.
        arrival: int64 [sources + 1], where each source's pairs begin; then source_of, row_of and back of `Arrival`.
        weights: float32 [T, K], contiguous.
    """

    at: StepPoint
    generation: int
    ranks: list[int]
    plan: bytes
    arrival: bytes
    weights: torch.Tensor


class Link:
    """The mesh as the extension sees it, valid for one generation of it."""

    def __init__(self, mesh: Mesh, interrupt_fd: int | None, deadline_s: float):
        assert compiled is not None
        assert mesh.outbox is not None
        self.generation = mesh.generation
        self.ranks = sorted([mesh.rank, *mesh.channels])
        self.channels: list[Channel] = [mesh.channels[r] for r in self.ranks if r != mesh.rank]
        self._extension = compiled
        self._mesh = mesh
        self._timeout_ms = int(deadline_s * 1e3)
        self._num_ranks = self.ranks[-1] + 1
        # both keep the mapped memory alive
        self._memory = [mesh.outbox, *(c.inbox for c in self.channels)]
        words = array("q", (mesh.rank, self.ranks.index(mesh.rank), self._num_ranks, -1 if interrupt_fd is None else interrupt_fd))
        words.extend((mesh.outbox.base, mesh.outbox.region_bytes, len(self.channels), 0))
        for channel in self.channels:
            assert channel.inbox is not None
            ahead = channel.ahead
            words.extend((channel.peer, channel.fd, ahead.ctypes.data, ahead.nbytes, channel.cursor.buffer_info()[0]))
            words.extend((channel.inbox.base, channel.inbox.region_bytes, 0))
        self._words = words

    def is_idle(self) -> bool:
        """No channel has anything left over."""
        return all(channel.is_idle for channel in self.channels)

    def dispatch(
        self,
        form: FrameFormat,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        tables: LayerTables,
        phases: tuple[float, float, float],
        at: StepPoint,
        rows: RowBuffer,
    ) -> DispatchHandle | Departure | None:
        """None if nothing was done; the plan if the frames are on their way but did not all come in one go."""
        num_tokens, top_k = ids.shape
        address = x.data_ptr()
        begun = self._extension.begin_dispatch(
            self._words,
            form.prefix,
            self._timeout_ms,
            address,
            num_tokens,
            form.row_bytes,
            ids.data_ptr(),
            top_k,
            *tables[:2],
            *phases,
            tables[2],
        )
        if begun is None:
            return None
        plan, arrival, groups, unsent, num_sent, num_received = begun
        self._count(num_sent, num_received)
        if arrival is None:
            self._post(unsent)
            return unpack_plan(plan, self._num_ranks, num_tokens, top_k)
        num_rows = groups[-1][2] if groups else 0
        out, _ = rows.take(num_rows, form.hidden, x.dtype)
        self._extension.finish_dispatch(self._words, form.prefix, arrival, address, num_tokens, form.row_bytes, rows.address, num_rows)
        if weights.dtype != torch.float32 or not weights.is_contiguous():
            weights = weights.to(torch.float32).contiguous()
        return DispatchHandle(out, groups, LinkedState(at, self.generation, self.ranks, plan, arrival, weights))

    def combine(self, form: FrameFormat, y: torch.Tensor, state: LinkedState) -> torch.Tensor | bool:
        """The sums; False if nothing was done, True if the frames are on their way but did not all come in one go."""
        num_tokens, top_k = state.weights.shape
        out = torch.empty((num_tokens, form.hidden), dtype=y.dtype)
        ended = self._extension.do_combine(
            self._words,
            form.prefix,
            self._timeout_ms,
            y.data_ptr(),
            len(y),
            form.hidden,
            y.dtype == torch.bfloat16,
            state.plan,
            state.arrival,
            state.weights.data_ptr(),
            num_tokens,
            top_k,
            out.data_ptr(),
        )
        if ended is None:
            return False
        unsent, num_sent, num_received = ended
        self._count(num_sent, num_received)
        if unsent is None:
            return out
        self._post(unsent)
        return True

    def _post(self, unsent: list[bytes]) -> None:
        for channel, rest in zip(self.channels, unsent, strict=True):
            if rest:
                channel.post([rest])

    def _count(self, num_sent: int, num_received: int) -> None:
        self._mesh.counters.bytes_sent += num_sent
        self._mesh.counters.bytes_received += num_received


def unpack_plan(plan: bytes, num_ranks: int, num_tokens: int, top_k: int) -> Departure:
    """`LinkedState.plan` as arrays."""
    words = 2 * (num_ranks + 1)
    numbers = np.frombuffer(plan, dtype=np.int32)
    num_pairs = num_tokens * top_k
    return Departure(
        numbers[words : words + 2 * num_pairs].reshape(num_pairs, 2),
        numbers[:words].view(np.int64).tolist(),
        numbers[words + 2 * num_pairs :].reshape(num_tokens, top_k),
    )


class Sources(NamedTuple):
    """`back` of an `Arrival`, and where each source rank's pairs begin and end in it."""

    back: NDArray[np.int32]
    pairs: dict[int, tuple[int, int]]


def unpack_sources(arrival: bytes, ranks: list[int]) -> Sources:
    """What the general path needs of `LinkedState.arrival`."""
    words = 2 * (len(ranks) + 1)
    numbers = np.frombuffer(arrival, dtype=np.int32)
    start = numbers[:words].view(np.int64).tolist()
    return Sources(numbers[words + 2 * start[-1] :], {r: (start[i], start[i + 1]) for i, r in enumerate(ranks)})
