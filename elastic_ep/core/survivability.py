"""Which failures lose an expert: exactly, before they happen. An expert is lost when every rank that holds it is.

The ranks that hold one expert are its host set. No f ranks lose anything exactly if every host set has more than f ranks; a domain
is survived exactly if no host set lies inside it; k random ranks out of N lose an expert with h hosts with probability
C(N-h, k-h) / C(N, k).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import ceil, comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.topology import Topology

MAX_SETS = 2_000_000
"""Failure sets of one size that are enumerated at most; beyond that the worst one is bracketed."""


@dataclass(frozen=True)
class WorstSet:
    """The failure of ``size`` ranks that loses most.

    Attributes:
        ranks: the set (ascending; the first in lexicographic order among the worst).
        lost: experts that it loses, over all layers.
        at_most: no set of this size loses more; equal to ``lost`` when all sets were looked at.
        losing_sets: how many sets of this size lose something; None where they were too many to look at.
        num_sets: how many sets of this size there are.
    """

    size: int
    ranks: tuple[int, ...]
    lost: int
    at_most: int
    losing_sets: int | None
    num_sets: int

    @property
    def is_exact(self) -> bool:
        return self.lost == self.at_most


@dataclass(frozen=True)
class Survivability:
    """What a placement survives from here.

    Attributes:
        any_ranks: the largest f such that no f live ranks hold all replicas of an expert; 0 when one is missing already.
        any_domains: level -> the same for domains of that level.
        domains: level -> whether every single domain of that level can be lost. ``"rank"`` is always there.
        domain_losses: level -> label -> experts lost with it, over all layers.
        expected_lost: k -> expected number of lost experts, over all layers, when k random live ranks are lost.
        worst_sets: the worst set of 1, 2, 3 … ranks.
        missing: experts, over all layers, that no live slot holds now. They are not counted above.
    """

    any_ranks: int
    any_domains: dict[str, int]
    domains: dict[str, bool]
    domain_losses: dict[str, dict[str, int]]
    expected_lost: dict[int, float]
    worst_sets: tuple[WorstSet, ...]
    missing: int

    @cached_property
    def any_node(self) -> bool:
        """Whether any single node can be lost; False when the topology names no nodes."""
        return self.domains.get("node", False)


def survives(placement: ExpertPlacement, topology: Topology, active_ranks: Any = None, *, max_failures: int = 3) -> Survivability:
    """Which failures of live ranks lose an expert.

    Args:
        placement: what slots hold; slots of dead ranks are ignored.
        active_ranks: int [ep_size], 1 = alive; None when all are.
        max_failures: sizes of the sets in ``worst_sets`` and ``expected_lost``.
    """
    active = np.ones(topology.ep_size, dtype=np.int64) if active_ranks is None else np.asarray(active_ranks)
    if placement.num_slots != topology.num_slots:
        raise InvalidInputError(f"placement has {placement.num_slots} slots, the topology {topology.num_slots}; give those that match")
    held = placement.masked(topology, active).physical_to_logical_map
    live = np.flatnonzero(active)
    hosts = _on_rank(held, placement.num_logical_experts, topology.rank_of_slot, topology.ep_size)
    present = hosts.any(axis=1)
    hosts = hosts[present]
    sizes = hosts.sum(axis=1)
    any_domains, domains, losses = {}, {}, {}
    for level in ["rank", *topology.domains]:
        ids = topology.domain_ids(level)
        spread = np.zeros((len(hosts), int(ids.max()) + 1), dtype=np.bool_)
        for rank in live:
            spread[:, ids[rank]] |= hosts[:, rank]
        alone = spread.sum(axis=1) == 1
        lost = spread[alone].sum(axis=0)
        labels = topology.labels(level)
        losses[level] = {labels[r]: int(lost[ids[r]]) for r in live}
        any_domains[level] = 0 if not present.all() else int(spread.sum(axis=1).min(initial=len(live) + 1)) - 1
        domains[level] = bool(present.all() and not alone.any())
    sets = Counter(tuple(np.flatnonzero(row).tolist()) for row in hosts[sizes <= max_failures])
    return Survivability(
        any_domains["rank"],
        any_domains,
        domains,
        losses,
        {k: _expected(sizes, len(live), k) for k in range(1, min(max_failures, len(live)) + 1)},
        tuple(_worst(sets, live.tolist(), size) for size in range(1, min(max_failures, len(live)) + 1)),
        int((~present).sum()),
    )


def survives_one(placement: ExpertPlacement, topology: Topology, active_ranks: Any) -> tuple[int, bool]:
    """(`any_ranks`, `any_node`) of `survives`, and nothing else."""
    rows = placement.masked(topology, active_ranks).physical_to_logical_map
    hosts = _on_rank(rows, placement.num_logical_experts, topology.rank_of_slot, topology.ep_size)
    fewest = int(hosts.sum(axis=1).min(initial=int(np.count_nonzero(active_ranks)) + 1))
    if fewest == 0 or "node" not in topology.domains:
        return max(0, fewest - 1), False
    ids = topology.domain_ids("node")
    nodes = np.stack([hosts[:, ids == node].any(axis=1) for node in range(int(ids.max()) + 1)], axis=1)
    return fewest - 1, bool((nodes.sum(axis=1) > 1).all())


def _on_rank(rows: NDArray[np.int64], num_experts: int, rank_of_slot: NDArray[np.int64], ep_size: int) -> NDArray[np.bool_]:
    """bool [L * E, ep_size]: which ranks hold each expert of each layer."""
    hosts = np.zeros((rows.shape[0] * num_experts, ep_size), dtype=np.bool_)
    layer, slot = np.nonzero(rows != EMPTY)
    hosts[layer * num_experts + rows[layer, slot], rank_of_slot[slot]] = True
    return hosts


def _expected(sizes: NDArray[np.int64], num_ranks: int, failures: int) -> float:
    """Expected number of lost experts when ``failures`` of ``num_ranks`` are lost."""
    total = comb(num_ranks, failures)
    counts = np.bincount(sizes, minlength=failures + 1)
    lost = sum(int(n) * comb(num_ranks - h, failures - h) for h, n in enumerate(counts[: failures + 1]) if h > 0)
    return float(lost / total)


def _worst(sets: Counter[tuple[int, ...]], live: list[int], size: int) -> WorstSet:
    """The worst set of ``size`` ranks: by enumeration where that is short, else the best found and a bound."""
    num_sets = comb(len(live), size)
    inside = {host: n for host, n in sets.items() if len(host) <= size}
    if num_sets <= MAX_SETS and size <= 3:
        return _enumerate(inside, live, size, num_sets)
    touched: Counter[int] = Counter()
    for host, n in inside.items():
        for rank in host:
            touched[rank] += n
    chosen: list[int] = []
    while len(chosen) < size:
        scores = {r: (_lost(inside, {*chosen, r}), touched[r], -r) for r in live if r not in chosen}
        chosen.append(max(scores, key=lambda r: scores[r]))
    found = [tuple(sorted(chosen))]
    found += [(*host, *(r for r in live if r not in host))[:size] for host in sorted(inside, key=lambda h: (-inside[h], h))[:64]]
    lost, ranks = max((_lost(inside, set(ranks)), tuple(-r for r in sorted(ranks))) for ranks in found)
    return WorstSet(size, tuple(sorted(-r for r in ranks)), lost, max(lost, _upper(inside, size)), None, num_sets)


def _lost(inside: dict[tuple[int, ...], int], ranks: set[int]) -> int:
    return sum(n for host, n in inside.items() if ranks.issuperset(host))


def _upper(inside: dict[tuple[int, ...], int], size: int) -> int:
    """A set of ``size`` ranks contains C(size, h) host sets of h ranks at most: add up the largest ones of each h."""
    total = 0
    for h in range(1, size + 1):
        counts = sorted((n for host, n in inside.items() if len(host) == h), reverse=True)
        total += sum(counts[: comb(size, h)])
    return total


def _enumerate(inside: dict[tuple[int, ...], int], live: list[int], size: int, num_sets: int) -> WorstSet:
    """All sets of one, two or three ranks, one lowest rank at a time."""
    index = {rank: i for i, rank in enumerate(live)}
    n = len(live)
    single, pair = np.zeros(n, dtype=np.int64), np.zeros((n, n), dtype=np.int64)
    triples: dict[int, list[tuple[int, int, int]]] = {}
    for host, count in inside.items():
        at = [index[r] for r in host]
        if len(at) == 1:
            single[at[0]] += count
        elif len(at) == 2:
            pair[at[0], at[1]] += count
            pair[at[1], at[0]] += count
        else:
            triples.setdefault(at[0], []).append((at[1], at[2], count))
    best, ranks, losing = -1, (0, 0, 0), 0
    if size == 1:
        return WorstSet(1, (live[int(single.argmax())],), int(single.max()), int(single.max()), int((single > 0).sum()), num_sets)
    both = single[:, None] + single[None, :] + pair
    if size == 2:
        upper = np.triu(both + 1, 1)
        first, second = divmod(int(upper.argmax()), n)
        lost = int(both[first, second])
        return WorstSet(2, (live[first], live[second]), lost, lost, int((upper > 1).sum()), num_sets)
    for a in range(n - 2):
        lost_with = both[a + 1 :, a + 1 :] + single[a] + pair[a, a + 1 :, None] + pair[a, None, a + 1 :]
        for b, c, count in triples.get(a, ()):
            lost_with[b - a - 1, c - a - 1] += count
        upper = np.triu(lost_with + 1, 1)
        losing += int((upper > 1).sum())
        top = int(upper.argmax())
        if int(upper.flat[top]) - 1 > best:
            best = int(upper.flat[top]) - 1
            b, c = divmod(top, n - a - 1)
            ranks = (live[a], live[a + 1 + b], live[a + 1 + c])
    return WorstSet(3, ranks, best, best, losing, num_sets)


@dataclass(frozen=True)
class Requirement:
    """What a guarantee takes.

    Attributes:
        min_replicas: replicas of every expert, each in another domain of ``level``.
        num_slots: physical slots per layer over all ranks, the same number on each.
        num_redundant: slots beyond one per expert.
        slots_per_rank: on every rank.
        is_met: whether the topology as it is has room for it.
        reason: one line.
    """

    level: str
    min_replicas: int
    num_slots: int
    num_redundant: int
    slots_per_rank: int
    is_met: bool
    reason: str


def required_slots(num_experts: int, topology: Topology, failures: int = 1, level: str = "rank", active_ranks: Any = None) -> Requirement:
    """What it takes that no ``failures`` domains of ``level`` lose an expert.

    Every expert needs ``failures + 1`` replicas in distinct domains. That is possible exactly if the sum over domains of
    min(slots of the domain, E) is at least (failures + 1) E (Gale and Ryser: rows that all want m, columns of bounded size).

    Raises:
        InvalidInputError: fewer domains than that, or an argument out of range.
    """
    if num_experts < 1 or failures < 0:
        raise InvalidInputError(f"{num_experts} experts, {failures} failures; give at least 1 expert and 0 failures")
    active = np.ones(topology.ep_size, dtype=np.int64) if active_ranks is None else np.asarray(active_ranks)
    ids = topology.domain_ids(level)[active != 0]
    sizes = np.bincount(ids)
    sizes = sizes[sizes > 0]
    wanted = failures + 1
    if len(sizes) < wanted:
        raise InvalidInputError(
            f"surviving any {failures} of the {level} domains needs {wanted} of them, there are {len(sizes)}; add ranks elsewhere"
        )
    per_rank = ceil(wanted * num_experts / int(sizes.sum()))
    while int(np.minimum(sizes * per_rank, num_experts).sum()) < wanted * num_experts:
        per_rank += 1
    slots = np.asarray(topology.slots_per_rank)[active != 0]
    room = int(np.minimum(np.bincount(ids, slots).astype(np.int64), num_experts).sum())
    total = per_rank * int(sizes.sum())
    reason = (
        f"any {failures} of {len(sizes)} {level} domains: {wanted} replicas of each of {num_experts} experts in distinct domains, "
        f"{total} slots, {per_rank} on each of {int(sizes.sum())} ranks, {total - num_experts} redundant"
    )
    return Requirement(level, wanted, total, total - num_experts, per_rank, room >= wanted * num_experts, reason)
