"""What `elastic-ep plan` found, as one JSON object and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.eplb.resilient import PlacementPlan
from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.quotas import rank_loads
from elastic_ep.core.survivability import Requirement, Survivability
from elastic_ep.core.topology import Topology

SHADES = " .:-=+*#%@"
MAX_COLUMNS, MAX_ROWS = 64, 16


@dataclass(frozen=True)
class Case:
    """One load on one membership and the plan for it.

    Attributes:
        load: float64 [L, E].
        active: int [ep_size].
        solve_ms: time of the solve, warm.
    """

    load: NDArray[np.float64]
    active: NDArray[np.int64]
    plan: PlacementPlan
    solve_ms: float


@dataclass(frozen=True)
class Report:
    """Everything the command prints. repair: None unless something was changed."""

    topology: Topology
    first: Case
    repair: Case | None
    survival: Survivability
    expert_bytes: int


def duplicates(placement: ExpertPlacement, topology: Topology) -> int:
    """Replicas, over all layers, that share a rank with another of the same expert."""
    rows = placement.physical_to_logical_map
    layer, slot = np.nonzero(rows != EMPTY)
    key = (layer * topology.ep_size + topology.rank_of_slot[slot]) * placement.num_logical_experts + rows[layer, slot]
    return len(key) - len(np.unique(key))


def to_json(report: Report) -> dict[str, Any]:
    """The object that ``--json`` prints."""
    plan, survival = report.first.plan, report.survival
    last = report.repair or report.first
    return {
        "balance": plan.balance,
        "balance_with_quotas": plan.balance_with_quotas,
        "bound": plan.bound,
        "duplicates_on_a_rank": duplicates(plan.placement, report.topology),
        "solve_ms": report.first.solve_ms,
        "repair": None if report.repair is None else _repair_json(report.repair, report.expert_bytes),
        "survives": {
            "any_ranks": survival.any_ranks,
            "domains": survival.domains,
            "expected_lost": {str(k): v for k, v in survival.expected_lost.items()},
        },
        "degraded": _degraded_json(last, report.topology) if last.plan.is_degraded else None,
    }


def _repair_json(case: Case, expert_bytes: int) -> dict[str, Any]:
    plan = case.plan
    return {
        "lost_experts": len(plan.lost),
        "mandatory_moves": plan.num_mandatory,
        "moves": len(plan.move_table),
        "bytes_moved": len(plan.move_table) * expert_bytes,
        "balance": plan.balance,
        "balance_with_quotas": plan.balance_with_quotas,
        "solve_ms": case.solve_ms,
    }


def _degraded_json(case: Case, topology: Topology) -> dict[str, Any]:
    live = int(topology.live_slot_mask(case.active).sum())
    num_layers, num_experts = case.load.shape
    counts = np.bincount(list(case.plan.streamed.values()), minlength=topology.ep_size)[case.active != 0]
    streamed_load = sum(case.load[layer, expert] for layer, expert in case.plan.streamed)
    return {
        "live_slots": live,
        "missing_slots": num_experts - live,
        "resident_experts": num_layers * num_experts - len(case.plan.streamed),
        "streamed_experts": len(case.plan.streamed),
        "streamed_share_of_load": float(streamed_load / case.load.sum()) if case.load.sum() > 0 else 0.0,
        "streamed_per_rank": [int(counts.min()), int(counts.max())],
    }


def to_text(report: Report) -> str:
    """The report for a terminal."""
    first, topology = report.first, report.topology
    num_layers, num_experts = first.load.shape
    lines = [
        f"{num_layers} layers x {num_experts} experts, {topology.num_slots} slots on {topology.ep_size} ranks"
        + "".join(f", {len(set(labels))} {level} domains" for level, labels in topology.domains.items()),
        "",
        f"placement   {_balance_text(first)}",
        *(f"            {reason}" for reason in first.plan.reasons[:-1]),
        f"            {duplicates(first.plan.placement, topology)} duplicates on a rank, solved in {first.solve_ms:.1f} ms",
        *_heat_map(first, topology),
        "",
        *_survival_text(report.survival),
    ]
    if report.repair is not None:
        lines += ["", *_repair_text(report.repair, topology, report.expert_bytes)]
    last = report.repair or first
    if last.plan.is_degraded:
        found = _degraded_json(last, topology)
        low, high = found["streamed_per_rank"]
        lines += [
            "",
            f"degraded    {found['live_slots']} live slots for {num_experts} experts: {found['missing_slots']} short per layer",
            f"            {found['streamed_experts']} experts ({found['streamed_share_of_load']:.2%} of the load) are streamed, "
            f"{low} to {high} by each live rank",
        ]
    return "\n".join(lines)


def requirement_text(need: Requirement, expert_bytes: int, num_layers: int, balance: float) -> str:
    """The answer to ``--survive``."""
    per_rank = need.slots_per_rank * num_layers * expert_bytes
    return "\n".join(
        [
            need.reason,
            f"experts take {per_rank / 1e9:.1f} GB on each rank ({need.slots_per_rank} slots x {num_layers} layers x "
            f"{expert_bytes / 1e6:.1f} MB)",
            f"checked: a placement over these slots survives it, balance with quotas {balance:.4f}",
        ]
    )


def _balance_text(case: Case) -> str:
    plan = case.plan
    return f"balance {plan.balance:.4f} even, {plan.balance_with_quotas:.4f} with quotas; bound {plan.bound:.4f}"


def _survival_text(survival: Survivability) -> list[str]:
    any_ranks = f"any {survival.any_ranks} ranks" if survival.any_ranks else "not any rank: some experts are on one alone"
    lines = [f"survives    {any_ranks}"]
    for level, ok in survival.domains.items():
        if level == "rank":
            continue
        label, lost = max(survival.domain_losses[level].items(), key=lambda item: item[1])
        lines.append(f"            any single {level}" if ok else f"            not any {level}: {label!r} loses {lost} experts")
    for worst in survival.worst_sets:
        mean = survival.expected_lost[worst.size]
        chance = "" if worst.losing_sets is None else f", {worst.losing_sets / worst.num_sets:.1%} of such failures lose something"
        about = "" if worst.is_exact else f" (at most {worst.at_most})"
        names = ",".join(str(r) for r in worst.ranks)
        lines.append(f"            {worst.size} random ranks lose {mean:.2f} experts, at worst {worst.lost}{about} (ranks {names}){chance}")
    return lines


def _repair_text(case: Case, topology: Topology, expert_bytes: int) -> list[str]:
    plan, dead = case.plan, np.flatnonzero(case.active == 0)
    what = f"after ranks {','.join(map(str, dead))} die" if len(dead) else "after the load drifted"
    num_moves = len(plan.move_table)
    return [
        f"repair      {what}: {_balance_text(case)}",
        *(f"            {reason}" for reason in plan.reasons[:-1]),
        f"            {num_moves} moves, {num_moves * expert_bytes / 1e9:.1f} GB, solved in {case.solve_ms:.1f} ms",
        *_heat_map(case, topology),
    ]


def _heat_map(case: Case, topology: Topology) -> list[str]:
    """Load of ranks beside the mean, layers down and ranks across; several layers or ranks share a cell where there are too many."""
    ranks = np.flatnonzero(case.active)
    loads = rank_loads(case.load, case.plan.placement, topology, case.plan.quotas)
    for (layer, expert), rank in case.plan.streamed.items():
        loads[layer, rank] += case.load[layer, expert]
    loads = loads[:, ranks]
    mean = loads.mean(axis=1, keepdims=True)
    relative = np.divide(loads, mean, out=np.ones_like(loads), where=mean > 0)
    rows = np.array_split(np.arange(len(relative)), min(MAX_ROWS, len(relative)))
    columns = np.array_split(np.arange(len(ranks)), min(MAX_COLUMNS, len(ranks)))
    cells = np.array([[relative[np.ix_(r, c)].max() for c in columns] for r in rows])
    top = max(1.02, float(cells.max(initial=1.0)))
    shade = np.clip(np.ceil((cells - 1.0) / (top - 1.0) * (len(SHADES) - 1)), 0, len(SHADES) - 1).astype(int)
    lines = [f"            rank loads with quotas, ' ' at or below the mean to '@' {top - 1:.1%} above it"]
    for row, marks in zip(rows, shade, strict=True):
        name = f"{row[0]}" if len(row) == 1 else f"{row[0]}-{row[-1]}"
        lines.append(f"{name:>11} |{''.join(SHADES[m] for m in marks)}|")
    return lines
