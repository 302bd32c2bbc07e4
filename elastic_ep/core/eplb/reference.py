"""The solver's inner loops for one layer, in plain Python: what a compiled form must reproduce to the bit.

All choices are by (criterion, lowest index); every sum runs in a fixed order; nothing depends on the platform.
"""

from __future__ import annotations

from collections.abc import Sequence

FREE = -1


class Layer:
    """Slots of one layer while they are being filled.

    Args:
        weight: load of each expert, length E.
        rank_of_slot: length P.
        alive: per rank; slots of dead ranks are never touched.
        domain: failure domain of each rank.
        need: replicas on distinct domains that each expert should have.
        row: what the slots hold, length P; -1 for nothing. A second replica on one rank counts as nothing.
    """

    def __init__(
        self,
        weight: Sequence[float],
        rank_of_slot: Sequence[int],
        alive: Sequence[bool],
        domain: Sequence[int],
        need: int,
        row: Sequence[int],
    ) -> None:
        self.weight = list(weight)
        self.rank_of_slot = list(rank_of_slot)
        self.domain = list(domain)
        self.need = need
        self.slots: list[list[int]] = [[] for _ in alive]
        for slot, rank in enumerate(self.rank_of_slot):
            if alive[rank]:
                self.slots[rank].append(slot)
        self.ranks = [r for r, slots in enumerate(self.slots) if slots]
        self.hosts: list[dict[int, int]] = [{} for _ in self.weight]
        self.place = [FREE] * len(self.rank_of_slot)
        self.load = [0.0] * len(alive)
        self.pinned: set[int] = set()
        for rank in self.ranks:
            for slot in self.slots[rank]:
                if row[slot] != FREE and rank not in self.hosts[row[slot]]:
                    self.place[slot] = row[slot]
                    self.hosts[row[slot]][rank] = slot
        for rank in self.ranks:
            for slot in self.slots[rank]:
                if self.place[slot] != FREE:
                    self.load[rank] += self.share(self.place[slot], 0)

    # ---- state

    def share(self, expert: int, more: int) -> float:
        """Load of one replica of ``expert`` if it had ``more`` of them."""
        return self.weight[expert] / (len(self.hosts[expert]) + more)

    def peak_rank(self) -> int:
        return min(self.ranks, key=lambda r: (-self.load[r], r))

    def fill(self, slot: int, expert: int) -> None:
        """Put a replica into an empty slot."""
        before = self.share(expert, 0) if self.hosts[expert] else 0.0
        after = self.share(expert, 1)
        for rank in sorted(self.hosts[expert]):
            self.load[rank] += after - before
        rank = self.rank_of_slot[slot]
        self.hosts[expert][rank] = slot
        self.place[slot] = expert
        self.load[rank] += after

    def clear(self, slot: int) -> None:
        """Take a replica out of its slot."""
        expert, rank = self.place[slot], self.rank_of_slot[slot]
        before = self.share(expert, 0)
        del self.hosts[expert][rank]
        self.place[slot] = FREE
        self.load[rank] -= before
        if self.hosts[expert]:
            after = self.share(expert, 0)
            for other in sorted(self.hosts[expert]):
                self.load[other] += after - before

    def num_domains(self, expert: int, without: int = -1, plus: int = -1) -> int:
        """Distinct failure domains of an expert's replicas, without one rank, with another."""
        seen = {self.domain[r] for r in self.hosts[expert] if r != without}
        if plus >= 0:
            seen.add(self.domain[plus])
        return len(seen)

    def may_leave(self, expert: int, rank: int, to: int = -1) -> bool:
        """Whether a replica may leave ``rank`` (for ``to``, or for good) without breaking what the expert has of its due."""
        if to < 0 and len(self.hosts[expert]) <= max(1, self.need):
            return False
        if self.need <= 1:
            return True
        return self.num_domains(expert, rank, to) >= min(self.need, self.num_domains(expert))

    def peak_without(self, slot: int) -> float:
        """The highest load among the other hosts of a slot's expert once that replica is gone."""
        expert, rank = self.place[slot], self.rank_of_slot[slot]
        gain = self.share(expert, -1) - self.share(expert, 0)
        return max((self.load[r] + gain for r in self.hosts[expert] if r != rank), default=0.0)

    # ---- phases

    def pack(self, counts: Sequence[int]) -> None:
        """Fill empty slots with the given number of replicas of each expert: heaviest first, each to the least loaded rank that may
        take it; the first ``need`` to new failure domains where one has room."""
        per = [w / c for w, c in zip(self.weight, counts, strict=True)]
        room = {r: [s for s in self.slots[r] if self.place[s] == FREE] for r in self.ranks}
        load = dict.fromkeys(self.ranks, 0.0)
        for expert in sorted(range(len(per)), key=lambda e: (-per[e], e)):
            for index in range(counts[expert]):
                taken = {self.domain[r] for r in self.hosts[expert]} if index < self.need else set()
                choices = [(self.domain[r] in taken, load[r], r) for r in self.ranks if room[r] and r not in self.hosts[expert]]
                if choices:
                    rank = min(choices)[2]
                    slot = room[rank].pop(0)
                    self.hosts[expert][rank] = slot
                    self.place[slot] = expert
                    load[rank] += per[expert]
        self.load = [0.0] * len(self.load)
        for rank in self.ranks:
            for slot in self.slots[rank]:
                if self.place[slot] != FREE:
                    self.load[rank] += self.share(self.place[slot], 0)

    def cover(self) -> None:
        """Give every expert that no slot holds one, heaviest first, where it raises the peak least; empty slots before others."""
        lost = [e for e in range(len(self.weight)) if not self.hosts[e]]
        for expert in sorted(lost, key=lambda e: (-self.weight[e], e)):
            best: tuple[int, float, int] | None = None
            for rank in self.ranks:
                for slot in self.slots[rank]:
                    victim, grade, peak = self.place[slot], 0, self.load[rank] + self.weight[expert]
                    if victim != FREE:
                        if len(self.hosts[victim]) == 1 or slot in self.pinned:
                            continue
                        grade = 1 if self.may_leave(victim, rank) else 2
                        peak = max(peak - self.share(victim, 0), self.peak_without(slot))
                    if best is None or (grade, peak, slot) < best:
                        best = (grade, peak, slot)
            assert best is not None, "fewer live slots than experts: the caller degrades first"
            if self.place[best[2]] != FREE:
                self.clear(best[2])
            self.fill(best[2], expert)
            self.pinned.add(best[2])

    def spread(self, budget: int) -> int:
        """Bring experts to ``need`` distinct failure domains, those with the fewest first. Returns the moves made."""
        moves = 0
        for want in range(2, self.need + 1):
            short = [e for e in range(len(self.weight)) if self.num_domains(e) < want]
            for expert in sorted(short, key=lambda e: (-self.weight[e], e)):
                best: tuple[int, float, int, int] | None = None
                have = {self.domain[r] for r in self.hosts[expert]}
                for rank in self.ranks:
                    if self.domain[rank] in have:
                        continue
                    for slot in self.slots[rank]:
                        option = self._spread_option(expert, rank, slot, want)
                        if option is not None and (best is None or option < best):
                            best = option
                if best is None or moves + best[0] > budget:
                    continue
                cost, _, slot, back = best
                if back >= 0:
                    victim = self.place[slot]
                    self.clear(slot)
                    self.clear(back)
                    self.fill(slot, expert)
                    self.fill(back, victim)
                else:
                    if self.place[slot] != FREE:
                        self.clear(slot)
                    self.fill(slot, expert)
                moves += cost
        return moves

    def _spread_option(self, expert: int, rank: int, slot: int, want: int) -> tuple[int, float, int, int] | None:
        """(moves, peak, slot, slot given in exchange or -1) of bringing ``expert`` into ``slot``; None if it may not."""
        if slot in self.pinned:
            return None
        victim = self.place[slot]
        share = self.share(expert, 1)
        if victim == FREE:
            return (1, self.load[rank] + share, slot, -1)
        if self.may_leave(victim, rank):
            return (1, max(self.load[rank] + share - self.share(victim, 0), self.peak_without(slot)), slot, -1)
        for other, back in sorted(self.hosts[expert].items()):
            doubled = self.num_domains(expert, other) == self.num_domains(expert)
            if doubled and back not in self.pinned and other not in self.hosts[victim] and self.may_leave(victim, rank, other):
                change = self.share(expert, 0) - self.share(victim, 0)
                return (2, max(self.load[rank] + change, self.load[other] - change), slot, back)
        return None

    def fill_free(self, budget: int) -> int:
        """Spend empty slots on replicas of the experts whose replicas carry most, least loaded rank first. Returns the moves."""
        moves = 0
        open_ranks = {r for r in self.ranks if any(self.place[s] == FREE for s in self.slots[r])}
        while open_ranks and moves < budget:
            rank = min(open_ranks, key=lambda r: (self.load[r], r))
            slot = next(s for s in self.slots[rank] if self.place[s] == FREE)
            choices = [(-self.share(e, 0), e) for e in range(len(self.weight)) if rank not in self.hosts[e]]
            if not choices:
                open_ranks.discard(rank)
                continue
            self.fill(slot, min(choices)[1])
            moves += 1
            if all(self.place[s] != FREE for s in self.slots[rank]):
                open_ranks.discard(rank)
        return moves

    def refine(self, target: float, budget: int, min_gain: float, max_steps: int) -> int:
        """Lower the peak by exchanging or re-dedicating slots until it is at most ``target``. Returns the moves made."""
        moves = 0
        for _ in range(max_steps):
            peak = self.peak_rank()
            if self.load[peak] <= target:
                break
            best: tuple[float, int, int, int] | None = None
            for rank in sorted(self.ranks, key=lambda r: (self.load[r], r)):
                if rank == peak or self.load[rank] >= self.load[peak]:
                    continue
                for a in self.slots[peak]:
                    for b in self.slots[rank]:
                        option = self._step(peak, a, rank, b, budget - moves, min_gain)
                        if option is not None and (best is None or option[0] > best[0]):
                            best = option
            if best is None:
                break
            _, kind, a, b = best
            first, second = self.place[a], self.place[b]
            self.clear(b)
            if kind == 2:
                self.clear(a)
                self.fill(a, second)
            self.fill(b, first)
            moves += kind
        return moves

    def _step(self, peak: int, a: int, rank: int, b: int, budget: int, min_gain: float) -> tuple[float, int, int, int] | None:
        """(gain per move, moves, a, b) of the better of: exchange slots a and b; give b to a replica of a's expert."""
        mine, theirs = self.place[a], self.place[b]
        if mine == FREE or theirs == FREE or rank in self.hosts[mine] or a in self.pinned or b in self.pinned:
            return None
        top, low = self.load[peak], self.load[rank]
        share, other = self.share(mine, 0), self.share(theirs, 0)
        best: tuple[float, int, int, int] | None = None
        if budget >= 1 and self.may_leave(theirs, rank):
            less = self.share(mine, 1)
            after = max(top - share + less, low - other + less)
            if top - after > min_gain:
                grown = self.share(theirs, -1) - other
                for host in self.hosts[theirs]:
                    if host != rank:
                        after = max(after, self.load[host] + grown + (less - share if host in self.hosts[mine] else 0.0))
                if top - after > min_gain:
                    best = (top - after, 1, a, b)
        if budget >= 2 and other < share and peak not in self.hosts[theirs]:
            gain = (top - max(top - share + other, low - other + share)) * 0.5
            better = gain > min_gain and (best is None or gain > best[0])
            if better and self.may_leave(mine, peak, rank) and self.may_leave(theirs, rank, peak):
                best = (gain, 2, a, b)
        return best


def replica_counts(weight: Sequence[float], num_slots: int, most: int, need: int) -> list[int]:
    """Replicas of each expert, at most ``most``: first ``need`` of each as far as slots reach, heaviest first, then one at a time
    to the expert whose replicas carry most."""
    counts = [1] * len(weight)
    spare = num_slots - len(weight)
    by_load = sorted(range(len(weight)), key=lambda e: (-weight[e], e))
    for _ in range(1, min(need, most)):
        for expert in by_load[: max(0, spare)]:
            counts[expert] += 1
            spare -= 1
    per = [w / c for w, c in zip(weight, counts, strict=True)]
    while spare > 0:
        expert = min((e for e in by_load if counts[e] < most), key=lambda e: (-per[e], e), default=-1)
        if expert < 0:
            break
        counts[expert] += 1
        per[expert] = weight[expert] / counts[expert]
        spare -= 1
    return counts


def even_bound(weight: Sequence[float], counts: Sequence[int], num_ranks: int) -> float:
    """No placement with these least shares can have a lower peak: the mean rank load, or the heaviest replica."""
    total = 0.0
    for w in weight:
        total += w
    return max(total / num_ranks, max(w / c for w, c in zip(weight, counts, strict=True)))


def quota_units(
    weight: Sequence[float], row: Sequence[int], rank_of_slot: Sequence[int], num_ranks: int, rounds: int, units: int
) -> list[int]:
    """Share of its expert that each slot takes, in ``units`` parts: rank loads levelled as far as replicas allow.

    Each round pours every expert anew over the ranks that hold it, like water over columns as high as the ranks' other load. That
    lowers the sum of squared rank loads, which is least when no load can go to a less loaded rank. Slots that hold nothing get 0.
    """
    slots: list[list[int]] = [[] for _ in weight]
    for slot, expert in enumerate(row):
        if expert != FREE:
            slots[expert].append(slot)
    load, part = [0.0] * num_ranks, [0.0] * len(row)
    for expert, held in enumerate(slots):
        for slot in held:
            part[slot] = weight[expert] / len(held)
    for slot, expert in enumerate(row):
        if expert != FREE:
            load[rank_of_slot[slot]] += part[slot]
    shared = [e for e, held in enumerate(slots) if len(held) > 1 and weight[e] > 0.0]
    for _ in range(rounds):
        moved = 0.0
        for expert in shared:
            moved = max(moved, _pour(weight[expert], slots[expert], rank_of_slot, load, part))
        if moved <= 0.0:
            break
    out = [0] * len(row)
    for expert, held in enumerate(slots):
        for slot, count in zip(held, _to_units([part[s] for s in held], weight[expert], units), strict=True):
            out[slot] = count
    return out


def _pour(weight: float, held: Sequence[int], rank_of_slot: Sequence[int], load: list[float], part: list[float]) -> float:
    """Level one expert over its slots; ``load`` and ``part`` are changed. Returns the largest change of a part."""
    for slot in held:
        load[rank_of_slot[slot]] -= part[slot]
    columns = sorted(load[rank_of_slot[s]] for s in held)
    rest, level, count = weight, columns[0], 1
    while count < len(columns) and (columns[count] - level) * count < rest:
        rest -= (columns[count] - level) * count
        level = columns[count]
        count += 1
    level += rest / count
    change = 0.0
    for slot in held:
        rank = rank_of_slot[slot]
        new = max(0.0, level - load[rank])
        change = max(change, abs(new - part[slot]))
        part[slot] = new
        load[rank] += new
    return change


def _to_units(parts: Sequence[float], weight: float, units: int) -> list[int]:
    """Whole numbers that add up to ``units``, nearest to ``parts / weight`` (even for no weight); the remainder goes to the largest
    fractions, the first among equals."""
    count = len(parts)
    if count == 0:
        return []
    exact = [units * (p / weight) if weight > 0.0 else units / count for p in parts]
    whole = [int(x) for x in exact]
    rest = units - sum(whole)
    by_fraction = sorted(range(count), key=lambda i: (whole[i] - exact[i], i))
    step = 1 if rest > 0 else -1
    for index in range(abs(rest)):
        whole[by_fraction[index % count] if step > 0 else by_fraction[-1 - index % count]] += step
    return whole
