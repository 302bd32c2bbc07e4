"""Ranks that come back and redundancy that is restored, while the others serve."""

from __future__ import annotations

import random

import numpy as np

from elastic_ep.brain import events as ev
from elastic_ep.brain.messages import Install, RunStep, Stage, Staged, StageFailed
from elastic_ep.core.quotas import rank_loads
from elastic_ep.core.recovery import Phase
from tests.brain.harness import World, expected
from tests.brain.test_brain import PROMPTS, check_all, serve_all


def restarting_world(**settings) -> World:
    return World(restart=True, restart_backoff_s=0.5, **settings).boot()


def staging_world() -> World:
    """Under load, rank 2 was killed and its successor is reading its share, and does not get done."""
    world = restarting_world()
    serve_all(world, 60)
    world.kill(2)
    world.settle_until(lambda: len(world.received["r0"]) > 5)
    world.pass_time(0.6)
    world.wedged.add(2)
    world.settle_until(lambda: world.brain.state.change is not None and world.brain.state.change.pending)
    return world


def test_a_killed_rank_rejoins_between_two_steps():
    world = restarting_world()
    serve_all(world, 60)
    world.settle_until(lambda: len(world.received["r0"]) > 5)
    world.kill(2)
    world.settle_until(lambda: len(world.received["r0"]) > 10)
    assert world.brain.state.membership.ranks == (0, 1, 3)
    world.pass_time(0.6)
    world.settle()
    check_all(world, 60)
    state = world.brain.state
    assert state.membership.ranks == (0, 1, 2, 3)
    assert state.seats[2].incarnation == 1
    kinds = [record.kind for record in state.recoveries]
    assert kinds[0] == "exited"
    assert "rejoin" in kinds
    assert (state.contents.experts == state.plan.placement.physical_to_logical_map).all()
    assert (state.contents.experts != -1).all()


def test_nothing_is_said_to_a_rank_in_mid_step_but_to_interrupt_it():
    world = restarting_world()
    serve_all(world, 80)
    world.kill(1)
    world.settle_until(lambda: len(world.received["r0"]) > 3)
    world.pass_time(0.6)
    in_step: set[int] = set()
    orders_in_mid_step = []
    world.commands.clear()
    world.settle()
    for command in world.commands:
        if isinstance(command, ev.StepCommitted):
            in_step.clear()
        if isinstance(command, ev.Send):
            if isinstance(command.message, Stage) and in_step:
                orders_in_mid_step.append(command.rank)
            assert command.rank not in in_step or isinstance(command.message, Install), command
            if isinstance(command.message, RunStep):
                in_step.add(command.rank)
    assert orders_in_mid_step == [1], "who joins has no step to wait for"
    check_all(world, 80)


def test_a_joiner_that_dies_while_it_loads_disturbs_nobody():
    world = restarting_world()
    serve_all(world, 60)
    world.kill(2)
    world.settle_until(lambda: len(world.received["r0"]) > 5)
    world.unstartable.add(2)
    world.pass_time(0.6)
    epoch = world.brain.state.membership.epoch
    world.feed(ev.RankFailed(2, 1, ev.FailureCause.EXITED))
    assert world.brain.state.membership.epoch == epoch
    assert world.brain.state.group.phase in (Phase.SERVING, Phase.RESUMING)
    world.settle()
    check_all(world, 60)


def test_a_joiner_that_dies_while_it_stages_disturbs_nobody():
    world = staging_world()
    epoch = world.brain.state.membership.epoch
    world.kill(2)
    assert world.brain.state.membership.epoch == epoch
    world.wedged.clear()
    world.settle()
    check_all(world, 60)


def test_a_member_that_dies_while_a_change_is_staged():
    world = staging_world()
    world.kill(0)
    world.wedged.clear()
    world.inbox.append((2, Stage(0, (), 0.0)))
    world.settle()
    world.pass_time(2.0)
    world.settle()
    check_all(world, 60)
    assert world.brain.state.membership.ranks == (0, 1, 2, 3)


def test_a_joiner_that_cannot_read_its_share_is_given_up():
    world = restarting_world(restart_limit=1)
    world.kill(2)
    world.settle()
    world.pass_time(0.6)
    world.wedged.add(2)
    world.settle()
    change = world.brain.state.change
    assert change.joiners == (2,)
    world.say(2, StageFailed(change.number, "disk"))
    assert world.brain.state.seats[2].failure == "fatal: disk"
    left_out = [c for c in world.commands if isinstance(c, ev.Publish) and c.kind == "rank_left_out"]
    assert left_out[0].data["reason"].startswith("1 processes in a row failed")


def test_a_crash_loop_backs_off_and_ends():
    world = restarting_world(restart_limit=3)
    world.unstartable.add(1)
    world.kill(1)
    starts = []
    for _ in range(400):
        world.pass_time(0.1)
        seat = world.brain.state.seats[1]
        if seat.state.value == "starting":
            starts.append(world.now)
            world.feed(ev.RankFailed(1, seat.incarnation, ev.FailureCause.EXITED))
    assert len(starts) == 3
    assert starts[2] - starts[1] > starts[1] - starts[0]
    assert any(isinstance(c, ev.Publish) and c.kind == "rank_left_out" for c in world.commands)


def test_a_recovery_is_followed_by_a_restore_of_redundancy():
    """8 experts on 4 x 5 slots: two replicas of each; after a death there is room for it still."""
    world = World(slots_per_rank=6).boot()
    assert world.brain.state.plan.survives["any_ranks"] >= 1
    serve_all(world, 60)
    world.kill(3)
    world.settle()
    check_all(world, 60)
    assert world.brain.state.plan.survives["any_ranks"] >= 1
    assert not world.brain.state.restore_due
    kinds = [record.kind for record in world.brain.state.recoveries]
    assert kinds[0] == "exited"


def test_all_members_die_and_the_group_boots_again():
    world = restarting_world(ep_size=2, slots_per_rank=8)
    serve_all(world, 30)
    world.settle_until(lambda: len(world.received["r0"]) > 5)
    world.kill(0)
    world.kill(1)
    assert world.brain.state.group.phase is Phase.BOOTING
    assert not world.finished
    world.pass_time(1.0)
    world.settle()
    world.pass_time(1.0)
    world.settle()
    check_all(world, 30)
    assert world.brain.state.requests.failed == 0


def test_a_refusing_group_serves_again_when_a_rank_comes_back():
    world = restarting_world(stream=False)
    world.kill(0)
    world.settle()
    world.kill(1)
    world.settle()
    assert world.brain.state.group.phase is Phase.REFUSING
    world.pass_time(0.6)
    world.settle()
    world.pass_time(0.6)
    world.settle()
    assert world.brain.refusal() is None
    serve_all(world)
    world.settle()
    check_all(world)


def test_stale_staged_is_ignored():
    world = restarting_world()
    world.say(1, Staged(99, {}))
    assert world.brain.state.change is None


def test_random_schedules_with_restarts():
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(150):
        world = World(ep_size=rng.randint(2, 5), slots_per_rank=rng.randint(2, 8), restart=True, restart_backoff_s=0.1, restart_limit=10**6)
        world.rng = rng
        world.boot()
        count = rng.randint(5, 40)
        serve_all(world, count)
        kills = rng.randint(1, 12)
        for _ in range(1000):
            if len(world.finished) == len(PROMPTS):
                break
            for _ in range(rng.randint(1, 30)):
                world.answer()
            if kills and rng.random() < 0.3:
                kills -= 1
                alive = [s for s in world.brain.state.seats if s.is_alive]
                if alive:
                    world.kill(rng.choice(alive).rank, rng.choice(list(ev.FailureCause)))
            world.pass_time(rng.choice([0.0, 0.05, 0.3]))
        check_all(world, count)
        assert world.brain.state.requests.failed == 0
        for _ in range(20):
            world.settle()
            world.pass_time(0.5)
        state = world.brain.state
        assert state.membership.ranks == tuple(range(state.membership.ep_size))
        assert (state.contents.experts == state.plan.placement.physical_to_logical_map).all()


def test_background_reading_that_hangs_costs_its_rank():
    world = restarting_world()
    world.kill(2)
    world.settle()
    world.pass_time(0.6)
    world.wedged.add(2)
    world.settle()
    assert world.brain.state.change.pending == {2}
    world.pass_time(30.0)
    assert any("not staged after" in str(c.data) for c in world.commands if isinstance(c, ev.Publish) and c.kind == "rank_failed")


def test_expected_is_not_trivial():
    assert expected([1], 3) != expected([2], 3)


def report_load(world: World, hot: int) -> None:
    """Every rank reports that `hot` was asked for nine times as often as each other expert."""
    shape = (world.settings.num_layers, world.settings.plan.num_experts)
    counts = np.full(shape, 100, dtype="<u4")
    counts[:, hot] = 900
    for _ in range(4):
        world.brain.state.load.add(counts.tobytes(), world.now)


def test_a_skewed_load_is_rebalanced_once():
    world = World(rebalance_interval_s=10.0, load_window_s=1.0).boot()
    state = world.brain.state
    even = state.plan.placement.logical_replica_count.copy()
    serve_all(world, 40)
    world.settle()
    world.pass_time(10.5)
    world.settle()
    assert not state.recoveries, "nothing was recorded: nothing to do"
    report_load(world, 5)
    world.pass_time(10.0)
    world.settle()
    world.pass_time(1.0)
    rounds = len(state.recoveries)
    assert {record.kind for record in state.recoveries} == {"rebalance"}
    count = state.plan.placement.logical_replica_count
    assert (count[:, 5] > even[:, 5]).all()
    assert (count >= 1).all()
    loads = rank_loads(state.load.recent(), state.plan.placement, state.topology, state.plan.quotas)
    assert (loads.mean(axis=1) / loads.max(axis=1) > 0.95).all()
    world.pass_time(25.0)
    world.settle()
    assert len(state.recoveries) == rounds, "the same load again is worth no move"


def test_a_small_gain_is_not_worth_its_moves():
    world = World(rebalance_interval_s=10.0, rebalance_min_gain=50.0).boot()
    report_load(world, 5)
    world.pass_time(11.0)
    world.settle()
    assert not world.brain.state.recoveries
    skipped = [c.data for c in world.commands if isinstance(c, ev.Publish) and c.kind == "rebalance_skipped"]
    assert skipped
    assert skipped[0]["needed"] == 50.0


def test_a_change_in_several_rounds_leaves_no_expert_out():
    """One staging slot per rank: a rejoin takes many rounds, steps run between them, and every expert can be had in each."""
    world = restarting_world(staging_slots=1)
    serve_all(world, 200)
    world.kill(2)
    world.settle_until(lambda: len(world.received["r0"]) > 3)
    world.pass_time(0.6)
    world.settle()
    check_all(world, 200)
    state = world.brain.state
    rounds = [record for record in state.recoveries if record.kind == "rejoin"]
    assert len(rounds) > 2
    assert state.membership.ranks == (0, 1, 2, 3)
    for plan in world.plans:
        missing = set(plan.placement.missing_experts())
        assert missing == set(plan.streamed)
    assert not state.plan.streamed
    assert not state.contents.mismatches(state.plan.placement)


def test_a_source_that_stalls_everyone_costs_no_member():
    """All that read for an optional change are late: the change is put off, and nobody is given up for it."""
    world = World(rebalance_interval_s=5.0).boot()
    report_load(world, 5)
    world.wedged |= {0, 1, 2, 3}
    world.pass_time(5.5)
    state = world.brain.state
    assert state.change is not None
    readers = set(state.change.readers)
    assert len(readers) > 1
    world.pass_time(60.0)
    assert state.membership.ranks == (0, 1, 2, 3)
    failed = [c.data for c in world.commands if isinstance(c, ev.Publish) and c.kind == "change_failed"]
    assert "nobody had read their experts after" in failed[0]["reason"]
    world.wedged.clear()
    world.inbox.clear()
    world.pass_time(60.0)
    world.settle()
    world.pass_time(60.0)
    world.settle()
    assert {record.kind for record in state.recoveries} <= {"rebalance", "restore"}
    assert state.recoveries, "it was tried again"


def test_a_member_that_cannot_stage_puts_the_change_off():
    """No endless loop at full speed, and what the change was for is not forgotten."""
    world = World(rebalance_interval_s=10.0).boot()
    state = world.brain.state
    report_load(world, 5)
    failures = 0
    read = world.read

    def fail_twice(rank: int, message: object) -> None:
        nonlocal failures
        if isinstance(message, Stage) and message.loads and failures < 2:
            failures += 1
            world.reply(rank, StageFailed(message.change, "the disk is gone"))
        else:
            read(rank, message)

    world.read = fail_twice
    world.pass_time(10.1)
    world.settle()
    assert failures >= 1
    changes = state.changes_made
    world.settle()
    assert state.changes_made == changes, "it waits before it tries again"
    for _ in range(8):
        world.pass_time(1.0)
        world.settle()
    assert failures == 2
    assert state.recoveries
    assert (state.plan.placement.logical_replica_count[:, 5] > 1).all()
    assert not state.contents.mismatches(state.plan.placement)
    assert not state.plan.streamed
