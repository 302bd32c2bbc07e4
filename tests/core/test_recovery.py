"""The group's life, and the record of one recovery as the status page shows it."""

from __future__ import annotations

import dataclasses

import pytest

from elastic_ep.core.errors import IllegalTransitionError
from elastic_ep.core.recovery import GroupState, Phase, RecoveryRecord, Tier, Trigger


def group(phase: Phase = Phase.BOOTING) -> GroupState:
    return GroupState(phase)


def walk(state: GroupState, *triggers: Trigger) -> list[Phase]:
    return [state.apply(trigger, now=float(i), epoch=1, reason="a reason") for i, trigger in enumerate(triggers)]


def test_from_boot_to_service():
    phases = walk(group(), Trigger.RANKS_READY, Trigger.PLANNED, Trigger.INSTALLED, Trigger.COMMITTED)
    assert phases == [Phase.PLANNING, Phase.INSTALLING, Phase.RESUMING, Phase.SERVING]


@pytest.mark.parametrize("phase", [Phase.SERVING, Phase.RESUMING, Phase.INSTALLING, Phase.PLANNING, Phase.FENCING])
def test_a_failure_in_any_phase_fences_first(phase):
    assert walk(group(phase), Trigger.RANK_FAILED) == [Phase.FENCING]


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.DOWN])
def test_the_last_rank_can_be_lost_in_any_phase(phase):
    assert walk(group(phase), Trigger.NO_RANK_LEFT) == [Phase.DOWN]
    assert walk(group(phase), Trigger.MEMBERS_LOST) == [Phase.BOOTING]


@pytest.mark.parametrize("trigger", Trigger)
def test_nothing_brings_a_group_back_that_is_down(trigger):
    state = group(Phase.DOWN)
    with pytest.raises(IllegalTransitionError, match=rf"^{trigger.value} is not allowed while down \(epoch 3\): because$"):
        state.apply(trigger, now=1.0, epoch=3, reason="because")
    assert state == group(Phase.DOWN), "an illegal event changes nothing"


def test_the_story_is_told_in_order_and_bounded():
    state = group()
    walk(state, Trigger.RANKS_READY, Trigger.PLANNED)
    assert state.story() == [
        "0.0000 epoch 1 booting -> planning (ranks_ready: a reason)",
        "1.0000 epoch 1 planning -> installing (planned: a reason)",
    ]
    walk(state, Trigger.INSTALLED, Trigger.COMMITTED, *[Trigger.RANK_FAILED] * 1000)
    assert len(state.history) == 256, "a server that recovers for months keeps no more"
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.history[0].reason = "another"  # type: ignore[misc]


def test_a_record_as_status_before_and_after_each_mark():
    record = RecoveryRecord("exited", [2], last_sign=10.0, detected=10.0503)
    assert record.as_status() == {
        "epoch": 0,
        "ranks": [2],
        "kind": "exited",
        "tier": 0,
        "detect_ms": 50.3,
        "agree_ms": None,
        "plan_ms": None,
        "move_ms": None,
        "resume_ms": None,
        "stall_ms": None,
        "stage_ms": 0.0,
        "rank_move_ms": 0.0,
        "experts_lost": 0,
        "bytes_moved": {"peer": 0, "host": 0, "checkpoint": 0},
        "reason": "",
    }
    record.epoch, record.tier, record.experts_lost, record.reason = 4, Tier.COVER, 3, "two experts moved"
    record.agreed, record.planned, record.moved, record.resumed = 10.06, 10.065, 10.0851234567, 10.2
    record.stage_ms, record.rank_move_ms = 1.23456, 2.34567
    record.bytes_moved["peer"] = 7
    assert record.as_status() == {
        "epoch": 4,
        "ranks": [2],
        "kind": "exited",
        "tier": 1,
        "detect_ms": 50.3,
        "agree_ms": 9.7,
        "plan_ms": 5.0,
        "move_ms": 20.123,
        "resume_ms": 114.877,
        "stall_ms": 200.0,
        "stage_ms": 1.235,
        "rank_move_ms": 2.346,
        "experts_lost": 3,
        "bytes_moved": {"peer": 7, "host": 0, "checkpoint": 0},
        "reason": "two experts moved",
    }
    assert RecoveryRecord("restore", [], 0.0, 0.0, tier=Tier.REBALANCE).as_status()["tier"] == 2


def test_a_second_failure_starts_the_walk_again_and_keeps_the_first_sign():
    record = RecoveryRecord("exited", [2], last_sign=10.0, detected=10.5)
    record.agreed, record.planned, record.moved = 11.0, 12.0, 13.0
    record.restart(3, "exited")
    record.restart(3, "peers")
    record.restart(2, "peers")
    assert (record.ranks, record.kind) == ([2, 3], "exited+peers")
    status = record.as_status()
    assert status["detect_ms"] == 500.0
    assert [status[name] for name in ("agree_ms", "plan_ms", "move_ms", "resume_ms", "stall_ms")] == [None] * 5


def test_a_planned_change_is_installed_without_fencing():
    assert walk(group(Phase.SERVING), Trigger.CHANGE_STAGED) == [Phase.INSTALLING]


def test_after_fencing_a_plan_is_made_or_refused():
    assert walk(group(Phase.FENCING), Trigger.FENCED, Trigger.TOO_FEW_SLOTS) == [Phase.PLANNING, Phase.REFUSING]


def test_a_group_that_refuses_waits_for_ranks_and_loses_no_more_by_failures():
    phases = walk(group(Phase.REFUSING), Trigger.RANK_FAILED, Trigger.RANKS_READY)
    assert phases == [Phase.REFUSING, Phase.PLANNING]


def test_a_rank_that_fails_while_the_group_boots_is_not_waited_for():
    assert walk(group(), Trigger.RANK_FAILED, Trigger.RANKS_READY) == [Phase.BOOTING, Phase.PLANNING]
