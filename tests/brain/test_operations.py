"""The group grows, shrinks and drains ranks on purpose."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from elastic_ep.brain import events as ev
from elastic_ep.brain import operations
from elastic_ep.brain.messages import Install, Stage, StageFailed
from elastic_ep.brain.seats import SeatState
from elastic_ep.brain.state import OperationState
from elastic_ep.core.links import SourceKind
from elastic_ep.core.recovery import Phase
from tests.brain.harness import World
from tests.brain.test_brain import check_all, serve_all


def scale(world: World, size: int, name: str = "s", drain: ev.Drain = "move") -> None:
    request = ev.ScaleRequested(name, size, drain)
    assert operations.refusal(world.brain.state, request) is None
    world.feed(request)
    operation = world.brain.state.operations[name]
    world.settle_until(lambda: not operation.seats_to_add)
    world.pass_time(0.1)


def drain(world: World, rank: int, name: str = "d", how: ev.Drain = "move") -> None:
    request = ev.DrainRequested(name, rank, how)
    assert operations.refusal(world.brain.state, request) is None
    world.feed(request)


def loaded_world(**settings) -> World:
    world = World(restart=True, restart_backoff_s=0.5, **settings).boot()
    serve_all(world, 80)
    world.settle_until(lambda: len(world.received["r0"]) > 3)
    return world


def finish(world: World, count: int = 80) -> None:
    """Let time pass until nothing is left to do, and check every stream."""
    for _ in range(20):
        world.settle()
        world.pass_time(0.1)
    check_all(world, count)


def test_grow_shrink_and_grow_again():
    world = loaded_world()
    state = world.brain.state
    scale(world, 6, "a")
    world.settle_until(lambda: state.operations["a"].state is OperationState.DONE)
    assert state.membership.ranks == (0, 1, 2, 3, 4, 5)
    assert state.topology.ep_size == 6
    assert state.contents.experts.shape[1] == state.topology.num_slots
    scale(world, 3, "b")
    world.settle_until(lambda: state.operations["b"].state is OperationState.DONE)
    assert state.membership.ranks == (0, 1, 2)
    assert [s.state for s in state.seats[3:]] == [SeatState.RETIRED] * 3
    scale(world, 4, "c")
    world.settle_until(lambda: state.operations["c"].state is OperationState.DONE)
    assert state.membership.ranks == (0, 1, 2, 3)
    assert state.seats[3].incarnation == 1
    finish(world)
    assert not state.contents.mismatches(state.plan.placement)


@pytest.mark.parametrize("how", ["move", "finish"])
def test_rank_0_leaves(how):
    world = loaded_world()
    state = world.brain.state
    at_home = [s.request.request_id for s in state.requests.running.values() if s.home == 0]
    assert at_home
    drain(world, 0, how=how)
    world.settle_until(lambda: state.operations["d"].state is OperationState.DONE)
    assert state.membership.ranks == (1, 2, 3)
    done = [name in world.finished for name in at_home]
    assert all(done) if how == "finish" else not any(done)
    finish(world)
    world.pass_time(5.0)
    assert state.seats[0].state is SeatState.RETIRED, "its seat is not filled again"


def test_a_joiner_that_fails_undoes_the_growth():
    world = loaded_world()
    state = world.brain.state
    world.unstartable.add(5)
    scale(world, 6)
    world.settle_until(lambda: state.seats[4].state is SeatState.READY)
    assert state.membership.ranks == (0, 1, 2, 3), "the first waits for the second"
    world.feed(ev.RankFailed(5, 1, ev.FailureCause.EXITED))
    operation = state.operations["s"]
    assert (operation.state, operation.reason.partition(":")[0]) == (OperationState.FAILED, "rank 5 failed before it was a member")
    finish(world)
    assert state.membership.ranks == (0, 1, 2, 3)
    assert [s.state for s in state.seats[4:]] == [SeatState.RETIRED] * 2


def given_up(world: World, rank: int) -> None:
    """The rank dies, and so does every process that is started in its place."""
    world.unstartable.add(rank)
    world.kill(rank)
    seat = world.brain.state.seats[rank]
    for _ in range(400):
        world.settle()
        world.pass_time(0.1)
        if seat.state is SeatState.STARTING:
            world.feed(ev.RankFailed(rank, seat.incarnation, ev.FailureCause.EXITED))
    world.unstartable.remove(rank)
    assert (seat.state, seat.restart_at) == (SeatState.DEAD, None)


def test_scaling_to_the_present_size_fills_a_seat_that_was_given_up():
    world = loaded_world(restart_limit=3)
    state = world.brain.state
    given_up(world, 2)
    scale(world, 4)
    assert state.operations["s"].joiners == (2,)
    assert state.operations["s"].state is OperationState.RUNNING, "it is not done while the seat is empty"
    world.settle_until(lambda: state.operations["s"].state is OperationState.DONE)
    assert state.membership.ranks == (0, 1, 2, 3)
    finish(world)


def test_a_group_with_a_seat_that_cannot_be_filled_can_grow():
    world = loaded_world(restart_limit=3)
    given_up(world, 2)
    world.unstartable.add(2)
    scale(world, 5)
    world.settle_until(lambda: world.brain.state.operations["s"].state is OperationState.DONE)
    assert world.brain.state.membership.ranks == (0, 1, 3, 4)
    finish(world)


def test_a_seat_that_dies_in_every_install_ends_the_scaling(monkeypatch):
    """It is a member by then, so that the operation is not undone."""
    world = loaded_world(restart_limit=3)
    state = world.brain.state
    given_up(world, 2)
    install = world.install

    def die(rank: int, message: Install) -> None:
        if rank == 2:
            world.feed(ev.RankFailed(2, state.seats[2].incarnation, ev.FailureCause.EXITED))
        else:
            install(rank, message)

    monkeypatch.setattr(world, "install", die)
    world.feed(ev.ScaleRequested("s", 4, "move"))
    for _ in range(400):
        world.settle()
        world.pass_time(0.1)
    operation = state.operations["s"]
    assert (operation.state, state.operation) == (OperationState.FAILED, None)
    assert operation.reason.startswith("rank 2: 3 processes in a row failed")
    check_all(world, 80)


def test_a_seat_whose_process_fails_again_fails_the_scaling_and_is_tried_like_any_other():
    world = loaded_world(restart_limit=3)
    state = world.brain.state
    given_up(world, 1)
    scale(world, 4)
    world.settle_until(lambda: state.seats[1].state is SeatState.STARTING)
    world.feed(ev.RankFailed(1, state.seats[1].incarnation, ev.FailureCause.EXITED))
    assert state.operations["s"].state is OperationState.FAILED
    assert state.operations["s"].reason.startswith("rank 1 failed before it was a member")
    assert state.seats[1].state is SeatState.DEAD, "it was there before"
    for _ in range(200):
        world.settle()
        world.pass_time(0.1)
    assert state.membership.ranks == (0, 1, 2, 3)
    finish(world)


def test_a_death_during_a_drain_delays_it_only():
    world = loaded_world()
    state = world.brain.state
    drain(world, 1)
    world.settle_until(lambda: state.change is not None and state.change.pending)
    world.kill(2)
    world.settle_until(lambda: state.operations["d"].state is OperationState.DONE)
    finish(world)
    world.pass_time(1.0)
    finish(world)
    assert state.membership.ranks == (0, 2, 3)


def test_a_leaver_that_dies_first_has_left():
    world = loaded_world()
    drain(world, 1, how="finish")
    world.kill(1)
    world.settle_until(lambda: world.brain.state.operations["d"].state is OperationState.DONE)
    finish(world)
    world.pass_time(5.0)
    assert world.brain.state.seats[1].state is SeatState.RETIRED


def test_refusals_name_the_reason():
    world = loaded_world(stream=False)
    state = world.brain.state
    ask = lambda request: operations.refusal(state, request)  # noqa: E731
    assert "give 1 to 8" in ask(ev.ScaleRequested("x", 9))
    assert "6 slots would be left for 8 experts" in ask(ev.ScaleRequested("x", 2))
    assert "no rank 4" in ask(ev.DrainRequested("x", 4))
    drain(world, 3, "first")
    assert "first is still running (drain of rank 3)" in ask(ev.DrainRequested("x", 2))
    assert ask(ev.DrainRequested("first", 3)) is None, "asking again is no other operation"
    world.feed(ev.DrainRequested("first", 3))
    world.settle_until(lambda: state.operations["first"].state is OperationState.DONE)
    assert "retired already" in ask(ev.DrainRequested("x", 3))
    finish(world)


@pytest.mark.parametrize("seed", range(60))
def test_random_operations_and_failures(seed):
    """Whatever is asked for and whoever dies meanwhile: every stream is whole, and no operation is left hanging."""
    rng = random.Random(seed)
    world = loaded_world()
    world.rng = rng
    state = world.brain.state
    for number in range(12):
        for _ in range(rng.randrange(30)):
            world.answer()
        match rng.randrange(3):
            case 0:
                request = ev.ScaleRequested(f"o{number}", rng.randint(1, 8), rng.choice(["move", "finish"]))
                if operations.refusal(state, request) is None:
                    world.feed(request)
            case 1:
                request = ev.DrainRequested(f"o{number}", rng.randrange(len(state.seats)))
                if operations.refusal(state, request) is None:
                    world.feed(request)
            case 2:
                alive = [s.rank for s in state.seats if s.is_alive]
                if len(alive) > 1:
                    world.kill(rng.choice(alive))
        world.pass_time(rng.choice([0.0, 0.2, 0.6]))
    world.rng = None
    finish(world)
    for _ in range(8):
        world.pass_time(5.0)
        world.settle()
    assert state.operation is None, (seed, state.operation)


def test_a_rank_that_is_dead_already_is_drained_at_once():
    """While the group still waits for another's end, the dead one counts as a member of the old epoch. (Schedules 7053645, 5013467.)"""
    world = loaded_world()
    world.unfenceable.add(2)
    world.kill(2)
    world.kill(1)
    state = world.brain.state
    assert state.seats[1].state is SeatState.DEAD
    assert state.membership.is_active(1)
    drain(world, 1)
    assert state.operations["d"].state is OperationState.DONE
    world.pass_time(3.0)
    finish(world)
    assert state.seats[1].state is SeatState.RETIRED


def test_an_operation_whose_change_always_fails_is_undone():
    world = loaded_world()
    state = world.brain.state
    read = world.read

    def fail(rank: int, message: object) -> None:
        if isinstance(message, Stage) and message.loads:
            world.reply(rank, StageFailed(message.change, "no memory"))
        else:
            read(rank, message)

    world.read = fail
    drain(world, 1)
    for _ in range(40):
        world.settle()
        world.pass_time(1.0)
    operation = state.operations["d"]
    assert operation.state is OperationState.FAILED
    assert "its change failed 5 times; the last: rank" in operation.reason
    assert state.membership.ranks == (0, 1, 2, 3)
    check_all(world, 80)


def test_a_leaver_serves_and_is_read_from_until_the_last_round():
    """With one staging slot a drain takes several rounds. No expert is ever streamed, and what only the leaver holds comes from it."""
    world = loaded_world(stream=False, staging_slots=1, slots_per_rank=3, num_layers=6)
    state = world.brain.state
    before = len(world.plans)
    drain(world, 3)
    world.settle_until(lambda: state.operations["d"].state is OperationState.DONE)
    rounds = world.plans[before:]
    assert len(rounds) > 1
    assert not any(plan.streamed for plan in rounds)
    assert all((plan.placement.physical_to_logical_map[:, 9:] != -1).any() for plan in rounds[:-1])
    assert (rounds[-1].placement.physical_to_logical_map[:, 9:] == -1).all()
    assert any(source.rank == 3 for plan in rounds for source in plan.sources)
    assert not any(source.kind is SourceKind.CHECKPOINT for plan in rounds for source in plan.sources)
    finish(world)


def test_a_growth_that_meets_a_group_without_enough_slots_is_undone():
    world = loaded_world(stream=False)
    state = world.brain.state
    world.feed(ev.ScaleRequested("grow", 6))
    assert state.operations["grow"].seats_to_add == 2
    world.brain.state.settings = replace(state.settings, restart=False)
    for rank in (0, 1):
        world.kill(rank)
    world.settle()
    assert state.group.phase is Phase.REFUSING
    assert state.operations["grow"].state is OperationState.FAILED


def test_an_operation_ends_with_the_server():
    """Nobody is left to wait for it: it is undone, and says why."""
    world = loaded_world()
    drain(world, 1, how="finish")
    world.feed(ev.StopRequested())
    world.settle()
    state = world.brain.state
    assert state.stopped
    operation = state.operations["d"]
    assert (operation.state, operation.reason) == (OperationState.FAILED, "the server stops")
    assert operation.as_status()["seconds"] is None
    check_all(world, 80)
