"""Where slots live: ranks, their slots, and the failure domains they share. Fixed for one world size; no state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError


@dataclass(frozen=True)
class Topology:
    """Ranks in order, each with its number of physical slots, and labels of the failure domains it belongs to.

    Slots are numbered rank by rank: rank r owns ``range(first_slot[r], first_slot[r + 1])``. Dead ranks keep their slot ids.

    Example, 2 ranks of 3 slots on two hosts::

        Topology((3, 3), {"node": ("a", "b")})
        first_slot   = [0, 3, 6]
        rank_of_slot = [0, 0, 0, 1, 1, 1]

    Attributes:
        slots_per_rank: physical slots (per layer) of each rank, length ``ep_size``.
        domains: level name (``"node"``, ``"rack"``, …) -> the label of each rank at that level, length ``ep_size``.
            The level ``"rank"`` (each rank its own domain) always exists and need not be given.
    """

    slots_per_rank: tuple[int, ...]
    domains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.slots_per_rank:
            raise InvalidInputError("a topology needs at least one rank, got none")
        for rank, slots in enumerate(self.slots_per_rank):
            if slots < 0:
                raise InvalidInputError(f"rank {rank} has {slots} slots; give 0 or more")
        for level, labels in self.domains.items():
            if len(labels) != len(self.slots_per_rank):
                raise InvalidInputError(
                    f"domain level {level!r} labels {len(labels)} ranks, the topology has {len(self.slots_per_rank)}; label each rank"
                )

    @classmethod
    def uniform(cls, ep_size: int, num_slots: int, nodes: Sequence[str] | None = None) -> Topology:
        """``num_slots`` physical slots per layer spread evenly over ``ep_size`` ranks (SGLang's layout: slot s on rank s // (P // R))."""
        if ep_size < 1:
            raise InvalidInputError(f"ep_size is {ep_size}; give at least 1 rank")
        if num_slots % ep_size:
            low = num_slots - num_slots % ep_size
            raise InvalidInputError(
                f"{num_slots} physical slots do not divide over {ep_size} ranks; use {low} or {low + ep_size} "
                f"(change the number of redundant experts)"
            )
        return cls((num_slots // ep_size,) * ep_size, {} if nodes is None else {"node": tuple(nodes)})

    @property
    def ep_size(self) -> int:
        """Number of ranks, dead ones included."""
        return len(self.slots_per_rank)

    @cached_property
    def first_slot(self) -> NDArray[np.int64]:
        """int64 [ep_size + 1]: the first slot of each rank, and the number of slots at the end."""
        return np.concatenate(([0], np.cumsum(self.slots_per_rank))).astype(np.int64)

    @property
    def num_slots(self) -> int:
        """P: physical slots per layer over all ranks, dead ones included."""
        return int(self.first_slot[-1])

    @cached_property
    def rank_of_slot(self) -> NDArray[np.int64]:
        """int64 [P]: the rank that owns each slot."""
        return np.repeat(np.arange(self.ep_size, dtype=np.int64), self.slots_per_rank)

    def slots_of(self, rank: int) -> range:
        """The slot ids of one rank."""
        return range(int(self.first_slot[rank]), int(self.first_slot[rank + 1]))

    def labels(self, level: str) -> tuple[str, ...]:
        """The domain label of each rank at ``level``; ``"rank"`` is always known."""
        if level == "rank":
            return tuple(str(r) for r in range(self.ep_size))
        if level not in self.domains:
            known = ", ".join(["rank", *self.domains])
            raise InvalidInputError(f"unknown failure domain level {level!r}; the topology has: {known}")
        return self.domains[level]

    def domain_ids(self, level: str) -> NDArray[np.int64]:
        """int64 [ep_size]: labels of ``level`` numbered 0.. in order of first appearance."""
        seen: dict[str, int] = {}
        return np.array([seen.setdefault(label, len(seen)) for label in self.labels(level)], dtype=np.int64)

    def live_slot_mask(self, active_ranks: Any) -> NDArray[np.bool_]:
        """bool [P]: slots whose rank is active. ``active_ranks`` int [ep_size], 1 = alive."""
        active = np.asarray(active_ranks)
        if active.shape != (self.ep_size,):
            raise InvalidInputError(f"active_ranks has shape {active.shape}; expected ({self.ep_size},)")
        mask: NDArray[np.bool_] = (active != 0)[self.rank_of_slot]
        return mask
