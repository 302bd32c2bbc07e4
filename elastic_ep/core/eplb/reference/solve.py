"""One layer from its load to its row. Mirrored by native/solve.h."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic_ep.core.eplb.reference.layer import FREE, UNLIMITED, Layer, World
from elastic_ep.core.eplb.reference.pack import Counts, pack, pack_by_domains
from elastic_ep.core.eplb.reference.quotas import Pour
from elastic_ep.core.eplb.reference.refine import Trace, refine
from elastic_ep.core.eplb.reference.repair import cover, fill_free, pair_up, spread

REACH = 0.8
"""a layer beyond the tolerance is brought within this part of it, so that the next drift finds room"""
FRESH_FLOOR, HELD_FLOOR = 1e-4, 1e-3
"""least gain of a step, as a part of the goal: from nothing, and where slots hold something"""
SHAKE_SLOTS, SHAKE_WORK = 128, 1024
"""rows of more slots are not shaken; slots times shakes"""
SPREADS, PUSHES, PUSH_TRIES = 4, 8, 8
CHECK_ROUNDS, CHECK_STILL = 16, 3e-4
"""rounds of pouring that tell whether quotas level a row, or until no part of an expert changes by more than this part of the goal"""


@dataclass(frozen=True)
class Limits:
    """How far to go.

    Attributes:
        tolerance: rows within this part of the goal are left alone.
        fresh_tolerance: rows from nothing are refined to this part of the goal.
        fresh_gain: a row from nothing replaces a repaired one if its peak is lower by this part of the goal.
        quota_tolerance: rows that quotas level to within this part of the goal are left alone; negative: do not ask.
        moves: at most for distinct domains, empty slots and balance; None: no limit.
    """

    tolerance: float
    fresh_tolerance: float
    fresh_gain: float
    quota_tolerance: float
    moves: tuple[int, int, int] | None


@dataclass
class Outcome:
    """What became of a layer.

    Attributes:
        row, reference, covers: as in `Layer`.
        bound, goal: no row has a lower peak; none that gives every expert the replicas it needs.
        spread, fill, refine: moves by phase; fresh: whether a row from nothing was taken.
    """

    row: list[int]
    reference: list[int]
    covers: list[bool]
    peak: float
    bound: float
    goal: float
    spread: int
    fill: int
    refine: int
    fresh: bool
    trace: Trace


class Saved:
    """A copy of a layer's state."""

    def __init__(self, layer: Layer) -> None:
        self.place, self.reference = list(layer.place), list(layer.reference)
        self.spare, self.covers, self.covered = list(layer.spare), list(layer.covers), list(layer.covered)

    def restore(self, layer: Layer) -> None:
        layer.take_row(self.place)
        layer.reference, layer.spare, layer.covers = list(self.reference), list(self.spare), list(self.covers)
        layer.covered[:] = self.covered


class Draws:
    """A fixed sequence of numbers (Knuth's 64-bit linear congruence, upper bits)."""

    def __init__(self) -> None:
        self.state = 1

    def below(self, n: int) -> int:
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (self.state >> 33) % n


# ---- from nothing


def may_exchange(layer: Layer, a: int, b: int) -> bool:
    first, second = layer.rank_of_slot[a], layer.rank_of_slot[b]
    mine, theirs = layer.place[a], layer.place[b]
    if first == second or mine == FREE or theirs == FREE or second in layer.hosts[mine] or first in layer.hosts[theirs]:
        return False
    return layer.may_shift(mine, first, second) and layer.may_shift(theirs, second, first)


def shake(layer: Layer, target: float, floor: float) -> None:
    """Small rows that are stuck above the target: disturb, refine, and keep what is better."""
    count = layer.live_slots
    if count > SHAKE_SLOTS or len(layer.live) < 2:
        return
    slots = [s for rank in layer.live for s in layer.slots[rank]]
    draws, best, row = Draws(), layer.peak(), list(layer.place)
    for _ in range(SHAKE_WORK // count):
        if best <= target:
            break
        for _ in range(2):
            a, b, expert = slots[draws.below(count)], slots[draws.below(count)], draws.below(layer.num_experts)
            rank = layer.rank_of_slot[a]
            if may_exchange(layer, a, b):
                layer.exchange(a, b)
            elif layer.place[a] != FREE and rank not in layer.hosts[expert] and layer.may_drop(layer.place[a], rank):
                layer.clear(a)
                layer.fill(a, expert)
        refine(layer, target, UNLIMITED, floor, False)
        if layer.peak() < best - floor:
            best, row = layer.peak(), list(layer.place)
        else:
            layer.take_row(row)
    layer.take_row(row)


def solve_fresh(layer: Layer, goal: float, limits: Limits) -> None:
    target, floor = goal * (1.0 + limits.fresh_tolerance), goal * FRESH_FLOOR
    counts = Counts(layer, layer.need)
    layer.reset()
    pack(layer, counts)
    if layer.need > 1:
        spread(layer, UNLIMITED)
        if layer.is_feasible and layer.count_short():
            layer.reset()
            pack_by_domains(layer, counts)
        pair_up(layer)
    fill_free(layer, UNLIMITED)
    refine(layer, target, UNLIMITED, floor, False)
    if layer.peak() > target:
        shake(layer, target, floor)
    for _ in range(SPREADS):  # refining may have opened a way to a domain that was closed
        if layer.need <= 1 or not spread(layer, UNLIMITED):
            break
        refine(layer, target, UNLIMITED, floor, False)


# ---- from what slots hold


def count_changed(layer: Layer) -> int:
    return sum(a != b for a, b in zip(layer.place, layer.reference, strict=True))


def next_best_slot(layer: Layer, expert: int, after: tuple[float, int]) -> tuple[float, int] | None:
    """(peak, slot) of the slot that can take another replica and leaves the lowest peak, but later in that order than ``after``."""
    best: tuple[float, int] | None = None
    for rank in layer.live:
        if rank in layer.hosts[expert]:
            continue
        for slot in layer.slots[rank]:
            victim = layer.place[slot]
            if victim == FREE or layer.covers[slot] or not layer.may_drop(victim, rank):
                continue
            peak = max(layer.load[rank] - layer.share[victim] + layer.more[expert], layer.peak_without(slot))
            if (peak, slot) > after and (best is None or peak < best[0]):
                best = (peak, slot)
    return best


def push(layer: Layer, target: float, floor: float) -> None:
    """Where no single step helps because one expert needs another replica: give it one where it hurts least, and refine from there."""
    for _ in range(PUSHES):
        before = layer.peak()
        held = [layer.place[s] for s in layer.slots[layer.peak_rank()] if layer.place[s] != FREE]
        if before <= target or not held:
            return
        expert = max(held, key=layer.share.__getitem__)
        saved, option = Saved(layer), (-1.0, -1)
        for _ in range(PUSH_TRIES):
            found = next_best_slot(layer, expert, option)
            if found is None:
                return
            option = found
            layer.clear(option[1])
            layer.fill(option[1], expert)
            refine(layer, target, UNLIMITED, floor, True)
            if layer.peak() < before - floor:
                break
            saved.restore(layer)
        else:
            return


def match_ranks(layer: Layer) -> dict[int, int]:
    """Which rank's place each rank of the row takes: ranks of the same size change places so that most experts stay where the reference
    has them. With more than one replica to keep apart all stay."""
    if layer.need > 1:
        return {r: r for r in layer.live}
    held = {q: {layer.reference[s] for s in layer.slots[q]} for q in layer.live}
    options = []
    for i, rank in enumerate(layer.live):
        for j, place in enumerate(layer.live):
            if len(layer.slots[rank]) == len(layer.slots[place]):
                same = sum(layer.place[s] != FREE and layer.place[s] in held[place] for s in layer.slots[rank])
                options.append((-same, i, j))
    place_of: dict[int, int] = {}
    taken: set[int] = set()
    for _, i, j in sorted(options):
        if layer.live[i] not in place_of and layer.live[j] not in taken:
            place_of[layer.live[i]] = layer.live[j]
            taken.add(layer.live[j])
    return place_of


def align(layer: Layer) -> list[int]:
    """The row with ranks and slots arranged so that most of them hold what the reference has there."""
    row = [FREE] * layer.num_slots
    for rank, place in match_ranks(layer).items():
        at = {layer.reference[s]: s for s in layer.slots[place] if layer.reference[s] != FREE}
        mine = [layer.place[s] for s in layer.slots[rank] if layer.place[s] != FREE]
        for expert in mine:
            if expert in at:
                row[at[expert]] = expert
        free = [s for s in layer.slots[place] if row[s] == FREE]
        for slot, expert in zip(free, (e for e in mine if e not in at), strict=False):
            row[slot] = expert
    return row


def can_quotas_level(layer: Layer, goal: float, enough: float) -> bool:
    """Whether quotas bring every rank to ``enough`` or less."""
    water = Pour(layer.weight, layer.place, layer.rank_of_slot, layer.num_ranks)
    water.pour_all(CHECK_ROUNDS, goal * CHECK_STILL, enough)
    return max(water.load) <= enough


def try_fresh(layer: Layer, limits: Limits, is_level: bool, out: Outcome) -> None:
    """A row from nothing in place of the repaired one, if it leaves fewer experts short of domains, or a peak that is lower by far."""
    missing = layer.count_short()
    if is_level and not missing:
        return
    saved = Saved(layer)
    layer.covers = [False] * layer.num_slots
    solve_fresh(layer, out.goal, limits)
    peak, left = layer.peak(), layer.count_short()
    is_lower = not is_level and peak < out.peak - out.goal * limits.fresh_gain
    is_better = left < missing or (left == missing and is_lower)
    row = align(layer) if is_better else []
    saved.restore(layer)
    if is_better:
        layer.take_row(row)
        out.peak, out.fresh = peak, True


def solve_held(layer: Layer, limits: Limits, out: Outcome) -> None:
    target, inner = out.goal * (1.0 + limits.tolerance), out.goal * (1.0 + limits.tolerance * REACH)
    floor = out.goal * HELD_FLOOR
    most = limits.moves or (UNLIMITED,) * 3
    out.spread = spread(layer, most[0])
    out.fill = fill_free(layer, most[1])
    out.peak = layer.peak()
    is_level = out.peak <= target
    if not is_level and limits.quota_tolerance >= 0.0:
        is_level = can_quotas_level(layer, out.goal, out.goal * (1.0 + limits.quota_tolerance))
    if not is_level:
        before = count_changed(layer)
        refine(layer, inner, most[2], floor, True, out.trace)
        if limits.moves is None and layer.peak() > target:
            push(layer, inner, floor)
        out.refine = count_changed(layer) - before
        out.peak = layer.peak()
        is_level = out.peak <= target
    if limits.moves is None:
        try_fresh(layer, limits, is_level, out)


def solve_layer(world: World, weight: Sequence[float], held: Sequence[int] | None, limits: Limits) -> Outcome:
    """Solve one layer, from nothing (``held`` None) or from what slots hold."""
    layer = Layer(world, weight)
    bound, goal = Counts(layer, 1).bound(layer), Counts(layer, layer.need).bound(layer)
    out = Outcome([], [], [], 0.0, bound, goal, 0, 0, 0, False, Trace())
    if held is None:
        solve_fresh(layer, out.goal, limits)
        out.peak = layer.peak()
    else:
        layer.take_held(held)
        cover(layer)
        solve_held(layer, limits, out)
    out.row, out.reference, out.covers = layer.place, layer.reference, layer.covers
    return out
