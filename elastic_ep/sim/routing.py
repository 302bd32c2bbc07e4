"""An epoch's tables as ranks go by them, in the smallest form: which rank and slot a position goes to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from elastic_ep.brain.messages import Install


class Place(NamedTuple):
    """Where a position's expert is computed. slot is -1 where the rank reads it in when needed."""

    rank: int
    slot: int


class Routing:
    """Tables of one epoch.

    Attributes:
        ranks: the members.
        own: rank -> its (layer, slot) -> expert.
    """

    def __init__(self, order: Install) -> None:
        self.epoch = order.epoch
        self.num_layers, self.num_experts = order.num_layers, order.num_experts
        self.ranks = tuple(sorted(order.peers))
        rank_of_slot = [rank for rank, slots in enumerate(order.slots_per_rank) for _ in range(slots)]
        rows = np.frombuffer(order.physical_to_logical_map, "<i4").reshape(order.num_layers, -1).tolist()
        self.own: dict[int, dict[tuple[int, int], int]] = {rank: {} for rank in range(len(order.slots_per_rank))}
        self.places: dict[tuple[int, int], list[Place]] = {}
        for layer, row in enumerate(rows):
            for slot, expert in enumerate(row):
                if expert >= 0:
                    rank = rank_of_slot[slot]
                    self.own[rank][layer, slot] = expert
                    self.places.setdefault((layer, expert), []).append(Place(rank, slot))
        for layer, expert, rank in order.streamed:
            self.places.setdefault((layer, expert), []).append(Place(rank, -1))
        self.key = (order.physical_to_logical_map, order.active_ranks, order.streamed)

    def place(self, layer: int, expert: int, state: int) -> Place | None:
        """Where this position goes; None where no member has the expert."""
        places = self.places.get((layer, expert))
        return places[(state >> 3) % len(places)] if places else None
