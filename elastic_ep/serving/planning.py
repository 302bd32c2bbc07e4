"""Answers to MakePlan: the planner's, or why there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable

from elastic_ep.brain import events as ev
from elastic_ep.brain import planner
from elastic_ep.brain.state import BrainState
from elastic_ep.core.errors import InsufficientSlotsError

log = logging.getLogger(__name__)


def planning(command: ev.MakePlan, settings: planner.PlanSettings, state: BrainState, backups: planner.Backups) -> Callable[[], ev.Planned]:
    """A call that computes the answer, in any thread: what it needs of the state is taken now.

    Args:
        backups: what is in hosts' memory.
    """
    arguments = (settings, state.topology, command.active, state.contents.experts.copy(), state.load.recent(), backups)
    if command.change is None:
        return lambda: _planned(command, lambda: (planner.plan(*arguments),))
    return lambda: _planned(command, lambda: planner.plan_change(*arguments, leaving=command.leaving))


def _planned(command: ev.MakePlan, solve: Callable[[], tuple[ev.GroupPlan, ...]]) -> ev.Planned:
    try:
        first, *then = solve()
        return ev.Planned(command.epoch, first, change=command.change, then=tuple(then))
    except InsufficientSlotsError as error:
        return ev.Planned(command.epoch, None, str(error), command.change)
    except Exception as error:
        if command.change is None:
            raise
        log.exception("a change could not be planned; it is put off")
        return ev.Planned(command.epoch, None, f"{type(error).__name__}: {error}", command.change)
