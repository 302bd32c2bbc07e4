"""What `elastic-ep simulate --hours` shows: the text, and a picture of capacity over time beside the pauses of others. Needs matplotlib."""

from __future__ import annotations

from typing import Any

from elastic_ep.cli.plan_plot import check_plot as check_plot
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.sim.capacity.group import HOUR_S, History
from elastic_ep.sim.capacity.setup import Setup


def as_text(found: dict[str, Any]) -> str:
    """Figures, one per line."""
    moved = ", ".join(f"{num / 1e12:.2f} TB from {kind}" for kind, num in found["bytes_moved"].items()) or "none"
    hours_each = 1 / found["failure_rate"] if found["failure_rate"] else float("inf")
    lines = [
        f"{found['ranks']} ranks, {found['slots_per_rank']} slots each, {found['layers']} x {found['experts']} experts, "
        f"{found['hours']:g} hours at one failure per {hours_each:,.0f} GPU-hours, seed {found['seed']}",
        f"failures {found['failures']}, rejoins {found['rejoins']}, experts lost {found['experts_lost']}; bytes moved: {moved}",
        f"capacity {found['mean_capacity']:.4%} on average, {found['lowest_capacity']:.2%} at the lowest",
        _pause_line("a failure stops the group for", found["failure_pause_s"]),
        _pause_line("a rejoin or restore for", found["change_pause_s"]),
        "",
        f"{'pauses of others as published':34}{'paused':>12}{'availability':>14}{'tokens lost':>14}",
        _row("elastic-ep (simulated)", found),
        *(_row(other["name"], other) for other in found["others"]),
        "",
        f"{found['seconds']:.1f} s of computing; a plan took {found['solve_ms']} ms, {found['placed_layers']} layers placed",
    ]
    return "\n".join(lines)


def _pause_line(what: str, spread: dict[str, float] | None) -> str:
    if spread is None:
        return f"{what} nothing: there was none"
    return f"{what} {spread['median']:.2f} s (median), {spread['p99']:.2f} s (p99), {spread['max']:.2f} s (longest)"


def _row(name: str, found: dict[str, Any]) -> str:
    paused = found["paused_s"]
    shown = f"{paused / 60:.1f} min" if paused < 7200 else f"{paused / HOUR_S:.1f} h"
    return f"{name:34}{shown:>12}{found['availability']:>14.5%}{found['tokens_lost_to_pauses']:>14.2e}"


def draw(setup: Setup, history: History, found: dict[str, Any], path: str) -> None:
    """Above, the throughput over time; below, the minutes in which nobody got a token, beside others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1.2, 1))
    marks = [(at / HOUR_S / 24, share) for at, share in sorted(history.capacity) if share > 0]
    marks.append((found["hours"] / 24, marks[-1][1] if marks else 1.0))
    top.step([day for day, _ in marks], [100 * share for _, share in marks], where="post", linewidth=0.8, color="#1f5fa8")
    title = (
        f"{setup.ep_size} ranks, {setup.num_layers} x {setup.num_experts} experts: {found['failures']} failures in {found['hours']:g} hours"
    )
    top.set(title=title, xlabel="day", ylabel="throughput, % of all ranks", xlim=(0, found["hours"] / 24))
    rows = [("elastic-ep (simulated)", found["paused_s"])] + [(o["name"], o["paused_s"]) for o in found["others"]]
    rows.reverse()
    minutes = [max(paused / 60, 0.01) for _, paused in rows]
    bars = bottom.barh([name for name, _ in rows], minutes, color=["#b8b8b8"] * (len(rows) - 1) + ["#1f5fa8"])
    bottom.bar_label(bars, [f"{m:,.1f} min" for m in minutes], padding=3, fontsize=8)
    bottom.set(xscale="log", xlabel="minutes without a token, same failures (log scale)", xlim=(min(minutes) / 2, max(minutes) * 6))
    try:
        figure.savefig(path)
    except OSError as error:
        raise InvalidInputError(f"cannot write {path!r}: {error.strerror}") from error
