"""What each slot is meant to hold (`ExpertPlacement`) and what it does hold (`SlotContents`): two records, never one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.topology import Topology

EMPTY = -1
"""An empty slot, or padding in a map. Never a valid expert or slot id."""


@dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """Which logical expert each physical slot is meant to serve, per MoE layer.

    Example, L=2 layers, E=3 experts, P=4 slots, slot 3 of the second layer empty::

        physical_to_logical_map = [[0, 1, 2, 0],
                                   [2, 1, 0, -1]]
        logical_to_physical_map = [[[0, 3], [1, -1], [2, -1]],
                                   [[2, -1], [1, -1], [0, -1]]]
        logical_replica_count   = [[2, 1, 1],
                                   [1, 1, 1]]

    Attributes:
        physical_to_logical_map: int64 [L, P], -1 for an empty slot (a dead rank's slots are empty too).
        num_logical_experts: E.
    """

    physical_to_logical_map: NDArray[np.int64]
    num_logical_experts: int

    def __post_init__(self) -> None:
        p2l = np.ascontiguousarray(self.physical_to_logical_map, dtype=np.int64)
        if p2l.ndim != 2:
            raise InvalidInputError(f"physical_to_logical_map has shape {p2l.shape}; expected [layers, slots]")
        if p2l.size and (p2l.min() < EMPTY or p2l.max() >= self.num_logical_experts):
            raise InvalidInputError(
                f"physical_to_logical_map holds ids from {p2l.min()} to {p2l.max()}; allowed: -1 to {self.num_logical_experts - 1}"
            )
        p2l.setflags(write=False)
        object.__setattr__(self, "physical_to_logical_map", p2l)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ExpertPlacement)
            and self.num_logical_experts == other.num_logical_experts
            and np.array_equal(self.physical_to_logical_map, other.physical_to_logical_map)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_layers(self) -> int:
        return int(self.physical_to_logical_map.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.physical_to_logical_map.shape[1])

    @cached_property
    def logical_replica_count(self) -> NDArray[np.int64]:
        """int64 [L, E]: in how many slots each expert lives."""
        shape = (self.num_layers, self.num_logical_experts)
        index = np.arange(shape[0])[:, None] * shape[1] + self.physical_to_logical_map
        held = index[self.physical_to_logical_map != EMPTY]
        return np.bincount(held, minlength=shape[0] * shape[1]).reshape(shape)

    @cached_property
    def logical_to_physical_map(self) -> NDArray[np.int64]:
        """int64 [L, E, X]: the slots of each expert, ascending, padded with -1; X is the largest replica count (at least 1)."""
        width = max(1, int(self.logical_replica_count.max(initial=0)))
        l2p = np.full((self.num_layers, self.num_logical_experts, width), EMPTY, dtype=np.int64)
        for layer, row in enumerate(self.physical_to_logical_map):
            slots = np.nonzero(row != EMPTY)[0]
            order = slots[np.argsort(row[slots], kind="stable")]
            experts = row[order]
            starts = np.searchsorted(experts, experts, side="left")
            l2p[layer, experts, np.arange(len(order)) - starts] = order
        return l2p

    def missing_experts(self) -> list[tuple[int, int]]:
        """(layer, expert) pairs that no slot holds."""
        return [(int(a), int(b)) for a, b in np.argwhere(self.logical_replica_count == 0)]

    def masked(self, topology: Topology, active_ranks: Any) -> ExpertPlacement:
        """The same placement with dead ranks' slots empty."""
        live = topology.live_slot_mask(active_ranks)
        return ExpertPlacement(np.where(live[None, :], self.physical_to_logical_map, EMPTY), self.num_logical_experts)


class SlotContents:
    """What each slot does hold, with the digest its bytes were checked against. Changed only by reports of finished loads.

    Attributes:
        experts: int64 [L, P], the expert whose verified bytes a slot holds, -1 where it holds none that may be served.
        digests: uint64 [L, P], the digest of those bytes (0 where none).
        ordered: int64 [L, P], the epoch of the newest order to fill the slot. A report of an older one comes too late to be true.
    """

    def __init__(self, num_layers: int, num_slots: int) -> None:
        self.experts = np.full((num_layers, num_slots), EMPTY, dtype=np.int64)
        self.digests = np.zeros((num_layers, num_slots), dtype=np.uint64)
        self.ordered = np.zeros((num_layers, num_slots), dtype=np.int64)

    def record(self, layer: int, slot: int, expert: int, digest: int, epoch: int = 0) -> None:
        """A slot was filled and verified, by an order of this epoch."""
        layers, slots = self.experts.shape
        if not (0 <= layer < layers and 0 <= slot < slots):
            raise InvalidInputError(f"slot ({layer}, {slot}) is outside {layers} layers x {slots} slots")
        if epoch >= self.ordered[layer, slot]:
            self.experts[layer, slot] = expert
            self.digests[layer, slot] = digest

    def order(self, layer: int, slot: int, epoch: int) -> None:
        """A slot is about to be overwritten: until that is reported, nobody knows what it holds."""
        self.experts[layer, slot] = EMPTY
        self.digests[layer, slot] = 0
        self.ordered[layer, slot] = epoch

    def grow(self, num_slots: int) -> None:
        """Room for so many more slots per layer, all empty."""
        width = ((0, 0), (0, num_slots))
        self.experts = np.pad(self.experts, width, constant_values=EMPTY)
        self.digests = np.pad(self.digests, width)
        self.ordered = np.pad(self.ordered, width)

    def clear_rank(self, topology: Topology, rank: int) -> None:
        """A rank died: whatever comes back in its seat starts with empty slots."""
        gone = topology.slots_of(rank)
        self.experts[:, gone.start : gone.stop] = EMPTY
        self.digests[:, gone.start : gone.stop] = 0
        self.ordered[:, gone.start : gone.stop] = 0

    def mismatches(self, placement: ExpertPlacement) -> list[tuple[int, int, int]]:
        """(layer, slot, expert) that the placement wants and the slot does not hold: exactly what must be loaded."""
        wanted = placement.physical_to_logical_map
        layer, slot = np.nonzero((wanted != EMPTY) & (wanted != self.experts))
        return [(int(a), int(b), int(wanted[a, b])) for a, b in zip(layer, slot, strict=True)]
