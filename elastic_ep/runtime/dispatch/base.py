"""Dispatch and combine: what a backend must do, and what its calls return. One backend per file beside this one.

A step is one forward in lock-step: at each MoE layer every active rank calls `dispatch`, computes its experts on the rows it received,
and calls `combine`. A failed peer is a value (`PeerFailed`), never an exception: the step is void, the process lives.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from elastic_ep.core.routing import RoutingTable


class StepPoint(NamedTuple):
    """Where in the run an exchange happens. Every frame carries it; an older one is dropped, a newer one waits."""

    epoch: int
    step: int
    layer: int
    """index among the MoE layers, 0-based"""


class FailureKind(enum.Enum):
    """How a peer failed, as seen from here."""

    CLOSED = "closed"
    """its channel reached end-of-file or was reset: the process died or cut us off"""
    DEADLINE = "deadline"
    """no complete frame before the deadline: it hangs, is stopped or is unreachable"""
    PROTOCOL = "protocol"
    """it sent bytes that are no frame of ours, or asked for an expert that this rank does not hold"""


@dataclass(frozen=True)
class DispatchHandle:
    """What one dispatch brought here, and what combine needs to send it back. T tokens here, N rows received, H hidden.

    Attributes:
        rows: [N, H] rows to run through experts, in the model's dtype, grouped by expert (ascending), within a group by
            (source rank, token): `groups` cuts them. The memory is the backend's: the next dispatch overwrites it.
        groups: (logical expert, first row, end row) for each expert that received rows.
        state: the backend's own bookkeeping.
    """

    rows: torch.Tensor
    groups: tuple[tuple[int, int, int], ...]
    state: Any


@dataclass(frozen=True)
class PeerFailed:
    """One or more peers failed during a call. The step is void.

    Attributes:
        peers: rank -> how it failed.
        partial: what the call would have returned from the peers that did answer, their rows intact (rows of failed
            peers are absent from a dispatch, zero in a combine).
    """

    peers: Mapping[int, FailureKind]
    partial: DispatchHandle | torch.Tensor | None = None


@dataclass(frozen=True)
class Interrupted:
    """The controller wrote to us during the call (the step is void, or we are to stop). Nothing is known to be wrong with a peer."""


class Dispatcher(Protocol):
    """A backend. Four methods; constructors do no I/O.

    `connect` makes the mesh match the given peers: dials or accepts those not connected yet and closes the channel to every rank
    not named (a dead rank that wakes up finds its channels closed). It is called at start and with each new epoch, on every rank that it
    names; peers that stay keep their connections. Returns the peers that could not be reached before `deadline_s`. A rank that was left out
    and is still the same process is named again only when the others have ended the connect without it. Where channels cannot be closed
    ranks know each other's connects by `epoch`, which grows from call to call; other backends do without.

    Points must grow from call to call, and a void step is run again under a later one: frames of older points are dropped. No rank may
    begin a new step before every rank has ended the void one (the controller waits for their answers), as rows may be read in place.
    A partial result is for looking at, not for `combine`.
    """

    def connect(self, peers: Mapping[int, str], deadline_s: float, *, epoch: int) -> PeerFailed | Interrupted | None: ...

    def dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint
    ) -> DispatchHandle | PeerFailed | Interrupted:
        """Send each token's row to the ranks that serve its experts, and receive the rows that others send here.

        Args:
            x: [T, H] this rank's tokens, T >= 0, float32 or bfloat16, contiguous.
            topk_ids: int64 [T, K] logical experts; topk_weights: [T, K].
        """
        ...

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> torch.Tensor | PeerFailed | Interrupted:
        """Send expert outputs `y` [N, H] (rows as in `handle.rows`) back and sum this rank's own.

        Returns [T, H] in x's dtype: out[t] = sum over k, in the order of token t's top-k list, of weight[t, k] * y(t, k), all in
        float32, rounded once at the end. The result does not depend on which rank computed what.
        """
        ...

    def close(self) -> None: ...


class MeshDispatcher(Dispatcher, Protocol):
    """A dispatcher that peers dial."""

    def listen(self) -> str:
        """Be reachable, from now on; returns the address. Raises InvalidInputError."""
        ...
