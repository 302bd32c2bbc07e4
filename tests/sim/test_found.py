"""What the simulator found, one named test per bug; docs/found.md tells the stories."""

from __future__ import annotations

from elastic_ep.brain import steps
from elastic_ep.sim.check import run
from elastic_ep.sim.schedule import Fault, FaultKind, Schedule


def an_idle_group() -> Schedule:
    """Of seed 42 when it was found: the group is idle while one of two ranks dies."""
    return Schedule(
        seed=42,
        ep_size=2,
        slots_per_rank=4,
        num_layers=1,
        num_experts=6,
        stream=True,
        restart=True,
        is_local=True,
        loss=0.0,
        plan_s=0.0,
        staging_slots=1024,
        read_s=0.002,
        rebalance_s=0.0,
        requests=(),
        orders=(),
        faults=(Fault(90, FaultKind.CRASH, 1), Fault(200, FaultKind.CRASH, 1)),
    )


def test_an_idle_group_restores_redundancy_at_once():
    """The change that follows a recovery began only with the next event, whichever that was: here a late word of the dead process."""
    outcome = run(an_idle_group())
    assert not outcome.predicate, outcome
    assert outcome.epochs > 2


def test_that_it_would_be_found_again(monkeypatch):
    real, depth = steps.run_step, []

    def run_step(state, now):
        if not depth:
            depth.append(1)
            real(state, now)
            depth.clear()

    monkeypatch.setattr(steps, "run_step", run_step)
    outcome = run(an_idle_group())
    assert outcome.predicate == "bounded_waits", outcome
