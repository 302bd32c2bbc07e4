"""Who is at fault when ranks accuse each other: a pure decision from the accusations of one step or install."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple


class Verdict(NamedTuple):
    """Ranks to give up, each with the reason."""

    guilty: dict[int, str]


DEADLINE = "deadline"


def judge(accusations: Mapping[int, Mapping[int, str]], answered: Collection[int], dead: Collection[int]) -> Verdict:
    """Give up as few ranks as explain every accusation.

    An accusation is an edge between two ranks that could not exchange. Edges at a dead rank are explained already. A missed deadline
    of a rank that has itself reported this step as failed is a consequence, not a cause, and counts only if nothing else is left.
    Then, while edges are left, the rank on most of them goes; ties go to one that has not answered, then to the one more accused, then
    to the higher id. So a rank that all others miss is given up, not its accusers; of two that miss each other, the silent one.

    A rank that has answered is not given up because of several that have not: they speak, and it is judged again, or they are silent
    until the transaction's deadline, which gives them up. Else one healthy rank among hung ones would be the first to go.

    Args:
        accusations: accuser -> {accused: how}.
        answered: ranks that reported on this step at all.
        dead: ranks already given up.
    """
    edges: dict[tuple[int, int], str] = {}
    consequences: dict[tuple[int, int], str] = {}
    for accuser, accused in accusations.items():
        for peer, how in accused.items():
            if peer == accuser or peer in dead or accuser in dead:
                continue
            kind = consequences if how == DEADLINE and peer in answered else edges
            kind[min(accuser, peer), max(accuser, peer)] = how
    named = [peer for peers in accusations.values() for peer in peers]
    return Verdict(_cover(edges or consequences, answered, named))


def _cover(edges: dict[tuple[int, int], str], answered: Collection[int], named: list[int]) -> dict[int, str]:
    guilty: dict[int, str] = {}
    while edges:
        degree: dict[int, int] = {}
        for a, b in edges:
            degree[a] = degree.get(a, 0) + 1
            degree[b] = degree.get(b, 0) + 1
        worst = max(degree, key=lambda r: (degree[r], r not in answered, named.count(r), r))
        others = sorted((b if a == worst else a, how) for (a, b), how in edges.items() if worst in (a, b))
        edges = {edge: how for edge, how in edges.items() if worst not in edge}
        if worst in answered and not any(other in answered for other, _ in others):
            continue
        guilty[worst] = ", ".join(f"rank {other}: {how}" for other, how in others)
    return guilty
