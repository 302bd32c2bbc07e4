"""Failures while a placement is being solved: the shell solves in a thread, and the group does not stand still meanwhile."""

from __future__ import annotations

from elastic_ep.brain import events as ev
from elastic_ep.core.recovery import Phase
from tests.brain.harness import World
from tests.brain.test_brain import check_all, serve_all


class SlowPlanner(World):
    """Plans are made when a test says so."""

    held: list[ev.MakePlan] | None = None

    def make_plan(self, command: ev.MakePlan) -> ev.Event:
        if self.held is None:
            return super().make_plan(command)
        self.held.append(command)
        return ev.RankRuns(-1, 0)  # no news

    def finish_plans(self) -> None:
        held, self.held = self.held or [], None
        for command in held:
            self.feed(self.make_plan(command))


def test_a_rank_fails_while_a_plan_is_made():
    world = SlowPlanner()
    world.boot()
    serve_all(world)
    world.held = []
    world.kill(1)
    assert world.brain.state.group.phase is Phase.PLANNING
    world.unfenceable = {2}
    world.kill(2)
    assert world.brain.state.group.phase is Phase.FENCING
    (late,) = world.held
    world.feed(World.make_plan(world, late))
    assert world.brain.state.group.phase is Phase.FENCING, "a plan for members that are no more is not installed"
    world.feed(ev.RankFenced(2, 0))
    assert [command.active for command in world.held] == [(1, 0, 1, 1), (1, 0, 0, 1)]
    world.finish_plans()
    world.settle()
    check_all(world)
    assert world.brain.state.recoveries[0].ranks == [1, 2]
