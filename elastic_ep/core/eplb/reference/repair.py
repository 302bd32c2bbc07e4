"""What a row lacks: lost experts, distinct failure domains, partners, and use for empty slots. Mirrored by native/repair.h."""

from __future__ import annotations

from typing import NamedTuple

from elastic_ep.core.eplb.reference.layer import FREE, Layer, descending

MARGIN_PART = 8
"""A rank may be given a share of the lost experts that is larger by this part than an equal one: room to level the load."""


def cover(layer: Layer) -> int:
    """Give every expert that no slot holds one, heaviest first, where it raises the peak least, and among equals on the rank that was
    given fewest. Each rank reads its own, and the last to be done is waited for: one that was given its share of this and earlier layers
    comes after the others. Empty slots come before others, and those of experts that have a replica to spare before the rest. Returns
    the moves made."""
    lost = [e for e in descending(layer.weight) if not layer.hosts[e]]
    given = sum(layer.covered[rank] for rank in layer.live) + len(lost)
    layer.cover_share = -(-(given + given // MARGIN_PART) // len(layer.live))
    for expert in lost:
        best: tuple[int, bool, float, int, int] | None = None
        for rank in layer.live:
            covered = layer.covered[rank]
            for slot in layer.slots[rank]:
                victim, grade, peak = layer.place[slot], 0, layer.load[rank] + layer.weight[expert]
                if victim != FREE:
                    if len(layer.hosts[victim]) == 1 or layer.spare[victim] <= 1 or layer.covers[slot]:
                        continue
                    grade = 1 if layer.may_drop(victim, rank) else 2
                    peak = max(peak - layer.share[victim], layer.peak_without(slot))
                option = (grade, covered >= layer.cover_share, peak, covered, slot)
                if best is None or option[:4] < best[:4]:
                    best = option
        assert best is not None, "a lost expert has nowhere to go, which cannot be with a slot for every expert"
        slot = best[4]
        layer.covered[layer.rank_of_slot[slot]] += 1
        if layer.place[slot] != FREE:
            layer.spare[layer.place[slot]] -= 1
            layer.clear(slot)
        layer.fill(slot, expert)
        layer.covers[slot] = True
        layer.reference[slot] = expert
    for rank in layer.live:
        while layer.covered[rank] > layer.cover_share and _pass_on(layer, rank):
            pass
    return len(lost)


def _pass_on(layer: Layer, rank: int) -> bool:
    """Cover one of a rank's lost experts where the other replica of what gave way to it is, which comes back instead: on the rank that was
    given fewest, two fewer at least, then where it raises the peak least. False where that cannot be done."""
    best: tuple[int, float, int, int] | None = None
    for slot in layer.slots[rank]:
        back = layer.origin[slot]
        if not layer.covers[slot] or back == FREE or rank in layer.hosts[back]:
            continue
        step = layer.share[layer.place[slot]] - layer.share[back]
        for other, there in layer.hosts[back].items():
            if layer.covered[other] + 2 > layer.covered[rank] or layer.covers[there] or not layer.may_shift(back, other, rank):
                continue
            option = (layer.covered[other], max(layer.load[rank] - step, layer.load[other] + step), slot, there)
            if best is None or option < best:
                best = option
    if best is None:
        return False
    slot, there = best[2:]
    layer.exchange(slot, there)
    layer.covers[slot], layer.covers[there] = False, True
    layer.reference[slot], layer.reference[there] = layer.origin[slot], layer.place[there]
    layer.covered[rank] -= 1
    layer.covered[layer.rank_of_slot[there]] += 1
    return True


class Option(NamedTuple):
    """Where to bring an expert that needs a new failure domain, best first: whether it is off its partners, the highest load that it
    leaves, the slot, and the slot given in exchange (-1: none)."""

    off: int
    peak: float
    slot: int
    back: int


def find_added(layer: Layer, expert: int) -> Option | None:
    """One more replica: into an empty slot or one whose expert can spare it. One move."""
    best: Option | None = None
    gain, hosts = layer.more[expert], layer.hosts[expert]
    taken = {layer.domain[r] for r in hosts}
    for rank in layer.live:
        if layer.domain[rank] in taken:
            continue
        off = int(any(r not in layer.partners[rank] for r in hosts))
        if best is not None and off > best.off:
            continue
        for slot in layer.slots[rank]:
            victim, peak = layer.place[slot], layer.load[rank] + gain
            if victim != FREE:
                if layer.covers[slot] or not layer.may_drop(victim, rank):
                    continue
                peak = max(peak - layer.share[victim], layer.peak_without(slot))
            option = Option(off, peak, slot, -1)
            if best is None or option < best:
                best = option
    return best


def find_exchange(layer: Layer, expert: int, for_partners: bool) -> Option | None:
    """Exchange a replica that shares its domain with another, or its place with no partner, for a slot elsewhere. Two moves."""
    best: Option | None = None
    has, hosts = layer.num_domains(expert), layer.hosts[expert]
    for home, back in hosts.items():
        if layer.covers[back] or (not for_partners and layer.num_domains(expert, home) != has):
            continue
        others = [r for r in hosts if r != home]
        taken = {layer.domain[r] for r in others}
        for rank in layer.live:
            if rank in hosts or layer.domain[rank] in taken:
                continue
            off = int(any(r not in layer.partners[rank] for r in others))
            if (best is not None and off > best.off) or (for_partners and off):
                continue
            for slot in layer.slots[rank]:
                other = layer.place[slot]
                if other == FREE or layer.covers[slot] or home in layer.hosts[other] or not layer.may_shift(other, rank, home):
                    continue
                step = layer.share[expert] - layer.share[other]
                option = Option(off, max(layer.load[rank] + step, layer.load[home] - step), slot, back)
                if best is None or option < best:
                    best = option
    return best


def spread(layer: Layer, budget: int) -> int:
    """Bring experts to ``need`` distinct failure domains, level by level, heaviest first. Returns the moves made."""
    moves = 0
    for want in range(2, layer.need + 1):
        short = [e for e in descending(layer.weight) if layer.num_domains(e) < want]
        for expert in short:
            if moves >= budget:
                break
            best = find_added(layer, expert)
            if best is not None:
                if layer.place[best.slot] != FREE:
                    layer.clear(best.slot)
                layer.fill(best.slot, expert)
                moves += 1
                continue
            best = find_exchange(layer, expert, False) if moves + 2 <= budget else None
            if best is not None:
                layer.exchange(best.slot, best.back)
                moves += 2
    return moves


def pair_up(layer: Layer) -> None:
    """Exchange replicas until experts live on partners where that can be had: few distinct sets of ranks then lose anything."""
    for expert in range(layer.num_experts):
        hosts = layer.hosts[expert]
        if len(hosts) != 2 or len(hosts) > layer.need:
            continue
        first, second = hosts
        if second in layer.partners[first]:
            continue
        best = find_exchange(layer, expert, True)
        if best is not None:
            layer.exchange(best.slot, best.back)


def fill_free(layer: Layer, budget: int) -> int:
    """Spend empty slots, those of the least loaded rank first, on replicas that relieve the peak rank most; where none can, of the expert
    whose replicas carry most (the one with fewest among equals). Returns the moves made."""
    moves = 0
    free = {r: [s for s in layer.slots[r] if layer.place[s] == FREE] for r in layer.live}
    free = {r: slots for r, slots in free.items() if slots}
    while free and moves < budget:
        rank = min(free, key=lambda r: (layer.load[r], r))
        expert = _relief(layer, rank)
        if expert < 0:
            others = (e for e in range(layer.num_experts) if rank not in layer.hosts[e])
            expert = min(others, key=lambda e: (-layer.share[e], len(layer.hosts[e]), e), default=-1)
        if expert < 0:
            del free[rank]
            continue
        layer.fill(free[rank].pop(0), expert)
        moves += 1
        if not free[rank]:
            del free[rank]
    return moves


def _relief(layer: Layer, rank: int) -> int:
    """The expert of the peak rank whose further replica on ``rank`` relieves it most; -1 if none fits."""
    peak, best, expert = layer.peak_rank(), 0.0, -1
    for slot in layer.slots[peak]:
        mine = layer.place[slot]
        if mine == FREE or rank in layer.hosts[mine] or layer.load[rank] + layer.more[mine] > layer.load[peak]:
            continue
        relief = layer.share[mine] - layer.more[mine]
        if relief > best:
            best, expert = relief, mine
    return expert
