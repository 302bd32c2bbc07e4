"""Lowering the peak step by step. Mirrored by native/refine.h."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from elastic_ep.core.eplb.reference.layer import FREE, Layer

NEAREST = 8
"""least loaded ranks whose steps are compared"""
FARTHEST = 64
"""least loaded ranks that are gone through, one by one, when those give nothing"""


class Kind(Enum):
    """What a step does."""

    SWAP = "exchange slots a and b"
    REPLICATE = "give slot b to another replica of slot a's expert"
    REDEDICATE = "give slot a to a replica of expert x"
    RECOVER = "cover a's lost expert in b instead, and give a back to x, what it held"


@dataclass
class Trace:
    """After each step: moves so far, and the peak."""

    moves: list[int] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)


class Refiner:
    """Finds the best step for the peak rank.

    Attributes:
        top, peak: load of the peak rank, and which it is.
        score: how much the best step relieves it, as far as the target, per slot that changes; after: the highest load it leaves.
    """

    def __init__(self, layer: Layer, target: float, floor: float, left: int, counted: bool) -> None:
        self.layer, self.target, self.floor, self.left, self.counted = layer, target, floor, left, counted
        self.peak = layer.peak_rank()
        self.top = layer.load[self.peak]
        self.score, self.after = 0.0, float("inf")
        self.step: tuple[Kind, int, int, int] | None = None
        self.cost = 0

    def offer(self, kind: Kind, a: int, b: int, x: int, cost: int, after: float) -> None:
        """Keep a step if it is better: by score, then by the load it leaves. One that changes no slot more counts as half a slot."""
        if self.top - after <= self.floor or cost > self.left:
            return
        reach = after if after > self.target else self.target
        score = (self.top - reach) / (cost if cost > 0 else 0.5)
        if score > self.score or (score == self.score and after < self.after):
            self.score, self.after, self.step, self.cost = score, after, (kind, a, b, x), cost

    def change(self, slot: int, expert: int) -> int:
        """How many slots more differ from the reference once a slot holds ``expert``."""
        reference = self.layer.reference[slot]
        return (expert != reference) - (self.layer.place[slot] != reference)

    def find(self) -> None:
        """Go through the steps, cheapest kinds first."""
        layer = self.layer
        if self.counted:
            self.offer_recovering()
        self.offer_rededication()
        enough = self.top - self.target
        lightest = sorted((r for r in layer.live if r != self.peak), key=layer.load.__getitem__)[:FARTHEST]
        for rank in lightest[:NEAREST]:
            if self.score >= enough:
                break
            self.offer_pairs(rank)
        for rank in lightest[NEAREST:]:
            if self.step is not None:
                break
            self.offer_pairs(rank)

    def offer_pairs(self, rank: int) -> None:
        """Steps that take load from the peak rank to another."""
        layer, peak, top, low = self.layer, self.peak, self.top, self.layer.load[rank]
        place, hosts, share = layer.place, layer.hosts, layer.share
        mine = []
        for a in layer.slots[peak]:
            if place[a] != FREE and rank not in hosts[place[a]]:
                mine.append((a, place[a], layer.need <= 1 or layer.may_shift(place[a], peak, rank)))
        for b in layer.slots[rank]:
            other = place[b]
            if other == FREE:
                continue
            blocked = peak in hosts[other]
            drop = layer.may_drop(other, rank)
            if not blocked and layer.need > 1:
                blocked = not layer.may_shift(other, rank, peak)
            if blocked and not drop:
                continue
            without = layer.peak_without(b) if drop else 0.0
            drop = drop and top - without > self.floor
            theirs = share[other]
            for a, expert, may_go in mine:
                load = share[expert]
                if drop:
                    less = layer.more[expert]
                    after = max(top - load + less, low - theirs + less, without)
                    self.offer(Kind.REPLICATE, a, b, expert, self.change(b, expert) if self.counted else 1, after)
                if not blocked and theirs < load and may_go:
                    after = max(top - load + theirs, low - theirs + load)
                    cost = self.change(a, other) + self.change(b, expert) if self.counted else 1
                    self.offer(Kind.SWAP, a, b, other, cost, after)

    def offer_rededication(self) -> None:
        """Steps that give a slot of the peak rank to a replica of another expert."""
        layer, peak = self.layer, self.peak
        for a in layer.slots[peak]:
            mine = layer.place[a]
            if mine == FREE or not layer.may_drop(mine, peak):
                continue
            without, base = layer.peak_without(a), self.top - layer.share[mine]
            if self.top - without <= self.floor:
                continue
            for expert in range(layer.num_experts):
                if peak not in layer.hosts[expert]:
                    after = base + layer.more[expert]
                    cost = self.change(a, expert) if self.counted else 1
                    self.offer(Kind.REDEDICATE, a, -1, expert, cost, without if without > after else after)

    def offer_recovering(self) -> None:
        """Steps that cover a lost expert elsewhere than on the peak rank, and give its slot back to what it held."""
        layer, peak = self.layer, self.peak
        for a in layer.slots[peak]:
            expert, before = layer.place[a], layer.origin[a]
            if not layer.covers[a] or expert != layer.reference[a] or before == FREE or peak in layer.hosts[before]:
                continue
            mine = self.top - layer.share[expert] + layer.more[before]
            if self.top - mine <= self.floor:
                continue
            for rank in layer.live:
                if rank in layer.hosts[expert] or layer.covered[rank] >= layer.cover_share or not layer.may_shift(expert, peak, rank):
                    continue
                for b in layer.slots[rank]:
                    victim = layer.place[b]
                    if victim in (FREE, before) or layer.covers[b] or victim != layer.origin[b] or layer.spare[victim] <= 1:
                        continue
                    if layer.may_drop(victim, rank):
                        after = layer.load[rank] - layer.share[victim] + layer.share[expert]
                        self.offer(Kind.RECOVER, a, b, before, 0, max(after, mine, layer.peak_without(b)))

    def apply(self) -> None:
        """Do the step that was found."""
        assert self.step is not None
        kind, a, b, x = self.step
        layer = self.layer
        mine = layer.place[a]
        if kind is Kind.SWAP:
            layer.exchange(a, b)
        elif kind is Kind.REPLICATE:
            layer.clear(b)
            layer.fill(b, mine)
        elif kind is Kind.REDEDICATE:
            layer.clear(a)
            layer.fill(a, x)
        else:
            victim = layer.place[b]
            layer.clear(b)
            layer.clear(a)
            layer.fill(a, x)
            layer.fill(b, mine)
            layer.covers[a], layer.covers[b] = False, True
            layer.reference[a], layer.reference[b] = layer.origin[a], mine
            layer.spare[x] += 1
            layer.spare[victim] -= 1
            layer.covered[layer.rank_of_slot[a]] -= 1
            layer.covered[layer.rank_of_slot[b]] += 1


def refine(layer: Layer, target: float, budget: int, floor: float, counted: bool, trace: Trace | None = None) -> int:
    """Lower the peak until it is at most ``target``, by steps that gain more than ``floor``.

    ``counted`` steps are priced by the slots that they change and may re-cover lost experts; others all cost one. Returns the moves.
    """
    moves = 0
    for _ in range(16 * len(layer.live) + 64):
        if layer.peak() <= target:
            break
        search = Refiner(layer, target, floor, budget - moves, counted)
        search.find()
        if search.step is None:
            break
        search.apply()
        moves += search.cost
        if trace is not None:
            trace.moves.append(moves)
            trace.peak.append(layer.peak())
    return moves
