"""Run a schedule, ask the predicates after every event, and tell how it went."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from elastic_ep.sim import predicates
from elastic_ep.sim.predicates import Violation
from elastic_ep.sim.schedule import Schedule
from elastic_ep.sim.world import LivelockError, World

PATIENCE_S = 60.0
MAX_EVENTS = 60_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run went.

    Attributes:
        digest: hash of the trace.
        predicate: the one that was broken, empty if none; `what` says how.
        epochs, tokens: what the run came to.
    """

    seed: int
    digest: str
    predicate: str
    what: str
    events: int
    virtual_s: float
    epochs: int
    tokens: int
    trace: tuple[str, ...] = ()


def run(schedule: Schedule, *, with_trace: bool = False, with_digest: bool = True) -> Outcome:
    """One run, from the start of its processes until all has ended and settled or a promise is broken. Without `with_digest` no trace is
    kept, which is faster; a failure is run again for its hash."""
    predicate, what = "", ""
    world = World(schedule, predicates.check, with_notes=with_trace or with_digest)
    try:
        drive(world)
    except Violation as violation:
        predicate, what = violation.predicate, violation.what
    except LivelockError as error:
        predicate, what = "bounded_waits", str(error)
    except Exception as error:
        predicate, what = "any_rank_may_die", f"the controller failed: {type(error).__name__}: {error}"
        if with_trace:
            what += "\n" + traceback.format_exc()
    if predicate and not world.timeline.with_notes:
        return run(schedule)
    timeline, state = world.timeline, world.brain.state
    trace = tuple(timeline.trace()) if with_trace else ()
    outcome = Outcome(
        schedule.seed,
        timeline.digest() if timeline.with_notes else "",
        predicate,
        what,
        timeline.happened,
        timeline.now,
        state.membership.epoch,
        state.tokens_committed,
        trace,
    )
    world.close()
    return outcome


def drive(world: World) -> None:
    """Until it is over, or until it should be. Raises Violation, or whatever the brain raised."""
    timeline, healed_at = world.timeline, None
    while timeline.happened < MAX_EVENTS and world.step() and world.stopped is None:
        if not world.is_past_schedule:
            continue
        if healed_at is None:
            healed_at = timeline.now
        if world.is_over or timeline.now > healed_at + PATIENCE_S:
            break
    predicates.check_end(world, PATIENCE_S)
