"""One layer's slots while they are being filled. Mirrored by native/layer.h."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FREE = -1
UNLIMITED = 1 << 40
NO_LOAD_IS_MORE = 1e300
"""share of an expert that has no replica left"""


@dataclass(frozen=True)
class World:
    """What all layers share.

    Attributes:
        rank_of_slot: per slot, ascending.
        alive: per rank.
        domain: failure domain of each rank.
        partners: per rank, the ranks that should hold the other replicas of its experts.
        need: replicas on distinct domains that each expert should have.
        covered: lost experts that each rank was given so far, in all layers.
    """

    rank_of_slot: Sequence[int]
    alive: Sequence[bool]
    domain: Sequence[int]
    partners: Sequence[Sequence[int]]
    need: int
    covered: list[int]


class Layer:
    """The state of one layer.

    Attributes:
        place: expert of each slot; hosts: per expert, the ranks that hold it and in which slot.
        load: of each rank; share, more, less: load of one replica of each expert now, with one replica more, with one fewer.
        origin, reference: what slots held; what they hold once lost experts are covered.
        covers: slots that cover a lost expert; spare: per expert, slots of origin that cover nothing.
        covered: as in `World`; cover_share: how many of them a rank may be given.
    """

    def __init__(self, world: World, weight: Sequence[float]) -> None:
        self.weight = weight
        self.num_experts, self.num_slots, self.num_ranks = len(weight), len(world.rank_of_slot), len(world.alive)
        self.rank_of_slot, self.domain, self.partners, self.need = world.rank_of_slot, world.domain, world.partners, world.need
        self.covered = world.covered
        self.slots: list[list[int]] = [[] for _ in world.alive]
        for slot, rank in enumerate(world.rank_of_slot):
            if world.alive[rank]:
                self.slots[rank].append(slot)
        self.live = [r for r, slots in enumerate(self.slots) if slots]
        self.live_slots = sum(len(slots) for slots in self.slots)
        room: dict[int, int] = {}
        for rank in self.live:
            room[self.domain[rank]] = room.get(self.domain[rank], 0) + len(self.slots[rank])
        self.is_feasible = sum(min(n, self.num_experts) for n in room.values()) >= self.need * self.num_experts
        self.origin = [FREE] * self.num_slots
        self.reference = [FREE] * self.num_slots
        self.covers = [False] * self.num_slots
        self.spare = [0] * self.num_experts
        self.cover_share = 0
        self.reset()

    # ---- state

    def reset(self) -> None:
        """Nothing placed."""
        self.place = [FREE] * self.num_slots
        self.hosts: list[dict[int, int]] = [{} for _ in range(self.num_experts)]
        self.load = [0.0] * self.num_ranks
        self.share = [0.0] * self.num_experts
        self.more = [0.0] * self.num_experts
        self.less = [0.0] * self.num_experts

    def set_shares(self, expert: int) -> None:
        weight, count = self.weight[expert], len(self.hosts[expert])
        self.share[expert] = weight / count if count > 0 else 0.0
        self.more[expert] = weight / (count + 1)
        self.less[expert] = weight / (count - 1) if count > 1 else NO_LOAD_IS_MORE

    def attach(self, slot: int, expert: int) -> None:
        """A slot gets an expert; shares and loads are left to the caller."""
        self.place[slot] = expert
        self.hosts[expert][self.rank_of_slot[slot]] = slot

    def settle(self) -> None:
        """Shares and loads of what was attached; loads are summed slot by slot."""
        for expert in range(self.num_experts):
            self.set_shares(expert)
        for rank in self.live:
            total = 0.0
            for slot in self.slots[rank]:
                if self.place[slot] != FREE:
                    total += self.share[self.place[slot]]
            self.load[rank] = total

    def take_held(self, held: Sequence[int]) -> None:
        """Start from what slots hold. A second replica on one rank counts as nothing."""
        self.reset()
        for rank in self.live:
            for slot in self.slots[rank]:
                if held[slot] != FREE and rank not in self.hosts[held[slot]]:
                    self.attach(slot, held[slot])
        self.settle()
        self.covers = [False] * self.num_slots
        self.origin = list(self.place)
        self.reference = list(self.place)
        self.spare = [len(hosts) for hosts in self.hosts]

    def take_row(self, row: Sequence[int]) -> None:
        """Start from a row that was saved."""
        self.reset()
        for slot, expert in enumerate(row):
            if expert != FREE:
                self.attach(slot, expert)
        self.settle()

    # ---- changes

    def fill(self, slot: int, expert: int) -> None:
        """Put a replica into an empty slot; the other hosts give up their part."""
        before, after, load = self.share[expert], self.more[expert], self.load
        for rank in self.hosts[expert]:
            load[rank] += after - before
        self.attach(slot, expert)
        self.set_shares(expert)
        load[self.rank_of_slot[slot]] += after

    def clear(self, slot: int) -> None:
        """Take a replica out of its slot; the other hosts take over its part."""
        expert, rank, load = self.place[slot], self.rank_of_slot[slot], self.load
        before, after = self.share[expert], self.less[expert]
        del self.hosts[expert][rank]
        self.place[slot] = FREE
        self.set_shares(expert)
        load[rank] -= before
        for other in self.hosts[expert]:
            load[other] += after - before

    def exchange(self, a: int, b: int) -> None:
        """Exchange the experts of two slots."""
        first, second = self.place[a], self.place[b]
        self.clear(b)
        self.clear(a)
        self.fill(a, second)
        self.fill(b, first)

    # ---- questions

    def peak_rank(self) -> int:
        """The rank with the highest load, the lowest among equals."""
        return max(self.live, key=self.load.__getitem__)

    def peak(self) -> float:
        return self.load[self.peak_rank()]

    def num_domains(self, expert: int, without: int = -1, plus: int = -1) -> int:
        """Distinct failure domains of an expert's replicas, without one rank, with another."""
        seen = {self.domain[r] for r in self.hosts[expert] if r != without}
        if plus >= 0:
            seen.add(self.domain[plus])
        return len(seen)

    def count_short(self) -> int:
        """Experts with fewer distinct domains than they need."""
        return sum(self.num_domains(e) < self.need for e in range(self.num_experts)) if self.need > 1 else 0

    def may_drop(self, expert: int, rank: int) -> bool:
        """Whether a replica may be dropped without breaking what its expert has of its due."""
        if len(self.hosts[expert]) <= max(1, self.need):
            return False
        return self.need <= 1 or self.num_domains(expert, rank) >= min(self.need, self.num_domains(expert))

    def may_shift(self, expert: int, rank: int, to: int) -> bool:
        """Whether a replica may go from one rank to another: it keeps its distinct domains, and, where it has no replica to spare,
        partners."""
        if self.need <= 1:
            return True
        if self.num_domains(expert, rank, to) < self.num_domains(expert):
            return False
        if len(self.hosts[expert]) > self.need:
            return True
        others = (r for r in self.hosts[expert] if r != rank)
        return all(r not in self.partners[rank] or r in self.partners[to] for r in others)

    def peak_without(self, slot: int) -> float:
        """The highest load among the other hosts of a slot's expert once that replica is gone; 0 if there is none."""
        expert, load, top = self.place[slot], self.load, 0.0
        grown = self.less[expert] - self.share[expert]
        for rank, other in self.hosts[expert].items():
            if other != slot and load[rank] + grown > top:
                top = load[rank] + grown
        return top


def descending(key: Sequence[float]) -> list[int]:
    """Indices by descending key, equal ones ascending."""
    return sorted(range(len(key)), key=lambda i: (-key[i], i))
