"""A predicate that never fails proves nothing: one bug is planted for each promise, and its predicate has to find it within a few seeds."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import pytest

from elastic_ep.brain import absence, changes, epochs, members, planner, steps
from elastic_ep.brain.brain import Brain
from elastic_ep.brain.events import FailureCause
from elastic_ep.brain.messages import Installed
from elastic_ep.brain.requests import RequestTable, Sequence
from elastic_ep.brain.state import BrainState, Change
from elastic_ep.core.placement import SlotContents
from elastic_ep.core.recovery import TRANSITIONS, Phase, Trigger
from elastic_ep.sim import machines, planning, tokens
from elastic_ep.sim.check import run
from elastic_ep.sim.schedule import Fault, FaultKind, draw

SEEDS = range(300)


@pytest.fixture(autouse=True)
def _no_plans_from_before(monkeypatch):
    for remembered in ("_plans", "_solved"):
        monkeypatch.setattr(planning, remembered, OrderedDict())


def first_found(seeds=SEEDS, change=lambda schedule: schedule):
    return next((outcome for seed in seeds if (outcome := run(change(draw(seed)))).predicate), None)


def counts_on_lost_kv(monkeypatch):
    def place(self, sequence, rank):
        del self.waiting[sequence.request.request_id]
        sequence.home, sequence.seq_id = rank, self.next_seq_id
        self.next_seq_id += 1
        self.running[sequence.request.request_id] = sequence

    def leave_home(self):
        self.home = None

    monkeypatch.setattr(Sequence, "leave_home", leave_home)
    monkeypatch.setattr(RequestTable, "place", place)


def commits_at_the_first_answer(monkeypatch):
    def on_step_done(state, seat, done, now):
        if state.step is not None and (done.epoch, done.step) == (state.membership.epoch, state.step.number):
            state.step.tokens.update({token.seq_id: token for token in done.tokens})
            if all(work.seq_id in state.step.tokens for items in state.step.work.values() for _, work in items if work.sample):
                steps.commit(state, state.step, now)

    monkeypatch.setattr(steps, "on_step_done", on_step_done)


def believes_the_dead(monkeypatch):
    monkeypatch.setattr(BrainState, "seat", lambda self, rank, incarnation: self.seats[rank])


def forgets_the_deadline_of_a_fence(monkeypatch):
    real = Brain.next_deadline

    def next_deadline(self):
        kept, self.state.fence_deadline = self.state.fence_deadline, None
        due, self.state.fence_deadline = real(self), kept
        return due

    monkeypatch.setattr(Brain, "next_deadline", next_deadline)


def has_no_way_out_of_planning(monkeypatch):
    monkeypatch.delitem(TRANSITIONS, (Phase.INSTALLING, Trigger.RANK_FAILED))


def loses_requests_of_a_dead_home(monkeypatch):
    def evict_rank(self, rank):
        for sequence in [s for s in self.running.values() if s.home == rank]:
            del self.running[sequence.request.request_id]
        return []

    monkeypatch.setattr(RequestTable, "evict_rank", evict_rank)


def promises_one_rank_more(monkeypatch):
    real = planner.survives_object
    monkeypatch.setattr(planner, "survives_object", lambda *a: {**real(*a), "any_ranks": real(*a)["any_ranks"] + 1})


def forgets_who_streams(monkeypatch):
    real = planning._solve

    def solve(*arguments):
        plans, reason = real(*arguments)
        return tuple(replace(plan, streamed={}) for plan in plans), reason

    monkeypatch.setattr(planning, "_solve", solve)


def counts_on_slots_being_overwritten(monkeypatch):
    monkeypatch.setattr(SlotContents, "order", lambda self, layer, slot, epoch: None)


def checks_no_digest(monkeypatch):
    def record_loaded(state, seat, message, now):
        for slot in message.loaded:
            state.digests.setdefault((slot.layer, slot.expert), slot.digest)
            state.contents.record(slot.layer, slot.slot, slot.expert, slot.digest, message.epoch)
        return True

    def read(world, process, load):
        content = tokens.expert_bytes(load.layer, load.expert)
        return content ^ machines.takes_flip(world, process, load.layer, load.expert)

    monkeypatch.setattr(epochs, "record_loaded", record_loaded)
    monkeypatch.setattr(machines, "read", read)


def forgets_to_fill_seats_of_a_host_that_is_back(monkeypatch):
    real = absence.come

    def come(state, event, now):
        real(state, event, now)
        for rank in event.ranks:
            state.seats[rank].restart_at = None

    monkeypatch.setattr(absence, "come", come)


def starts_ranks_on_a_host_that_is_away(monkeypatch):
    def leave(state, event, now):
        for rank in event.ranks:
            members.fail(state, rank, FailureCause.AGENT_LOST, event.reason, now)
            state.seats[rank].absent = event.reason

    monkeypatch.setattr(absence, "leave", leave)


def waits_for_a_host_that_does_not_come(monkeypatch):
    def leave(state, event, now):
        for rank in event.ranks:
            state.seats[rank].absent = event.reason

    monkeypatch.setattr(absence, "leave", leave)


def believes_a_host_that_is_away(monkeypatch):
    """What its ranks said before they were given up comes when the cut is healed, and is taken in."""

    def seat(self, rank, incarnation):
        found = self.seats[rank]
        return found if found.incarnation == incarnation and (found.is_alive or found.absent) else None

    monkeypatch.setattr(BrainState, "seat", seat)


def says_that_any_node_may_go(monkeypatch):
    real = planner.survives_object
    monkeypatch.setattr(planner, "survives_object", lambda *a: {**real(*a), "any_node": True})


def takes_the_copy_unseen(monkeypatch):
    """Bytes of the host's copy are taken as they are, and their digest is said to be the one that was wanted."""

    def record_loaded(state, seat, message, now):
        for slot in message.loaded:
            state.digests.setdefault((slot.layer, slot.expert), slot.digest)
            state.contents.record(slot.layer, slot.slot, slot.expert, slot.digest, message.epoch)
        return True

    real = machines._from_backup
    monkeypatch.setattr(epochs, "record_loaded", record_loaded)
    monkeypatch.setattr(
        machines, "read", lambda world, process, load: (real(world, process, world.machine_of(process.rank), load) or (right(load),))[0]
    )


def right(load):
    return tokens.expert_bytes(load.layer, load.expert)


def tries_again_at_once(monkeypatch):
    real = changes.postpone

    def postpone(state, reason, now):
        real(state, reason, now)
        state.changes_wait_until = None

    monkeypatch.setattr(changes, "postpone", postpone)


def counts_a_failed_read_as_done(monkeypatch):
    """A rank that could not read an expert is taken at its word for all that was ordered."""

    def on_install_failed(state, seat, message, now):
        if message.error:
            epochs.on_installed(state, seat, Installed(message.epoch, message.loaded, {}, 0.0), now)

    monkeypatch.setattr(epochs, "on_install_failed", on_install_failed)


def leaves_before_the_others_have_its_experts(monkeypatch):
    """A drained rank goes with the first round of its change."""
    monkeypatch.setattr(Change, "members", property(lambda self: self.active))


def with_hosts(schedule):
    """Four ranks on two hosts, one of them another's, that is cut off, goes down, or loses its agent."""
    kind = (FaultKind.CUT_HOST, FaultKind.NODE_DOWN, FaultKind.AGENT_DIES)[schedule.seed % 3]
    fault = Fault(20 + schedule.seed % 150, kind, 2, seconds=(0.3, 5.0)[schedule.seed % 2])
    shape = {"ep_size": 4, "nodes": ("a", "a", "b", "b"), "remote": ("b",), "restart": True, "stream": True}
    return replace(schedule, faults=(fault, *schedule.faults), late_s=(0.01, 1.6)[schedule.seed % 2], **shape)


def with_copies(schedule):
    faults = tuple(Fault(100 + 30 * i, kind, 0, seconds=0.1) for i, kind in enumerate((FaultKind.FLIP_BACKUP, FaultKind.CRASH) * 2))
    return replace(schedule, has_backup=True, restart=True, faults=faults)


def with_failing_disks(schedule):
    """Fewer slots than it takes to keep two of each, so that ranks read from the disk."""
    faults = (Fault(90, FaultKind.CRASH, 1), *(Fault(91, FaultKind.DISK_FAILS, rank, seconds=2.0) for rank in range(schedule.ep_size)))
    slots = -(-schedule.num_experts // max(1, schedule.ep_size - 1))
    return replace(schedule, restart=True, has_backup=False, slots_per_rank=slots, faults=faults)


def with_flips(schedule):
    return replace(schedule, faults=(*(Fault(5, FaultKind.FLIP_READ, rank) for rank in range(schedule.ep_size)), *schedule.faults))


def losing_two_while_loading(schedule):
    """Ranks with a few slots, one more failure while the first one's experts are being loaded."""
    faults = (Fault(60 + schedule.seed % 60, FaultKind.CRASH, 4), Fault(61, FaultKind.CRASH, schedule.seed % 4, phase="installing"))
    shape = {"ep_size": 5, "slots_per_rank": 3, "num_layers": 2, "num_experts": 11, "restart": False, "stream": True, "is_local": True}
    shape |= {"nodes": (), "remote": (), "spread": "rank"}
    return replace(schedule, faults=faults, plan_s=0.0, read_s=0.004, **shape)


CHANGES = {
    "checks_no_digest": with_flips,
    "counts_on_slots_being_overwritten": losing_two_while_loading,
    "forgets_to_fill_seats_of_a_host_that_is_back": with_hosts,
    "starts_ranks_on_a_host_that_is_away": with_hosts,
    "waits_for_a_host_that_does_not_come": with_hosts,
    "believes_a_host_that_is_away": with_hosts,
    "takes_the_copy_unseen": with_copies,
    "tries_again_at_once": with_failing_disks,
    "counts_a_failed_read_as_done": with_failing_disks,
}
PLANTED = [
    (1, "same_tokens", counts_on_lost_kv),
    (2, "exactly_once", commits_at_the_first_answer),
    (3, "one_epoch", believes_the_dead),
    (4, "bounded_waits", forgets_the_deadline_of_a_fence),
    (5, "any_rank_may_die", has_no_way_out_of_planning),
    (5, "any_rank_may_die", loses_requests_of_a_dead_home),
    (6, "declared_survivability", promises_one_rank_more),
    (7, "right_or_refused", forgets_who_streams),
    (7, "any_rank_may_die", counts_on_slots_being_overwritten),
    (8, "verified_bytes", checks_no_digest),
    (3, "any_rank_may_die", believes_a_host_that_is_away),
    (4, "bounded_waits", forgets_to_fill_seats_of_a_host_that_is_back),
    (4, "bounded_waits", starts_ranks_on_a_host_that_is_away),
    (4, "bounded_waits", waits_for_a_host_that_does_not_come),
    (4, "bounded_waits", tries_again_at_once),
    (5, "any_rank_may_die", counts_a_failed_read_as_done),
    (6, "declared_survivability", says_that_any_node_may_go),
    (7, "right_or_refused", leaves_before_the_others_have_its_experts),
    (8, "verified_bytes", takes_the_copy_unseen),
]


@pytest.mark.parametrize(("promise", "predicate", "plant"), PLANTED, ids=[plant.__name__ for *_, plant in PLANTED])
def test_a_planted_bug_is_found(promise, predicate, plant, monkeypatch):
    plant(monkeypatch)
    found = first_found(change=CHANGES.get(plant.__name__, lambda schedule: schedule))
    assert found is not None, "no seed found it"
    print("seed", found.seed, found.what)
    assert found.predicate == predicate, found.what
