"""What the simulator found, one named test per bug; docs/found.md tells the stories."""

from __future__ import annotations

from dataclasses import replace

from elastic_ep.brain import steps
from elastic_ep.sim.check import run
from elastic_ep.sim.schedule import Fault, FaultKind, Order, Request, Schedule

PLAIN = Schedule(
    seed=42,
    ep_size=3,
    slots_per_rank=3,
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
    faults=(),
)
LONG = tuple(Request(0, (seed, 2, 3), 30) for seed in range(6))


def keeps_all_promises(schedule: Schedule, seeds: int = 12) -> None:
    for seed in range(seeds):
        outcome = run(replace(schedule, seed=seed))
        assert not outcome.predicate, outcome


IDLE = replace(PLAIN, ep_size=2, slots_per_rank=4, faults=(Fault(90, FaultKind.CRASH, 1), Fault(200, FaultKind.CRASH, 1)))


def test_an_idle_group_restores_redundancy_at_once():
    """The change that follows a recovery began only with the next event, whichever that was: a late word of the dead process."""
    outcome = run(IDLE)
    assert not outcome.predicate, outcome
    assert outcome.epochs > 2


def test_that_an_idle_group_would_be_found_again(monkeypatch):
    real, depth = steps.run_step, []

    def run_step(state, now):
        if not depth:
            depth.append(1)
            real(state, now)
            depth.clear()

    monkeypatch.setattr(steps, "run_step", run_step)
    assert run(IDLE).predicate == "bounded_waits"


def test_a_drained_rank_is_slow_to_end_and_its_requests_do_not_wait_for_it():
    """Its requests moved only once its process was gone; a step planned before that met a home that was no member: KeyError."""
    keeps_all_promises(replace(PLAIN, requests=LONG, orders=(Order(60, True, 1, "move"),)))


def test_the_others_die_while_a_rank_is_being_drained():
    """The drain was tried with no member left to stay: the planner raised, and the controller with it."""
    schedule = replace(PLAIN, ep_size=2, requests=LONG, orders=(Order(60, True, 0, "finish"),))
    for restart in (True, False):
        keeps_all_promises(replace(schedule, restart=restart, faults=(Fault(70, FaultKind.CRASH, 1),)))


def test_a_drain_that_no_longer_leaves_enough_slots():
    """With --when-short refuse no plan was possible, and one was asked for again and again, at full speed, for ever."""
    schedule = replace(PLAIN, slots_per_rank=2, num_experts=4, stream=False, restart=False, requests=LONG[:3])
    keeps_all_promises(replace(schedule, orders=(Order(60, True, 0, "finish"),), faults=(Fault(80, FaultKind.CRASH, 2),)))


def test_a_joiner_fails_in_the_switch_that_lets_it_in():
    """With --restart never the operation ran for ever, and no other could be begun."""
    schedule = replace(PLAIN, ep_size=1, slots_per_rank=1, num_experts=3, restart=False, orders=(Order(60, False, 3, "move"),))
    for kind in (FaultKind.CRASH, FaultKind.UNKILLABLE):
        keeps_all_promises(replace(schedule, faults=(Fault(62, kind, 2, phase="installing"),)))


def test_a_rank_is_drained_that_has_just_died():
    """It was gone, and still counted a member until another failure was fenced: nobody retired it, and the drain ran for ever."""
    faults = (Fault(31, FaultKind.ISOLATE, 2, 3, 2.0), Fault(31, FaultKind.STOP, 1, 3, 1.5, "installing"))
    schedule = replace(PLAIN, ep_size=4, slots_per_rank=2, restart=False, is_local=False, read_s=0.006, faults=faults)
    outcome = run(replace(schedule, seed=7053645, orders=(Order(84, True, 1, "move"),)))
    assert not outcome.predicate, outcome


def test_a_seat_of_a_host_that_is_away_is_not_filled_again():
    """Growing filled a retired seat whose host was away: no process could come, and the operation failed at the boot timeout."""
    nodes = {"nodes": ("a", "b", "b", "b"), "remote": ("b",)}
    orders = (Order(55, False, 3, "move"), Order(78, False, 6, "move"))
    faults = (Fault(9, FaultKind.NODE_DOWN, 3, seconds=5.0),)
    schedule = replace(PLAIN, ep_size=4, slots_per_rank=4, read_s=0.006, requests=LONG[:1], orders=orders, faults=faults, **nodes)
    keeps_all_promises(schedule)


def test_the_last_member_dies_while_another_seat_is_filled_again():
    """While one rank was being fenced another's seat had a new process already: it counted as a member that was left, and the next epoch
    was planned for nobody. The controller failed."""
    faults = (
        Fault(274, FaultKind.CUT_HOST, 1, 0, 1.2),
        Fault(277, FaultKind.UNKILLABLE, 0, seconds=0.01),
        Fault(306, FaultKind.CUT_HOST, 2, 3, 0.3),
    )
    schedule = replace(PLAIN, seed=20009093, read_s=0.006, faults=faults, nodes=("a", "b", "b"), remote=("b",))
    outcome = run(schedule)
    assert not outcome.predicate, outcome
