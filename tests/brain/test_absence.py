"""Seats whose host is away."""

from __future__ import annotations

from elastic_ep.brain import events as ev
from elastic_ep.brain.messages import DenseLoaded, Hello
from elastic_ep.brain.seats import SeatState
from elastic_ep.core.recovery import Phase
from tests.brain.harness import World
from tests.brain.test_brain import check_all, serve_all

AWAY = ev.SeatsAbsent((2, 3), "the agent of node b is gone")
BACK = ev.SeatsPresent((2, 3))


def starts(world: World) -> list[tuple[int, int]]:
    return [(c.rank, c.incarnation) for c in world.commands if isinstance(c, ev.StartRank)]


def test_a_host_that_is_away_is_not_restarted_until_it_is_back():
    world = World(restart=True, restart_backoff_s=0.5).boot()
    serve_all(world, 60)
    world.settle_until(lambda: len(world.received["r0"]) > 5)
    world.feed(AWAY)
    state = world.brain.state
    world.settle()
    check_all(world, 60)
    for _ in range(20):
        world.pass_time(100.0)
    assert state.membership.ranks == (0, 1)
    assert starts(world) == []
    assert [state.seats[rank].failed_starts for rank in (2, 3)] == [0, 0]
    world.feed(BACK)
    world.pass_time(0.01)
    world.settle()
    assert starts(world) == [(2, 1), (3, 1)]
    assert state.membership.ranks == (0, 1, 2, 3)
    assert {tuple(sorted(record.ranks)) for record in state.recoveries if record.kind == "agent_lost"} == {(2, 3)}


def test_the_group_boots_without_a_host_that_does_not_come():
    world = World(restart=True)
    for rank in (0, 1):
        world.feed(ev.RankConnected(Hello(rank, 0, 100 + rank, "h", "t", f"unix:/{rank}")))
        world.say(rank, DenseLoaded(0, 1.0))
    assert world.brain.state.group.phase is Phase.BOOTING
    world.feed(AWAY)
    world.settle()
    assert world.brain.state.membership.ranks == (0, 1)
    assert world.brain.state.group.phase in (Phase.RESUMING, Phase.SERVING)
    world.feed(BACK)
    world.pass_time(0.01)
    world.settle()
    assert world.brain.state.membership.ranks == (0, 1, 2, 3)


def test_flaps_do_not_use_up_the_restarts():
    world = World(restart=True, restart_limit=3).boot()
    for _ in range(10):
        world.feed(AWAY)
        world.feed(BACK)
        world.feed(AWAY)
        world.pass_time(1.0)
        world.feed(BACK)
        world.pass_time(0.01)
        world.settle()
        assert world.brain.state.membership.ranks == (0, 1, 2, 3)


def test_all_hosts_away_is_a_wait_not_the_end():
    world = World(restart=True).boot()
    world.feed(ev.SeatsAbsent((0, 1, 2, 3), "gone"))
    state = world.brain.state
    world.pass_time(1000.0)
    assert state.group.phase is Phase.BOOTING
    assert not state.stopped
    world.feed(ev.SeatsPresent((0, 1, 2, 3)))
    world.pass_time(0.01)
    world.settle()
    assert state.membership.ranks == (0, 1, 2, 3)


def test_without_restarts_a_host_that_left_stays_away():
    world = World(restart=False).boot()
    world.feed(AWAY)
    world.feed(BACK)
    world.pass_time(100.0)
    world.settle()
    assert world.brain.state.membership.ranks == (0, 1)
    assert [world.brain.state.seats[rank].state for rank in (2, 3)] == [SeatState.DEAD] * 2
