"""A row from nothing: how many replicas, and where. Mirrored by native/pack.h."""

from __future__ import annotations

from heapq import heapify, heappop, heapreplace

from elastic_ep.core.eplb.reference.layer import Layer, descending


class Counts:
    """Replicas of each expert (`counts`) and the load of one (`key`)."""

    def __init__(self, layer: Layer, need: int) -> None:
        """First ``need`` of each as far as slots reach, heaviest first, then one at a time to the expert whose replicas carry most (the
        one with fewest among equals)."""
        weight, most = layer.weight, len(layer.live)
        spare = layer.live_slots - layer.num_experts
        self.counts = [1] * layer.num_experts
        for _ in range(1, min(need, most)):
            for expert in descending(weight)[: max(0, spare)]:
                self.counts[expert] += 1
                spare -= 1
        self.key = [w / c for w, c in zip(weight, self.counts, strict=True)]
        heap = [(-k, c, e) for e, (k, c) in enumerate(zip(self.key, self.counts, strict=True)) if c < most]
        heapify(heap)
        while spare > 0 and heap:
            expert = heap[0][2]
            self.counts[expert] += 1
            spare -= 1
            self.key[expert] = weight[expert] / self.counts[expert]
            if self.counts[expert] >= most:
                heappop(heap)
            else:
                heapreplace(heap, (-self.key[expert], self.counts[expert], expert))

    def bound(self, layer: Layer) -> float:
        """No placement with these counts can have a lower peak: the mean rank load, or the heaviest replica."""
        total = 0.0
        for weight in layer.weight:
            total += weight
        total /= len(layer.live)
        top = max(self.key)
        return total if total > top else top


class Packer:
    """Fills an empty row, rank by least load."""

    def __init__(self, layer: Layer, counts: Counts) -> None:
        self.layer, self.counts = layer, counts
        self.room = {r: list(reversed(layer.slots[r])) for r in layer.live}
        self.bond: dict[tuple[int, int], float] = {}

    def put(self, expert: int, rank: int) -> None:
        self.layer.attach(self.room[rank].pop(), expert)
        self.layer.load[rank] += self.counts.key[expert]

    def open_ranks(self, expert: int, taken: set[int]) -> list[int]:
        """Ranks with room that may take a replica in a domain that is not taken."""
        layer = self.layer
        return [r for r in layer.live if self.room[r] and r not in layer.hosts[expert] and layer.domain[r] not in taken]

    def pick_lightest(self, expert: int, taken: set[int]) -> int:
        """The least loaded rank that is open and in no taken domain; -1 if there is none."""
        return min(self.open_ranks(expert, taken), key=lambda r: (self.layer.load[r], r), default=-1)

    def pick_partner(self, home: int, expert: int, taken: set[int]) -> int:
        """The same among partners of rank ``home``, counting what falls to them when ``home``'s domain is lost; any rank if none is
        open."""
        partners = [r for r in self.open_ranks(expert, taken) if r in self.layer.partners[home]]
        if not partners:
            return self.pick_lightest(expert, taken)
        return min(partners, key=lambda r: (self._pairing(home, r), r))

    def _pairing(self, home: int, rank: int) -> float:
        there, here = self._bond_with(rank, self.layer.domain[home]), self._bond_with(home, self.layer.domain[rank])
        return self.layer.load[rank] + (there if there > here else here) + self.bond.get((home, rank), 0.0)

    def _bond_with(self, rank: int, domain: int) -> float:
        """Load that a rank shares with partners in a domain and with nobody else: what falls to it alone when that domain is lost."""
        total = 0.0
        for partner in self.layer.partners[rank]:
            if self.layer.domain[partner] == domain:
                total += self.bond.get((rank, partner), 0.0)
        return total

    def add_bond(self, a: int, b: int, weight: float) -> None:
        for pair in ((a, b), (b, a)):
            self.bond[pair] = self.bond.get(pair, 0.0) + weight


def pack(layer: Layer, counts: Counts) -> None:
    """Fill an empty row: heaviest first, each replica to the least loaded rank that may take it. Where distinct domains are needed, the
    second and later of the first ``need`` go to partners of the first, and all to new domains while there are any."""
    packer = Packer(layer, counts)
    for expert in descending(counts.key):
        home, taken, want = -1, set[int](), counts.counts[expert]
        for index in range(want):
            rank = -1
            if index > 0 and layer.need > 1:
                pick_partner = index < layer.need
                rank = packer.pick_partner(home, expert, taken) if pick_partner else packer.pick_lightest(expert, taken)
            if rank < 0:
                rank = packer.pick_lightest(expert, set())
            if rank < 0:
                break
            packer.put(expert, rank)
            if home < 0:
                home = rank
            elif want == 2 and layer.need == 2:
                packer.add_bond(home, rank, layer.weight[expert])
            taken.add(layer.domain[rank])
    layer.settle()


def pack_by_domains(layer: Layer, counts: Counts) -> None:
    """The same, with the first ``need`` replicas of all experts placed before any other, each in the domains with most room left. That
    finds distinct domains for all whenever there are any (Gale and Ryser), where `pack` may paint itself into a corner."""
    packer = Packer(layer, counts)
    room: dict[int, int] = {}
    for rank in layer.live:
        room[layer.domain[rank]] = room.get(layer.domain[rank], 0) + len(layer.slots[rank])
    order = descending(counts.key)
    for expert in order:
        taken: set[int] = set()
        for _ in range(min(counts.counts[expert], layer.need)):
            ranks = packer.open_ranks(expert, taken)
            rank = min(ranks, key=lambda r: (-room[layer.domain[r]], layer.load[r], r), default=-1)
            if rank < 0:
                break
            packer.put(expert, rank)
            taken.add(layer.domain[rank])
            room[layer.domain[rank]] -= 1
    for expert in order:
        for _ in range(counts.counts[expert] - layer.need):
            rank = packer.pick_lightest(expert, set())
            if rank < 0:
                break
            packer.put(expert, rank)
    layer.settle()
