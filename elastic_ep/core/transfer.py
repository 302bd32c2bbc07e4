"""From what slots do hold to what they should: which bytes go where, in what order, over which links, with every expert served meanwhile.

A plan is a list of rounds. In a round every rank reads into staging buffers from what slots held at its start; then all of its copies are
installed at once, between two steps. No round leaves an expert without a live replica that had one or gets one. Lost experts come first
and are written in place, as nothing is served until they are there.

Two experts that live nowhere else may have to change places. Between ranks that is a cycle, and cycles always split into ones that
visit no rank twice, as slots of one rank can stand in for each other: one staging buffer per rank is enough. What then lies in the right
rank but the wrong slot is permuted inside it, without bytes over any link.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.links import Link, LinkLoads, LinkSpeeds, Source, SourceKind
from elastic_ep.core.load import as_array
from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.topology import Topology


class Copy(NamedTuple):
    """Fill slot (layer, slot) of ``rank`` with ``expert``.

    Attributes:
        source: where the bytes come from; a peer's slot is read before anything of the round is installed.
    """

    layer: int
    slot: int
    expert: int
    rank: int
    source: Source


class LocalMove(NamedTuple):
    """Slot ``slot`` takes over what ``from_slot`` of the same rank held at the start of the round; all of a round's at once."""

    layer: int
    slot: int
    from_slot: int


@dataclass(frozen=True)
class Round:
    """Copies that are staged, then installed together.

    Attributes:
        in_place: the copies are written straight into their slots: lost experts, before serving goes on.
        seconds: what its busiest link takes.
    """

    copies: tuple[Copy, ...]
    local_moves: tuple[LocalMove, ...] = ()
    in_place: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class TransferPlan:
    """How to get from contents to a target.

    Attributes:
        rounds: in order; those that cover lost experts first.
        num_coverage_rounds: after them every expert of the target has a live replica.
        num_kept: slots that hold already what they should.
        bytes_by_kind, link_bytes, link_seconds: what is moved, over which link, and what that takes at the given speeds.
        coverage_seconds, seconds: estimated time to the end of the coverage rounds, and of all.
    """

    rounds: tuple[Round, ...]
    num_coverage_rounds: int
    num_kept: int
    bytes_by_kind: dict[SourceKind, int]
    link_bytes: dict[Link, int]
    link_seconds: dict[Link, float]
    coverage_seconds: float
    seconds: float

    @property
    def num_copies(self) -> int:
        return sum(len(r.copies) for r in self.rounds)


def plan_transfer(
    contents: Any,
    target: ExpertPlacement,
    topology: Topology,
    active_ranks: Any,
    *,
    expert_bytes: int = 1,
    node_level: str = "node",
    backups: Mapping[str, NDArray[np.bool_]] | None = None,
    speeds: LinkSpeeds | None = None,
    staging_slots: int = 1,
    in_place: bool = True,
) -> TransferPlan:
    """Rounds that turn ``contents`` into ``target``.

    Args:
        contents: int [L, P], the expert that each slot does hold, verified, -1 for none (`SlotContents.expert_map`). Dead ranks' slots
            are never read.
        target: what slots are to hold; empty in dead ranks' slots.
        active_ranks: int [ep_size], 1 = alive.
        expert_bytes: of one expert of one layer.
        node_level: the level of ``topology.domains`` whose domains share fast links; ranks are nodes of their own without it.
        backups: node label -> bool [L, E], which experts are in that node's host memory. Give living nodes only.
        speeds: of the links.
        staging_slots: buffers per rank for experts that are being read while the rank serves; at least 1.
        in_place: nothing is served until lost experts are there, so they need no staging; False: they are staged like all others.

    Raises:
        InvalidInputError: shapes that do not belong together, no staging slot, or a target that uses a dead rank.
    """
    held = as_array(contents).astype(np.int64)
    live = topology.live_slot_mask(as_array(active_ranks))
    wanted = target.physical_to_logical_map
    if held.shape != wanted.shape or held.shape[1] != topology.num_slots:
        raise InvalidInputError(f"contents {held.shape}, target {wanted.shape} and {topology.num_slots} slots do not belong together")
    if staging_slots < 1:
        raise InvalidInputError(f"staging_slots is {staging_slots}; each rank needs at least 1")
    if (wanted[:, ~live] != EMPTY).any():
        layer, slot = np.argwhere((wanted != EMPTY) & ~live)[0]
        raise InvalidInputError(f"the target puts expert {wanted[layer, slot]} of layer {layer} into slot {slot} of a dead rank")
    held = np.where(live, held, EMPTY)
    node = topology.labels(node_level if node_level in topology.domains else "rank")
    planner = _Planner(held, wanted, topology, node, backups or {}, speeds or LinkSpeeds(), expert_bytes, staging_slots)
    rounds, num_coverage = planner.run(in_place)
    return TransferPlan(
        tuple(rounds),
        num_coverage,
        int(((held == wanted) & (wanted != EMPTY)).sum()),
        dict(planner.bytes_by_kind),
        {k: v for k, v in planner.links.num_bytes.items() if v},
        dict(planner.links.seconds()),
        sum(r.seconds for r in rounds[:num_coverage]),
        sum(r.seconds for r in rounds),
    )


def pick_sources(
    loads: Sequence[tuple[int, int, int]],
    held: NDArray[np.int64],
    topology: Topology,
    *,
    expert_bytes: int = 1,
    node_level: str = "node",
    backups: Mapping[str, NDArray[np.bool_]] | None = None,
    speeds: LinkSpeeds | None = None,
) -> list[Source]:
    """A source for each (layer, slot, expert) of ``loads``, links balanced, for experts that are read in place: all before any step.

    Args:
        held: int [L, P], what slots hold that no load overwrites; -1 in dead ranks' slots.
    """
    node = topology.labels(node_level if node_level in topology.domains else "rank")
    links = LinkLoads(speeds or LinkSpeeds(), node)
    rank_of_slot = topology.rank_of_slot.tolist()
    overwritten = {(layer, slot) for layer, slot, _ in loads}
    picked = []
    for layer, slot, expert in loads:
        rank = rank_of_slot[slot]
        slots = [s for s in np.flatnonzero(held[layer] == expert).tolist() if (layer, s) not in overwritten]
        options = _options(node, rank, [(rank_of_slot[s], s) for s in slots], (backups or {}).get(node[rank]), layer, expert)
        picked.append(links.pick(options, rank, expert_bytes))
    return picked


def _options(
    node: tuple[str, ...], rank: int, holders: Iterable[tuple[int, int]], backup: NDArray[np.bool_] | None, layer: int, expert: int
) -> list[Source]:
    """Every way to bring an expert to ``rank``: from ``holders`` (rank, slot), the host's backup, else the checkpoint. A rank that can have
    it from the host never reads files: both ways end in the same processor, and the files are the slower."""
    has_backup = backup is not None and backup[layer, expert]
    options = [Source(SourceKind.HOST if has_backup else SourceKind.CHECKPOINT)]
    for peer, slot in holders:
        kind = SourceKind.LOCAL if peer == rank else SourceKind.SAME_NODE if node[peer] == node[rank] else SourceKind.OTHER_NODE
        options.append(Source(kind, peer, slot))
    return options


class _Layer:
    """One layer on its way: what each rank holds, in which slot, and what it still wants.

    Attributes:
        held, wanted: expert of each slot; rank_of_slot, slots: the rank of each, and those of each rank.
        count, places: of each expert, how many slots hold it, and which they are.
        keeps: what each rank is to hold; homes: the ranks that are to hold each expert.
    """

    def __init__(self, held: list[int], wanted: list[int], rank_of_slot: list[int], slots: dict[int, list[int]]) -> None:
        self.held, self.wanted, self.rank_of_slot, self.slots = held, wanted, rank_of_slot, slots
        self.count = Counter(held)
        self.places: dict[int, set[int]] = {expert: set() for expert in self.count}
        self.keeps: dict[int, set[int]] = {rank: set() for rank in slots}
        self.homes: dict[int, list[int]] = {expert: [] for expert in wanted if expert != EMPTY}
        for slot, rank in enumerate(rank_of_slot):
            meant = wanted[slot]
            self.places[held[slot]].add(slot)
            if meant != EMPTY and meant not in self.keeps[rank]:
                self.keeps[rank].add(meant)
                self.homes[meant].append(rank)

    def has(self, rank: int, expert: int) -> bool:
        return any(self.rank_of_slot[s] == rank for s in self.places.get(expert, ()))

    def install(self, slot: int, expert: int) -> None:
        """A slot holds another expert now."""
        self.count[self.held[slot]] -= 1
        self.places[self.held[slot]].remove(slot)
        self.held[slot] = expert
        self.count[expert] += 1
        self.places.setdefault(expert, set()).add(slot)

    def missing(self) -> list[tuple[int, int]]:
        """(expert, rank) that is still to be brought."""
        return [(e, r) for e, ranks in sorted(self.homes.items()) for r in ranks if not self.has(r, e)]

    def slot_to_give(self, rank: int, expert: int, used: set[int], free_only: bool, lent: Counter[int]) -> int | None:
        """The slot of ``rank`` that ``expert`` may take: a free one first, of those the one it is meant for.

        A slot can be given up if it is empty or holds what its rank is not to keep, or has twice. It is free if nobody is to keep what it
        holds or another replica stays (``lent``: replicas that this round overwrites, less those that it brings).
        """
        options = []
        for slot in self.slots[rank]:
            mine = self.held[slot]
            if slot in used or (mine in self.keeps[rank] and self._is_last(rank, mine, used)):
                continue
            is_free = mine not in self.homes or self.count[mine] - lent[mine] > 1
            if is_free or not free_only:
                options.append((not is_free, self.wanted[slot] != expert, slot))
        return min(options)[2] if options else None

    def _is_last(self, rank: int, expert: int, used: set[int]) -> bool:
        """Whether just one slot of ``rank`` that is not ``used`` holds ``expert``; one does."""
        return sum(self.rank_of_slot[s] == rank and s not in used for s in self.places[expert]) == 1


@dataclass
class _Draft:
    """Writes of one round: (layer, slot) -> (expert, rank); brought: (layer, expert, rank) of each."""

    writes: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    brought: set[tuple[int, int, int]] = field(default_factory=set)
    incoming: Counter[int] = field(default_factory=Counter)
    lent: dict[int, Counter[int]] = field(default_factory=dict)


class _Planner:
    def __init__(
        self,
        held: NDArray[np.int64],
        wanted: NDArray[np.int64],
        topology: Topology,
        node: tuple[str, ...],
        backups: Mapping[str, NDArray[np.bool_]],
        speeds: LinkSpeeds,
        expert_bytes: int,
        staging_slots: int,
    ) -> None:
        self.rank_of_slot = topology.rank_of_slot.tolist()
        slots: dict[int, list[int]] = {}
        for slot, rank in enumerate(self.rank_of_slot):
            slots.setdefault(rank, []).append(slot)
        self.layers = [_Layer(h, w, self.rank_of_slot, slots) for h, w in np.stack((held, wanted), axis=1).tolist()]
        self.node, self.backups, self.speeds = node, backups, speeds
        self.expert_bytes, self.staging_slots = expert_bytes, staging_slots
        self.links = LinkLoads(speeds, node)
        self.bytes_by_kind: Counter[SourceKind] = Counter()

    def run(self, in_place: bool) -> tuple[list[Round], int]:
        """All rounds, and how many of them are for coverage. Lost experts come first, then those with the fewest replicas."""
        rounds = []
        first = self._cover_in_place() if in_place else _Draft()
        if first.writes:
            rounds.append(self._close(first, in_place=True))
        todo = [(layer, e, r) for layer, state in enumerate(self.layers) for e, r in state.missing()]
        while any(not self.layers[layer].count[e] for layer, e, _ in todo):
            todo.sort(key=lambda item: bool(self.layers[item[0]].count[item[1]]))
            rounds.append(self._close(self._draft(todo)))
            todo = self._left(todo)
        num_coverage = len(rounds)
        while todo:
            todo.sort(key=lambda item: self.layers[item[0]].count[item[1]])
            rounds.append(self._close(self._draft(todo)))
            todo = self._left(todo)
        moves = self._permute()
        if moves:
            rounds.append(Round((), tuple(moves)))
        return rounds, num_coverage

    def _left(self, todo: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        return [item for item in todo if not self.layers[item[0]].has(item[2], item[1])]

    def _cover_in_place(self) -> _Draft:
        """Lost experts whose slot can be given up without another move."""
        draft = _Draft()
        for index, layer in enumerate(self.layers):
            lent, used = draft.lent.setdefault(index, Counter()), set[int]()
            for expert in [e for e in layer.homes if not layer.count[e]]:
                found = [(layer.slot_to_give(r, expert, used, True, lent), r) for r in layer.homes[expert]]
                options = [(layer.wanted[s] != expert, draft.incoming[r], s, r) for s, r in found if s is not None]
                if not options:
                    continue
                _, _, slot, rank = min(options)
                self._write(draft, index, slot, expert, rank, used)
        return draft

    def _draft(self, todo: list[tuple[int, int, int]]) -> _Draft:
        """As many of the copies as staging buffers allow, each with what it needs to leave no expert without a replica."""
        draft = _Draft()
        used: dict[int, set[int]] = {}
        for layer, expert, rank in todo:
            if draft.incoming[rank] < self.staging_slots:
                self._chain(draft, layer, expert, rank, used.setdefault(layer, set()))
        return draft

    def _chain(self, draft: _Draft, index: int, expert: int, rank: int, used: set[int]) -> None:
        """Bring an expert to a rank, what it displaces to where that belongs, and so on, until a slot is free or the chain meets itself."""
        layer, lent = self.layers[index], draft.lent.setdefault(index, Counter())
        if (index, expert, rank) in draft.brought:
            return
        path: list[tuple[int, int, int]] = []  # (slot, expert, rank)
        while True:
            slot = layer.slot_to_give(rank, expert, used, False, lent)
            assert slot is not None, "a rank has room for what it wants, so a slot that it does not"
            path.append((slot, expert, rank))
            displaced = layer.held[slot]
            if displaced not in layer.homes or layer.count[displaced] - lent[displaced] > 1:
                break
            homes = layer.homes[displaced]
            on_path = [i for i, step in enumerate(path) if step[2] in homes]
            if on_path:
                start = on_path[-1]
                path[start] = (path[start][0], displaced, path[start][2])
                path = path[start:]
                break
            free = [r for r in homes if draft.incoming[r] < self.staging_slots]
            if not free:
                return
            expert, rank = displaced, min(free, key=lambda r: draft.incoming[r])
        for slot, moved, to in path:
            self._write(draft, index, slot, moved, to, used)

    def _write(self, draft: _Draft, index: int, slot: int, expert: int, rank: int, used: set[int]) -> None:
        layer = self.layers[index]
        draft.lent[index][layer.held[slot]] += 1
        draft.lent[index][expert] -= 1
        draft.writes[index, slot] = (expert, rank)
        draft.brought.add((index, expert, rank))
        draft.incoming[rank] += 1
        used.add(slot)

    def _close(self, draft: _Draft, in_place: bool = False) -> Round:
        """Choose sources from what is held now, then install."""
        links = LinkLoads(self.speeds, self.node)
        copies = []
        for (layer, slot), (expert, rank) in sorted(draft.writes.items()):
            source = links.pick(self._sources(layer, expert, rank), rank, self.expert_bytes)
            copies.append(Copy(layer, slot, expert, rank, source))
            self.bytes_by_kind[source.kind] += self.expert_bytes
        for copy in copies:
            self.layers[copy.layer].install(copy.slot, copy.expert)
        for link, num_bytes in links.num_bytes.items():
            self.links.num_bytes[link] += num_bytes
        return Round(tuple(copies), in_place=in_place, seconds=max(links.seconds().values(), default=0.0))

    def _sources(self, layer: int, expert: int, rank: int) -> list[Source]:
        holders = [(self.rank_of_slot[s], s) for s in self.layers[layer].places.get(expert, ())]
        return _options(self.node, rank, holders, self.backups.get(self.node[rank]), layer, expert)

    def _permute(self) -> list[LocalMove]:
        """What lies in the right rank but the wrong slot."""
        moves = []
        for index, layer in enumerate(self.layers):
            for slots in layer.slots.values():
                at = {layer.held[s]: s for s in reversed(slots)}
                for slot in slots:
                    expert = layer.wanted[slot]
                    if expert != EMPTY and layer.held[slot] != expert:
                        moves.append(LocalMove(index, slot, at[expert]))
        return moves
