"""What the placement solver returns, and how rows become it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.quotas import balance_of, level_quotas, sum_by_rank
from elastic_ep.core.topology import Topology


class Move(NamedTuple):
    """Load ``expert`` into physical slot ``slot`` of ``layer``."""

    layer: int
    slot: int
    expert: int


@dataclass(frozen=True)
class Asked:
    """What was asked for. held: int64 [L, P] or None; domain: int64 [ep_size]."""

    weights: NDArray[np.float64]
    topology: Topology
    alive: NDArray[np.bool_]
    held: NDArray[np.int64] | None
    min_replicas: int
    domain: NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        rows: int64 [L, P], what slots are to hold.
        reference: the rows with lost experts covered and nothing else done; None: as held.
        covers: bool [L, P], slots that cover a lost expert in the reference.
        bound: float64 [L], the lowest peak that any placement can have with an even split.
        streamed: (layer, expert) -> rank.
    """

    rows: NDArray[np.int64]
    reference: NDArray[np.int64] | None
    covers: NDArray[np.bool_]
    bound: NDArray[np.float64]
    streamed: dict[tuple[int, int], int]


class _Moves(NamedTuple):
    table: NDArray[np.int64]
    num_mandatory: int
    num_redundancy: int


@dataclass(frozen=True, eq=False)
class PlacementPlan:
    """A placement, how to split tokens over it, and what has to be loaded to get there. What is derived is computed when it is asked for.

    Attributes:
        placement: what every slot is to hold; dead ranks' slots are empty.
        quotas: float64 [L, P], multiples of 2^-16 that add up to exactly 1 per resident expert; 0 in empty slots.
        streamed: (layer, expert) -> live rank that reads it when a token needs it; empty unless slots are too few.
    """

    placement: ExpertPlacement
    quotas: NDArray[np.float64]
    streamed: dict[tuple[int, int], int]
    _asked: Asked
    _found: Found

    # ---- moves

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """`move_table` as records."""
        return tuple(Move(*row) for row in self.move_table.tolist())

    @property
    def move_table(self) -> NDArray[np.int64]:
        """int64 [N, 3] of (layer, slot, expert), in the order to do them.

        The first ``num_mandatory`` cover lost experts: after them every resident expert has a live replica. Then come ``num_redundancy``
        that restore ``min_replicas``, then balance. These may exchange two experts that live nowhere else, so they are staged and
        installed together (`core.transfer`).
        """
        return self._moves.table

    @property
    def num_mandatory(self) -> int:
        """Moves without which an expert has no replica."""
        return self._moves.num_mandatory

    @property
    def num_redundancy(self) -> int:
        """Moves that bring an expert to a failure domain that it lacked."""
        return self._moves.num_redundancy

    @cached_property
    def _moves(self) -> _Moves:
        return _order_moves(self._asked, self._found)

    # ---- coverage

    @cached_property
    def lost(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) pairs that no live slot held before; empty for a first placement."""
        return () if self._asked.held is None else _missing(self._asked.held, self._asked.weights.shape[1])

    @property
    def is_degraded(self) -> bool:
        """Whether some experts have no slot."""
        return bool(self.streamed)

    @cached_property
    def resident(self) -> tuple[tuple[int, ...], ...]:
        """Per layer, the experts that have a slot, ascending."""
        return tuple(tuple(np.unique(row[row != EMPTY]).tolist()) for row in self.placement.physical_to_logical_map)

    @cached_property
    def shortfall(self) -> int:
        """Resident experts over all layers with fewer than ``min_replicas`` replicas on distinct domains."""
        if self._asked.min_replicas <= 1:
            return 0
        return int((_num_domains(self._asked, self._found.rows) < self._asked.min_replicas).sum()) - len(self.streamed)

    # ---- balance

    @cached_property
    def balance(self) -> float:
        """Mean over layers of mean / highest rank load, tokens split evenly over replicas; streamed experts count where they are read."""
        return self._balance(None)

    @cached_property
    def balance_with_quotas(self) -> float:
        """The same with ``quotas``."""
        return self._balance(self.quotas)

    @cached_property
    def bound(self) -> float:
        """The balance that no placement over these slots can exceed with an even split."""
        mean, peak = self._asked.weights.sum(axis=1) / max(1, len(self._ranks)), self._found.bound
        return float(np.divide(mean, peak, out=np.ones_like(mean), where=peak > 0).mean()) if len(mean) else 1.0

    @cached_property
    def _ranks(self) -> NDArray[np.int64]:
        """Live ranks that can take load."""
        return np.flatnonzero(self._asked.alive & ((np.asarray(self._asked.topology.slots_per_rank) > 0) | self.is_degraded))

    def _balance(self, quotas: NDArray[np.float64] | None) -> float:
        loads = sum_by_rank(self._asked.weights, self.placement, self._asked.topology, quotas)
        for (layer, expert), rank in self.streamed.items():
            loads[layer, rank] += self._asked.weights[layer, expert]
        return balance_of(loads, self._ranks)

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """One line per class of decision."""
        return _reasons(self, self._asked)


def make_plan(asked: Asked, found: Found) -> PlacementPlan:
    """Level the quotas of the rows that were found."""
    placement = ExpertPlacement(found.rows, asked.weights.shape[1])
    return PlacementPlan(placement, level_quotas(asked.weights, placement, asked.topology), found.streamed, asked, found)


def _order_moves(asked: Asked, found: Found) -> _Moves:
    rows = found.rows
    if asked.held is None:
        first = _first_replicas(rows)
        covers = np.argwhere(first)
        table = np.concatenate([covers, np.argwhere((rows != EMPTY) & ~first)])
        return _Moves(np.column_stack([table, rows[table[:, 0], table[:, 1]]]), len(covers), 0)
    reference = np.where(found.covers, rows, asked.held) if found.reference is None else found.reference
    # A second replica on a rank counts for nothing in the reference, but its bytes are there.
    reference = np.where(reference == EMPTY, asked.held, reference)
    covers = np.argwhere(found.covers)
    changed = np.argwhere((rows != EMPTY) & (rows != reference))
    num_redundancy = 0
    if asked.min_replicas > 1 and len(changed):
        lacking = _num_domains(asked, reference) < asked.min_replicas
        restores = lacking[changed[:, 0], rows[changed[:, 0], changed[:, 1]]]
        changed = np.concatenate([changed[restores], changed[~restores]])
        num_redundancy = int(restores.sum())
    experts = np.concatenate([reference[covers[:, 0], covers[:, 1]], rows[changed[:, 0], changed[:, 1]]])
    table = np.column_stack([np.concatenate([covers, changed]), experts]).astype(np.int64)
    return _Moves(table, len(covers), num_redundancy)


def _first_replicas(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [L, P]: the first slot of each expert."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    is_first = np.ones(rows.shape, dtype=np.bool_)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.empty_like(is_first)
    np.put_along_axis(first, order, is_first & (ordered != EMPTY), axis=1)
    return first


def _missing(rows: NDArray[np.int64], num_experts: int) -> tuple[tuple[int, int], ...]:
    """(layer, expert) pairs that no slot holds."""
    layer, slot = np.nonzero(rows != EMPTY)
    present = np.zeros((len(rows), num_experts), dtype=np.bool_)
    present[layer, rows[layer, slot]] = True
    return tuple((int(a), int(b)) for a, b in np.argwhere(~present))


def _num_domains(asked: Asked, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [L, E]: distinct failure domains of each expert's replicas."""
    num_domains = int(asked.domain.max(initial=0)) + 1
    seen = np.zeros((len(rows), asked.weights.shape[1], num_domains), dtype=np.bool_)
    layer, slot = np.nonzero(rows != EMPTY)
    seen[layer, rows[layer, slot], asked.domain[asked.topology.rank_of_slot[slot]]] = True
    return np.asarray(seen.sum(axis=2), dtype=np.int64)


def _reasons(plan: PlacementPlan, asked: Asked) -> tuple[str, ...]:
    lines = []
    if plan.streamed:
        readers = len(set(plan.streamed.values()))
        lines.append(f"degraded: {len(plan.streamed)} experts have no slot, the lightest of each layer; {readers} ranks stream them")
    if asked.held is None:
        lines.append(f"first placement: {len(plan.move_table)} slots are loaded")
    elif not len(plan.move_table):
        lines.append("no moves: every expert is covered and every layer as level as asked or as it can be made")
    else:
        balance = len(plan.move_table) - plan.num_mandatory - plan.num_redundancy
        lines.append(f"coverage: {plan.num_mandatory} moves, {len(plan.lost)} experts had no live replica")
        lines.append(f"redundancy: {plan.num_redundancy} moves towards {asked.min_replicas} replicas on distinct domains")
        lines.append(f"balance: {balance} moves")
    if plan.shortfall:
        lines.append(f"short of {asked.min_replicas} replicas on distinct domains: {plan.shortfall} experts")
    lines.append(f"balance {plan.balance:.4f} even, {plan.balance_with_quotas:.4f} with quotas, bound {plan.bound:.4f}")
    return tuple(lines)
