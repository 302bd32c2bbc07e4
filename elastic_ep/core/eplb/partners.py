"""Which ranks should hold the other replicas of a rank's experts, so that few distinct failures lose anything (copysets).

If replicas are paired at random, nearly every pair of ranks holds some expert of some layer between them, and any double failure loses it.
If each rank has a few fixed partners, only those pairs do. One partner would lose least often, but leave all load of a dead rank to one
other; four, in other failure domains and so chosen that loads can flow on through their partners, keep the rest level.
"""

from __future__ import annotations

from collections.abc import Sequence

REACH = 0.44
"""offset of the second pair of partners, as a part of the number of ranks"""


def ring(domain: Sequence[int], slots_per_rank: Sequence[int]) -> list[int]:
    """Ranks that have slots, in an order in which neighbours are in different domains where domains are of like size."""
    members: dict[int, list[int]] = {}
    for rank, slots in enumerate(slots_per_rank):
        if slots > 0:
            members.setdefault(domain[rank], []).append(rank)
    depth = max((len(ranks) for ranks in members.values()), default=0)
    return [ranks[i] for i in range(depth) for ranks in members.values() if i < len(ranks)]


def offsets(num_ranks: int, num_domains: int) -> list[int]:
    """How far along the ring the partners of a rank are: next to it, and less than half way round in yet another domain."""
    if num_ranks <= 5:
        return list(range(1, num_ranks // 2 + 1))
    remainder = 1 if num_domains == 2 else 2 % num_domains
    candidates = [o for o in range(2, (num_ranks + 1) // 2) if o % num_domains]
    if 2 <= num_domains <= 8:
        candidates = [o for o in candidates if o % num_domains == remainder] or candidates
    aim = round(REACH * num_ranks)
    return [1, *([min(candidates, key=lambda o: (abs(o - aim), o))] if candidates else [])]


def partner_ranks(domain: Sequence[int], slots_per_rank: Sequence[int]) -> list[list[int]]:
    """Partners of each rank, ascending, none in its own domain. It depends on the topology alone, not on who lives, so that a failure
    changes no pairing but its own."""
    order = ring(domain, slots_per_rank)
    partners: list[set[int]] = [set() for _ in domain]
    if len(order) < 2:
        return [[] for _ in domain]
    for step in offsets(len(order), len({domain[r] for r in order})):
        for place, rank in enumerate(order):
            other = order[(place + step) % len(order)]
            if domain[rank] != domain[other]:
                partners[rank].add(other)
                partners[other].add(rank)
    return [sorted(others) for others in partners]
