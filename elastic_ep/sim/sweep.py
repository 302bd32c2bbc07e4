"""Many seeds on all cores."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, field

from elastic_ep.sim.check import Outcome, run
from elastic_ep.sim.schedule import draw

CHUNK = 100


@dataclass
class Sweep:
    """What a range of seeds came to. `failures` are the first few."""

    schedules: int = 0
    events: int = 0
    epochs: int = 0
    tokens: int = 0
    virtual_s: float = 0.0
    violations: int = 0
    failures: list[Outcome] = field(default_factory=list)

    def add(self, other: Sweep) -> None:
        self.schedules += other.schedules
        self.events += other.events
        self.epochs += other.epochs
        self.tokens += other.tokens
        self.virtual_s += other.virtual_s
        self.violations += other.violations
        self.failures = sorted([*self.failures, *other.failures], key=lambda o: o.seed)[:10]


@dataclass(frozen=True)
class Part:
    """A chunk of seeds for one worker. ep_size 0 and shape None: drawn."""

    seeds: range
    ep_size: int
    shape: tuple[int, int] | None


def run_part(part: Part) -> Sweep:
    """A world is one large cycle of references: the collector is left out meanwhile, and called once for all of them, without what was
    there before."""
    was_enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        return _run_part(part)
    finally:
        gc.collect()
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def _run_part(part: Part) -> Sweep:
    found = Sweep()
    for seed in part.seeds:
        outcome = run(draw(seed, part.ep_size, part.shape), with_digest=False)
        found.add(
            Sweep(
                1,
                outcome.events,
                outcome.epochs,
                outcome.tokens,
                outcome.virtual_s,
                int(bool(outcome.predicate)),
                [outcome] if outcome.predicate else [],
            )
        )
    return found


def sweep(
    seeds: range,
    *,
    ep_size: int = 0,
    shape: tuple[int, int] | None = None,
    processes: int = 1,
    on_progress: Callable[[Sweep], None] = lambda so_far: None,
) -> Sweep:
    """Run all seeds, `processes` of them at a time."""
    parts = [Part(seeds[i : i + CHUNK], ep_size, shape) for i in range(0, len(seeds), CHUNK)]
    total = Sweep()
    if processes <= 1 or len(parts) <= 1:
        for part in parts:
            total.add(run_part(part))
            on_progress(total)
        return total
    with multiprocessing.get_context("spawn").Pool(min(processes, len(parts))) as pool:
        for found in pool.imap_unordered(run_part, parts):
            total.add(found)
            on_progress(total)
    return total
