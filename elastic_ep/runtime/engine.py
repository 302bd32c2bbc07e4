"""What the rank process needs of a model: load the dense part, hold experts in slots, run one step. `models/` implements it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from elastic_ep.brain.messages import SampledToken, SequenceWork
from elastic_ep.core.routing import RoutingTable
from elastic_ep.runtime.dispatch.base import Dispatcher, Interrupted, PeerFailed


class SlotLoad(NamedTuple):
    """Fill one of this rank's slots."""

    layer: int
    local_slot: int
    expert: int


@dataclass(frozen=True)
class StepOutput:
    """One finished forward.

    Attributes:
        tokens: one entry per sequence whose work asked for a sample.
        expert_counts: how many (token, expert) pairs this rank's own tokens sent to each expert, int lists [L][E], or None if not recorded.
    """

    tokens: list[SampledToken]
    expert_counts: list[list[int]] | None = None


class Slots(Protocol):
    """The expert slots of one rank. `stage` may run in another thread than everything else."""

    def load(self, load: SlotLoad) -> tuple[int, int]:
        """Read one expert's bytes into a slot and verify them. Returns (digest, bytes read). Raises CheckpointError."""
        ...

    def stage(self, load: SlotLoad) -> int:
        """Read and verify one expert beside the live slots, in place of what was staged for that slot. Returns the bytes read."""
        ...

    def adopt(self, load: SlotLoad) -> int | None:
        """Put what was staged for the slot into it, without copying. Returns its digest, None if this expert was not staged for it."""
        ...

    def drop_staged(self) -> None:
        """Free whatever is staged."""
        ...


class Engine(Protocol):
    """A model as one rank runs it."""

    @property
    def slots(self) -> Slots:
        """Of the routed experts; there once `load_dense` has returned."""
        ...

    def load_dense(self) -> None:
        """Read all weights except routed experts. Raises CheckpointError."""
        ...

    def run_step(
        self, work: Sequence[SequenceWork], release: Sequence[int], routing: RoutingTable, dispatcher: Dispatcher, step: int
    ) -> StepOutput | PeerFailed | Interrupted:
        """One forward over `work` (possibly empty: this rank still serves its experts). KV is written by position, so running a
        step again overwrites what a void run left. `release` frees the KV of finished sequences first."""
        ...

    def close(self) -> None: ...
