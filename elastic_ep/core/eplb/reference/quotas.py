"""Token quotas of one layer. Mirrored by native/quotas.h."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_ep.core.eplb.reference.layer import FREE


class Pour:
    """Tokens of one layer poured over the slots of a row.

    Attributes:
        slots: of each expert, ascending.
        load: tokens per rank; part: tokens per slot.
    """

    def __init__(self, weight: Sequence[float], row: Sequence[int], rank_of_slot: Sequence[int], num_ranks: int) -> None:
        """Even parts."""
        self.weight, self.rank_of_slot = weight, rank_of_slot
        self.slots: list[list[int]] = [[] for _ in weight]
        for slot, expert in enumerate(row):
            if expert != FREE:
                self.slots[expert].append(slot)
        self.load, self.part = [0.0] * num_ranks, [0.0] * len(row)
        for slot, expert in enumerate(row):
            if expert != FREE:
                self.part[slot] = weight[expert] / len(self.slots[expert])
                self.load[rank_of_slot[slot]] += self.part[slot]

    def pour(self, expert: int) -> float:
        """Level one expert over the ranks that hold it, like water over columns as high as their other load. Returns the largest change
        of a part."""
        held, load, part, rank_of_slot = self.slots[expert], self.load, self.part, self.rank_of_slot
        for slot in held:
            load[rank_of_slot[slot]] -= part[slot]
        columns = sorted(load[rank_of_slot[s]] for s in held)
        rest, level, count = self.weight[expert], columns[0], 1
        while count < len(columns) and (columns[count] - level) * count < rest:
            rest -= (columns[count] - level) * count
            level = columns[count]
            count += 1
        level += rest / count
        moved = 0.0
        for slot in held:
            rank = rank_of_slot[slot]
            new = level - load[rank]
            if new < 0.0:
                new = 0.0
            moved = max(moved, abs(new - part[slot]))
            part[slot] = new
            load[rank] += new
        return moved

    def pour_all(self, rounds: int, still: float, enough: float) -> None:
        """Pour every expert anew, up to ``rounds`` times, until nothing moves more than ``still`` or no rank has more than ``enough``.

        Each pouring lowers the sum of squared rank loads, which is least when no load can go to a less loaded rank.
        """
        shared = [e for e, held in enumerate(self.slots) if len(held) > 1 and self.weight[e] > 0.0]
        for _ in range(rounds):
            if max(self.load) <= enough:
                break
            moved = 0.0
            for expert in shared:
                moved = max(moved, self.pour(expert))
            if moved <= still:
                break

    def to_units(self, expert: int, units: int, out: list[int]) -> None:
        """Whole numbers near units * part / sum of parts (even ones if there is none) that add up to ``units``; the remainder goes to the
        largest fractions, the first among equals."""
        held, rest, total = self.slots[expert], units, 0.0
        for slot in held:
            total += self.part[slot]
        lack = []
        for slot in held:
            exact = units * (self.part[slot] / total) if total > 0.0 else units / len(held)
            out[slot] = int(exact)
            lack.append(out[slot] - exact)
            rest -= out[slot]
        while rest > 0:
            at = min(range(len(held)), key=lambda i: (lack[i], i))
            out[held[at]] += 1
            lack[at] += 1.0
            rest -= 1
        while rest < 0:
            at = min((i for i in range(len(held)) if out[held[i]] > 0), key=lambda i: (-lack[i], i))
            out[held[at]] -= 1
            lack[at] -= 1.0
            rest += 1


def quota_units(
    weight: Sequence[float], row: Sequence[int], rank_of_slot: Sequence[int], num_ranks: int, rounds: int, still: float, units: int
) -> list[int]:
    """Share of its expert that each slot takes, in ``units`` parts, so that rank loads are as level as the replicas allow."""
    total = 0.0
    for value in weight:
        total += value
    water = Pour(weight, row, rank_of_slot, num_ranks)
    water.pour_all(rounds, still * total, 0.0)
    out = [0] * len(row)
    for expert, held in enumerate(water.slots):
        if held:
            water.to_units(expert, units, out)
    return out
