"""What the rank process needs of a model: load the dense part, hold experts in slots, run one step. `models/` implements it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.brain.messages import SampledToken, SequenceWork
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.runtime.dispatch.base import Dispatcher, Interrupted, PeerFailed
from elastic_ep.runtime.weights.base import ExpertSource, Loaded


class SlotLoad(NamedTuple):
    """Fill one of this rank's slots."""

    layer: int
    local_slot: int
    expert: int

    def check(self, num_layers: int, num_slots: int, num_experts: int) -> None:
        """Raises InvalidInputError if there is no such slot or expert."""
        if not (0 <= self.layer < num_layers and 0 <= self.local_slot < num_slots and 0 <= self.expert < num_experts):
            raise InvalidInputError(f"{self} is outside {num_layers} MoE layers, {num_slots} local slots, {num_experts} experts")


@dataclass(frozen=True)
class StepOutput:
    """One finished forward.

    Attributes:
        tokens: one entry per sequence whose work asked for a sample.
        expert_counts: int64 [L, E], how many of this rank's own tokens asked for each expert, or None if not recorded.
    """

    tokens: list[SampledToken]
    expert_counts: NDArray[np.int64] | None = None


class Slots(Protocol):
    """The expert slots of one rank. `load`, `stage`, `slot_bytes`, `bytes_of` and `addresses` may run in other threads than everything
    else. Up to `readers` calls of each, for different slots, may run at a time.

    Attributes:
        shape: (L, E, bytes of a slot).
        readers: how many experts are best read at a time.
        checkpoint: the source that has every expert.
        backup: a quicker source for experts that have no slot; None: the checkpoint alone.
    """

    shape: tuple[int, int, int]
    readers: int
    checkpoint: ExpertSource
    backup: ExpertSource | None

    def load(self, load: SlotLoad, sources: Sequence[ExpertSource], digest: int | None) -> Loaded:
        """Read one expert's bytes into a slot and verify them; see `read_verified`. The slot holds nothing meanwhile or after an error."""
        ...

    def stage(self, load: SlotLoad, sources: Sequence[ExpertSource], digest: int | None) -> Loaded:
        """The same, beside whatever slots hold, in place of what was staged for that slot. It may lie in the slot if that holds nothing."""
        ...

    def adopt(self, load: SlotLoad) -> int | None:
        """Put what was staged for the slot into it, at once. Returns its digest, None if this expert was not staged for it."""
        ...

    def drop_staged(self) -> None:
        """Forget whatever is staged."""
        ...

    def expect(self, layer: int, expert: int, digest: int) -> None:
        """An expert that may be streamed must have these bytes."""
        ...

    def bytes_of(self, layer: int, expert: int) -> torch.Tensor | None:
        """uint8 [n]: the bytes of an expert that a slot holds, None if none does."""
        ...

    def slot_bytes(self, layer: int, slot: int) -> torch.Tensor:
        """uint8 [n]: a slot's bytes, whatever they are."""
        ...

    def addresses(self) -> NDArray[np.uint64] | None:
        """uint64 [L, E]: where in this process' memory an expert's bytes lie, 0 for one that no slot holds. None if they lie elsewhere."""
        ...


class Engine(Protocol):
    """A model as one rank runs it."""

    @property
    def slots(self) -> Slots:
        """Of the routed experts; there once `make_slots` has returned."""
        ...

    def make_slots(self) -> None:
        """First of all, once: see what the checkpoint holds and have the slots, empty. Raises CheckpointError."""
        ...

    def load_dense(self) -> int:
        """Read all weights except routed experts. Returns a digest of them and of the configuration. Raises CheckpointError."""
        ...

    def prepare(self, dispatcher: Dispatcher) -> None:
        """Once, after `load_dense` and before the dispatcher is connected: whatever the first steps would have to wait for."""
        ...

    def run_step(
        self, work: Sequence[SequenceWork], release: Sequence[int], routing: RoutingTable, dispatcher: Dispatcher, step: int
    ) -> StepOutput | PeerFailed | Interrupted:
        """One forward over `work` (possibly empty: this rank still serves its experts). KV is written by position, so running a
        step again overwrites what a void run left. `release` frees the KV of finished sequences first."""
        ...

    def close(self) -> None: ...
