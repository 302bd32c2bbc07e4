"""Steps as transactions, seen from outside: what is committed, counted and told, and when a recovery is over."""

from __future__ import annotations

import numpy as np
import pytest

from elastic_ep.brain import events as ev
from elastic_ep.brain.messages import RunStep, StepDone
from elastic_ep.core.recovery import Phase
from tests.brain.harness import World, expected
from tests.brain.test_brain import PROMPTS, check_all, serve_all


def orders(world: World) -> dict[int, RunStep]:
    """The step in flight, as each rank was told."""
    return {rank: message for rank, message in world.inbox if isinstance(message, RunStep)}


def test_a_rank_that_answers_without_a_token_that_it_owes_is_given_up():
    world = World().boot()
    serve_all(world)
    world.settle_until(lambda: sum(any(w.sample for w in order.work) for order in orders(world).values()) > 1)
    told = orders(world)
    liar = next(rank for rank, order in told.items() if any(w.sample for w in order.work))
    before = {request_id: list(tokens) for request_id, tokens in world.received.items()}
    world.inbox = type(world.inbox)(item for item in world.inbox if item[0] != liar)
    world.say(liar, StepDone(1, told[liar].step, (), 1.0))
    world.settle_until(lambda: not world.brain.state.seats[liar].is_alive)
    assert "no token for sequence" in world.brain.state.seats[liar].failure
    assert told[liar].step not in [c.step for c in world.commands if isinstance(c, ev.StepCommitted)]
    assert world.received == before, "nothing of that step was committed, the others' tokens neither"
    world.settle()
    check_all(world)


def test_a_request_that_is_cancelled_in_mid_step_hears_nothing_more():
    world = World().boot()
    world.submit("a", [1, 2], 5)
    world.submit("b", [3], 5)
    world.settle_until(lambda: len(world.received["a"]) == 2)
    world.feed(ev.Cancelled("a"))
    assert world.brain.state.step is not None
    world.settle()
    assert len(world.received["a"]) == 2
    assert world.received["b"] == expected([3], 5)


def test_a_name_that_is_used_again_in_mid_step_starts_from_nothing():
    world = World().boot()
    world.submit("a", [1, 2], 5)
    world.settle_until(lambda: len(world.received["a"]) == 2)
    world.feed(ev.Cancelled("a"))
    world.received["a"] = []
    world.submit("a", [9], 4)
    world.settle()
    assert world.received["a"] == expected([9], 4)


def test_each_token_and_each_request_is_counted_once():
    world = World().boot()
    serve_all(world)
    for _ in range(30):
        world.answer()
    world.kill(1)
    world.settle()
    check_all(world)
    assert world.brain.state.tokens_committed == sum(map(len, world.received.values())) == 10 * len(PROMPTS)
    assert world.brain.state.requests.finished == len(PROMPTS)


def test_what_a_step_asked_of_each_expert_is_recorded():
    world = World(num_experts=8, num_layers=2).boot()
    world.submit("a", [1], 1)
    counts = np.arange(16, dtype="<u4").reshape(2, 8)
    for rank, order in orders(world).items():
        world.say(rank, StepDone(1, order.step, (), 1.0, counts.tobytes() if rank == 3 else None))
    np.testing.assert_array_equal(world.brain.state.load.recent(), counts)


def test_a_recovery_is_over_when_the_first_tokens_are_committed():
    """Not with a step that only computed prompts, and not before or after the step that brings tokens."""
    world = World().boot()
    world.submit("a", [1] * 10, 3)  # three chunks; the third samples
    world.kill(next(rank for rank, order in orders(world).items() if order.work))
    clock = {}
    while world.answer():
        world.now += 1.0
        clock.setdefault(len(world.received["a"]), world.now - 1.0)
    (record,) = [r for r in world.brain.state.recoveries if r.kind == "exited"]
    assert record.resumed == clock[1]
    (line,) = [t for t in world.brain.state.group.history if t.before is Phase.RESUMING and t.epoch == 2]
    assert line.reason == "step 4 committed"


@pytest.mark.parametrize("streams", [4, 2])
def test_streams_that_lost_nothing_do_not_wait_for_the_prompts_of_those_that_moved(streams):
    """Also if a rank has none."""
    world = World().boot()
    names = [f"q{i}" for i in range(streams)]
    for i, name in enumerate(names):
        world.submit(name, [i + 1] * 6, 8)
    world.settle_until(lambda: all(len(world.received[name]) > 2 for name in names))
    running = world.brain.state.requests.running
    moved = next(name for name in names if running[name].home == 1)
    world.kill(1)
    world.settle_until(lambda: world.brain.state.group.phase is Phase.RESUMING and orders(world))
    work = [item for order in orders(world).values() for item in order.work]
    assert [len(item.tokens) for item in work] == [1] * (streams - 1), "the first step has no prompt in it"
    had = {name: len(world.received[name]) for name in names}
    world.settle_until(lambda: world.brain.state.group.phase is Phase.SERVING)
    assert all(len(world.received[name]) == had[name] + (name != moved) for name in names)
    assert any(len(item.tokens) > 1 for order in orders(world).values() for item in order.work), "the second has"
    world.settle()
    for i, name in enumerate(names):
        assert world.received[name] == expected([i + 1] * 6, 8)


def test_commits_name_their_steps_in_order():
    world = World().boot()
    world.submit("a", [1], 3)
    world.settle()
    assert [c.step for c in world.commands if isinstance(c, ev.StepCommitted)] == [1, 2, 3]
