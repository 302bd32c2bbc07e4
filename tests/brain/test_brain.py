"""The brain: steps as transactions, failures in every phase, tokens exactly once and the same."""

from __future__ import annotations

import random

import pytest

from elastic_ep.brain import events as ev
from elastic_ep.brain.events import FailureCause
from elastic_ep.brain.messages import (
    DenseLoaded,
    Hello,
    Install,
    Installed,
    InstallFailed,
    LoadedSlot,
    RankFatal,
    RunStep,
    Shutdown,
    StepDone,
    StepFailed,
)
from elastic_ep.brain.scheduler import SchedulerLimits
from elastic_ep.brain.seats import SeatState
from elastic_ep.brain.verdict import judge
from elastic_ep.core.recovery import Phase, Tier
from tests.brain.harness import World, expected

PROMPTS = {f"r{i}": [i + 1] * (3 + 5 * i % 11) for i in range(6)}


def serve_all(world: World, count: int = 10) -> None:
    for request_id, prompt in PROMPTS.items():
        world.submit(request_id, prompt, count)


def check_all(world: World, count: int = 10) -> None:
    for request_id, prompt in PROMPTS.items():
        assert world.received[request_id] == expected(prompt, count), request_id
        assert world.finished[request_id] == "length"


def test_boot_installs_every_expert_once_all_ranks_are_ready():
    world = World().boot()
    assert world.brain.state.group.phase is Phase.SERVING
    assert world.brain.state.membership.epoch == 1
    assert not world.plans[-1].placement.missing_experts()
    assert (world.brain.state.contents.experts == world.plans[-1].placement.physical_to_logical_map).all()


def test_requests_are_served_in_chunks_beside_decodes():
    world = World().boot()
    serve_all(world)
    world.settle()
    check_all(world)
    assert world.brain.state.requests.finished == len(PROMPTS)
    assert world.brain.state.step is None


def test_kv_is_released_on_the_home_rank():
    world = World().boot()
    serve_all(world)
    world.settle()
    world.submit("again", [1, 2], 1)  # releases travel with the next step
    world.settle()
    assert sum(len(kv) for kv in world.kv.values()) <= 1


def test_end_of_sequence_stops():
    world = World().boot()
    eos = expected([5, 6], 4)[3]
    world.submit("a", [5, 6], 100, frozenset([eos]))
    world.settle()
    assert world.received["a"] == expected([5, 6], 4)
    assert world.finished["a"] == "stop"


@pytest.mark.parametrize("cause", [FailureCause.EXITED, FailureCause.STOPPED, FailureCause.CHANNEL_CLOSED])
@pytest.mark.parametrize("after", range(0, 40, 3))
def test_one_rank_fails_after_any_number_of_answers(cause, after):
    world = World().boot()
    serve_all(world)
    for _ in range(after):
        world.answer()
    world.kill(after % 4, cause)
    world.settle()
    check_all(world)
    assert world.brain.state.requests.failed == 0
    assert [list(r.ranks) for r in world.brain.state.recoveries if r.tier is not Tier.REBALANCE] == [[after % 4]]


def test_failures_until_one_rank_is_left():
    world = World(slots_per_rank=8).boot()
    serve_all(world, 40)
    for rank in (0, 2, 3):
        for _ in range(9):
            world.answer()
        world.kill(rank)
    world.settle()
    check_all(world, 40)
    assert world.brain.state.membership.ranks == (1,)


def test_second_failure_while_installing_keeps_what_was_loaded():
    world = World(num_layers=8).boot()
    serve_all(world)
    world.inbox.clear()
    world.kill(1)
    assert world.brain.state.plan.loads
    before = world.brain.state.contents.experts.copy()
    while (world.brain.state.contents.experts == before).all():
        world.answer()
    (who,) = {int(slot) // 3 for _, slot in zip(*(world.brain.state.contents.experts != before).nonzero(), strict=True)}
    world.kill(3 if who != 3 else 2)
    orders = [order for rank, m in world.inbox if isinstance(m, Install) and m.epoch == 3 for order in m.loads]
    held = world.brain.state.contents.experts
    assert not [order for order in orders if held[order.layer, order.slot] == order.expert], "loaded already"
    world.settle()
    check_all(world)
    record = world.brain.state.recoveries[0]
    assert record.ranks == [1, 3 if who != 3 else 2]
    assert record.epoch == 3


def test_failure_while_fencing_waits_for_both():
    world = World().boot()
    serve_all(world)
    world.unfenceable = {1, 2}
    world.kill(1)
    world.kill(2)
    assert world.brain.state.group.phase is Phase.FENCING
    world.feed(ev.RankFenced(1, 0))
    assert world.brain.state.group.phase is Phase.FENCING
    world.feed(ev.RankFenced(2, 0))
    world.settle()
    check_all(world)


def test_a_process_that_cannot_be_killed_is_shut_out_by_its_epoch():
    world = World().boot()
    serve_all(world)
    world.unfenceable = {1}
    world.kill(1)
    world.settle()
    assert world.brain.state.group.phase is Phase.FENCING
    world.pass_time(3.0)
    world.settle()
    check_all(world)
    world.say(1, StepDone(1, 1, (), 1.0))  # it wakes up and speaks: nothing changes
    assert world.brain.state.membership.ranks == (0, 2, 3)


def test_a_step_that_saw_a_fault_commits_nothing():
    world = World().boot()
    world.submit("a", [1, 2, 3], 5)
    first = world.brain.state.step
    ranks = [rank for rank, message in world.inbox if isinstance(message, RunStep)]
    for _ in ranks[:-1]:
        world.answer()
    assert world.received["a"] == []
    world.kill(ranks[-1])
    assert world.brain.state.step is None
    world.say(ranks[0], StepDone(1, first.number, (), 1.0))
    world.settle()
    assert world.received["a"] == expected([1, 2, 3], 5)


def test_stale_answers_are_ignored():
    world = World().boot()
    world.submit("a", [1], 3)
    world.say(2, StepFailed(0, 1, {3: "closed"}))
    world.say(2, StepFailed(1, 99, {3: "closed"}))
    world.settle()
    assert world.brain.state.membership.epoch == 1


def test_peers_accuse_a_rank_that_still_beats():
    world = World().boot()
    serve_all(world)
    world.mute.add(2)
    step = world.brain.state.step
    for rank in (0, 1, 3):
        world.say(rank, StepFailed(1, step.number, {2: "deadline"}))
    assert world.brain.state.seats[2].failure.startswith("peers")
    world.settle()
    check_all(world)


def test_one_accusation_waits_for_the_window():
    world = World().boot()
    serve_all(world)
    world.inbox.clear()
    world.say(0, StepFailed(1, world.brain.state.step.number, {2: "closed"}))
    assert world.brain.state.group.phase is Phase.SERVING
    world.pass_time(0.03)
    assert not world.brain.state.seats[2].is_alive
    world.settle()
    check_all(world)


def test_accusation_of_a_dead_rank_is_explained():
    world = World().boot()
    serve_all(world)
    world.inbox.clear()
    number = world.brain.state.step.number
    world.kill(2)
    world.say(0, StepFailed(1, number, {2: "closed"}))
    world.settle()
    check_all(world)
    assert world.brain.state.membership.ranks == (0, 1, 3)


def test_wedged_after_its_last_exchange():
    world = World().boot()
    serve_all(world)
    world.wedged.add(1)
    world.settle()
    world.pass_time(9.0)
    assert world.brain.state.seats[1].is_alive
    world.pass_time(2.0)
    assert world.brain.state.seats[1].failure == "wedged: step 2 not done after 10.0 s"
    world.settle()
    check_all(world)


def test_wedged_while_installing():
    world = World().boot()
    serve_all(world)
    world.wedged.add(2)
    world.kill(0)
    world.settle()
    world.pass_time(11.0)
    assert world.brain.state.seats[2].failure.startswith("wedged: install 2 not done")
    world.settle()
    check_all(world)


def test_a_group_that_is_slow_as_a_whole_is_given_time():
    world = World().boot()
    world.submit("a", [1], 2)
    held, world.inbox = list(world.inbox), type(world.inbox)()
    world.pass_time(25.0)
    assert world.brain.state.membership.epoch == 1
    world.inbox.extend(held)
    world.settle()
    assert world.received["a"] == expected([1], 2)


def test_silence_is_probed_before_it_is_death():
    world = World().boot()
    world.mute.add(1)
    world.pass_time(1.0)
    assert [c for c in world.commands if isinstance(c, ev.Probe)] == [ev.Probe(1, 0)]
    assert world.brain.state.seats[1].is_alive
    world.feed(ev.RankRuns(1, 0))
    world.pass_time(1.0)
    world.feed(ev.RankFailed(1, 0, FailureCause.HEARTBEAT, "silent"))
    world.settle()
    assert world.brain.state.membership.ranks == (0, 2, 3)


def test_idle_death_recovers_without_a_step():
    world = World().boot()
    world.kill(0)
    world.settle()
    assert world.brain.state.group.phase is Phase.SERVING
    record = world.brain.state.recoveries[0]
    assert record.resumed is not None
    serve_all(world)
    world.settle()
    check_all(world)


def test_tier_mask_when_every_expert_has_a_replica():
    world = World(ep_size=2, slots_per_rank=8).boot()
    world.submit("a", [1], 5)
    world.kill(1)
    world.settle()
    record = world.brain.state.recoveries[0]
    assert record.tier is Tier.MASK
    assert record.experts_lost == 0
    assert record.bytes_moved == {"peer": 0, "host": 0, "checkpoint": 0}


def test_phases_add_up_to_the_stall():
    world = World().boot()
    serve_all(world)
    world.now = 1.0
    world.unfenceable = {0}
    world.kill(0)
    world.now = 1.25
    world.feed(ev.RankFenced(0, 0))
    world.now = 1.5
    world.settle()
    status = world.brain.state.recoveries[0].as_status()
    phases = [status[k] for k in ("detect_ms", "agree_ms", "plan_ms", "move_ms", "resume_ms")]
    assert status["stall_ms"] == pytest.approx(sum(phases))
    assert status["agree_ms"] == pytest.approx(250)


def test_too_few_slots_streams_the_rest():
    world = World().boot()
    serve_all(world)
    world.kill(0)
    world.settle()
    world.kill(1)
    world.settle()
    check_all(world)
    plan = world.brain.state.plan
    assert len(plan.streamed) == 2 * (8 - 6)
    assert set(plan.streamed.values()) <= {2, 3}


def test_too_few_slots_refuses_with_the_numbers():
    world = World(stream=False).boot()
    serve_all(world)
    world.kill(0)
    world.settle()
    for request_id, prompt in PROMPTS.items():
        world.submit(request_id + "b", prompt, 10)
    world.kill(1)
    world.settle()
    assert world.brain.state.group.phase is Phase.REFUSING
    kind, reason = world.brain.refusal()
    assert kind == "unavailable"
    assert "6 live slots cannot hold 8 experts" in reason
    assert all(world.finished[r + "b"] in ("error", "length") for r in PROMPTS)
    world.kill(2)  # more may fail; the reason stands


def test_last_rank_dies():
    world = World(ep_size=1, slots_per_rank=8).boot()
    world.submit("a", [1], 5)
    world.kill(0)
    assert world.brain.state.group.phase is Phase.DOWN
    assert world.finished["a"] == "error"
    (stopped,) = [c for c in world.commands if isinstance(c, ev.Stopped)]
    assert "rank 0" in stopped.error


def test_a_rank_dies_while_starting():
    world = World()
    for rank in range(4):
        world.feed(ev.RankConnected(Hello(rank, 0, 1, "h", "t", "")))
    world.kill(2)
    for rank in (0, 1, 3):
        world.say(rank, DenseLoaded(0, 1.0))
    world.settle()
    assert world.brain.state.membership.ranks == (0, 1, 3)
    serve_all(world)
    world.settle()
    check_all(world)


def test_a_rank_that_reads_other_dense_weights_at_start_stops_the_server():
    world = World()
    for rank in (0, 1):
        world.feed(ev.RankConnected(Hello(rank, 0, 1, "h", "t", "")))
        world.say(rank, DenseLoaded(10 + rank, 1.0))
    (stopped,) = [c for c in world.commands if isinstance(c, ev.Stopped)]
    assert "of digest 000000000000000b, the group began with 000000000000000a: the checkpoint has changed" in stopped.error


def test_a_replacement_that_reads_other_dense_weights_never_joins():
    world = World(restart=True, restart_backoff_s=0.1).boot()
    serve_all(world)
    world.unstartable = {2}
    world.kill(2)
    world.pass_time(0.2)
    for digest, state in ((7, SeatState.DEAD), (0, SeatState.READY)):
        seat = world.brain.state.seats[2]
        world.pass_time(0.5)
        world.feed(ev.RankConnected(Hello(2, seat.incarnation, 1, "h", "t", "")))
        world.say(2, DenseLoaded(digest, 1.0))
        assert seat.state is state, seat
        if digest:
            assert "the checkpoint has changed since; restore it, or restart the server" in seat.failure
            assert ev.Fence(2, seat.incarnation, seat.failure) in world.commands
            world.settle()
            assert world.brain.state.membership.ranks == (0, 1, 3)
    check_all(world)


def test_a_bad_checkpoint_at_start_stops_the_server():
    world = World()
    world.feed(ev.RankConnected(Hello(0, 0, 1, "h", "t", "")))
    world.say(0, RankFatal("tensor x is truncated"))
    assert ev.Stopped("tensor x is truncated") in world.commands


def test_a_fatal_error_later_costs_one_rank():
    world = World().boot()
    serve_all(world)
    world.mute.add(1)
    world.say(1, RankFatal("slot holds another expert"))
    world.settle()
    check_all(world)
    assert world.brain.state.membership.ranks == (0, 2, 3)


def test_boot_timeout_goes_on_without_the_missing():
    world = World(boot_timeout_s=5.0)
    for rank in (0, 1, 2):
        world.feed(ev.RankConnected(Hello(rank, 0, 1, "h", "t", "")))
        world.say(rank, DenseLoaded(0, 1.0))
    world.mute.add(3)
    world.pass_time(6.0)
    world.settle()
    assert world.brain.state.membership.ranks == (0, 1, 2)


def test_unreachable_peer_during_install():
    world = World().boot()
    serve_all(world)
    world.kill(0)
    epoch = world.brain.state.membership.epoch
    world.inbox.clear()
    for rank in (1, 2):
        world.say(rank, InstallFailed(epoch, (), {3: "deadline"}, ""))
    assert not world.brain.state.seats[3].is_alive
    world.settle()
    check_all(world)


def test_cancel_releases_and_counts():
    world = World().boot()
    serve_all(world, 50)
    for _ in range(20):
        world.answer()
    world.feed(ev.Cancelled("r1"))
    world.settle()
    assert world.brain.state.requests.cancelled == 1
    assert "r1" not in world.finished
    assert world.received["r2"] == expected(PROMPTS["r2"], 50)


def test_a_request_that_ends_at_a_stop_string_has_finished():
    world = World().boot()
    serve_all(world, 50)
    world.settle_until(lambda: len(world.received["r1"]) > 3)
    world.feed(ev.Cancelled("r1", is_done=True))
    world.settle()
    requests = world.brain.state.requests
    assert (requests.cancelled, requests.finished) == (0, len(PROMPTS))


def test_releases_of_a_void_step_are_sent_again():
    world = World().boot()
    world.submit("short", [1], 1)
    world.submit("long", [2], 30)
    world.settle_until(lambda: "short" in world.finished)
    home = next(rank for rank, kv in world.kv.items() if 0 in kv)
    other = next(r for r in range(4) if r not in (home, world.brain.state.requests.running["long"].home))
    world.inbox.clear()  # the step that carries the release never arrives
    world.kill(other)
    world.settle()
    assert 0 not in world.kv[home]


def test_cancel_of_an_unknown_request_is_nothing():
    world = World().boot()
    world.feed(ev.Cancelled("nobody"))
    assert world.brain.state.requests.cancelled == 0


def test_waiting_limit():
    world = World(max_waiting=2).boot()
    for i in range(3):
        assert world.brain.refusal() is None
        world.submit(f"x{i}", [1], 11)
    assert world.brain.refusal() == ("queue_full", "2 requests are waiting, the limit is 2")
    world.settle()
    assert len(world.finished) == 3
    assert world.brain.refusal() is None


def test_graceful_stop_finishes_what_runs():
    world = World().boot()
    serve_all(world)
    world.feed(ev.StopRequested())
    assert world.brain.refusal() == ("unavailable", "the server is stopping")
    world.settle()
    check_all(world)
    assert [m for c in world.commands if isinstance(c, ev.Send) and isinstance(m := c.message, Shutdown)]
    assert isinstance(world.commands[-1], ev.Stopped)


def test_moved_requests_keep_their_place_in_the_queue():
    world = World(ep_size=2, slots_per_rank=8, limits=SchedulerLimits(kv_tokens=40, max_sequences=2)).boot()
    for i in range(6):
        world.submit(f"q{i}", [i + 1] * 4, 8)
    for _ in range(6):
        world.answer()
    world.kill(0)
    waiting = list(world.brain.state.requests.waiting)
    assert waiting == sorted(waiting)
    assert len(waiting) > 2
    world.settle()
    for i in range(6):
        assert world.received[f"q{i}"] == expected([i + 1] * 4, 8)


def test_random_schedules_of_failures():
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(150):
        world = World(ep_size=rng.randint(2, 5), slots_per_rank=rng.randint(2, 8), max_waiting=100)
        kills = rng.sample(range(world.settings.topology.ep_size), world.settings.topology.ep_size - 1)
        moments = sorted(rng.randint(0, 120) for _ in kills)
        world.unfenceable = {r for r in kills if rng.random() < 0.2}
        world.rng = rng
        world.boot()
        count = rng.randint(1, 20)
        serve_all(world, count)
        for tick in range(121):
            world.answer()
            while moments and moments[0] == tick:
                moments.pop(0)
                world.kill(kills.pop(), rng.choice(list(FailureCause)))
        for _ in range(20):
            world.settle()
            world.pass_time(0.5)
        check_all(world, count)


def test_install_names_only_members_and_own_slots():
    world = World().boot()
    world.commands.clear()
    world.kill(1)
    installs = [(c.rank, c.message) for c in world.commands if isinstance(c, ev.Send) and isinstance(c.message, Install)]
    assert [rank for rank, _ in installs] == [0, 2, 3]
    for rank, message in installs:
        assert set(message.peers) == {0, 2, 3}
        assert all(order.slot // 3 == rank for order in message.loads)


def test_a_copy_with_another_digest_is_refused():
    world = World().boot()
    serve_all(world)
    world.inbox.clear()
    world.kill(1)
    rank, install = next((r, m) for r, m in world.inbox if isinstance(m, Install) and m.loads)
    loaded = [LoadedSlot(order.layer, order.slot, order.expert, 8) for order in install.loads]
    world.mute.add(rank)
    world.say(rank, Installed(install.epoch, tuple(loaded), {}, 0.1))
    assert f"fatal: layer {loaded[0].layer} expert {loaded[0].expert}: digest" in world.brain.state.seats[rank].failure
    assert world.brain.state.contents.experts[loaded[0].layer, loaded[0].slot] == -1
    world.settle()
    check_all(world)


def test_a_failure_in_the_middle_of_an_install_forgets_what_is_being_overwritten():
    """Slots that an Install overwrites hold nothing known until it is reported: the next plan must not count on what they held."""
    world = World(ep_size=4, slots_per_rank=4).boot()
    serve_all(world, 20)
    world.kill(3)
    world.settle_until(lambda: world.brain.state.group.phase is Phase.SERVING)
    world.inbox.clear()
    world.kill(2)
    ordered = [(order.layer, order.slot) for _, m in world.inbox if isinstance(m, Install) for order in m.loads]
    assert ordered
    assert all(world.brain.state.contents.experts[layer, slot] == -1 for layer, slot in ordered)
    world.kill(1)  # before anyone has answered
    world.settle()
    check_all(world, 20)
    assert not world.brain.state.contents.mismatches(world.brain.state.plan.placement)


def test_all_ranks_wedged_is_found_after_three_timeouts():
    world = World(ep_size=1, slots_per_rank=8).boot()
    world.submit("a", [1], 5)
    world.wedged.add(0)
    world.inbox.clear()
    world.pass_time(29.0)
    assert world.brain.state.seats[0].is_alive
    world.pass_time(2.0)
    assert world.brain.state.group.phase is Phase.DOWN


def test_of_two_that_answered_the_accused_goes():
    assert judge({3: {1: "closed"}}, answered={1, 3}, dead=[]).guilty == {1: "rank 3: closed"}
    assert judge({1: {3: "closed"}}, answered={1, 3}, dead=[]).guilty == {3: "rank 1: closed"}


def test_a_missed_deadline_of_one_that_reports_is_a_consequence():
    accusations = {0: {2: "deadline"}, 1: {2: "deadline", 0: "deadline"}}
    assert set(judge(accusations, answered={0, 1}, dead=[]).guilty) == {2}


def test_the_one_rank_that_complains_outlives_the_hung_ones():
    """Fewest ranks that explain it would be the healthy one; the hung ones then stall the group for three timeouts."""
    world = World(ep_size=3, slots_per_rank=8).boot()
    serve_all(world)
    world.answer()
    world.wedged |= {1, 2}
    world.inbox.clear()
    world.say(0, StepFailed(1, world.brain.state.step.number, {1: "deadline", 2: "deadline"}))
    world.pass_time(1.0)
    assert [seat.is_alive for seat in world.brain.state.seats] == [True] * 3
    world.pass_time(10.0)
    assert [seat.is_alive for seat in world.brain.state.seats] == [True, False, False]
    world.settle()
    check_all(world)


def test_a_rank_that_is_cut_off_goes_once_the_others_have_spoken():
    accusations = {0: {1: "deadline", 2: "deadline", 3: "deadline"}}
    assert judge(accusations, answered={0}, dead=[]).guilty == {}
    accusations |= {1: {0: "deadline"}, 2: {0: "deadline"}, 3: {0: "deadline"}}
    assert set(judge(accusations, answered={0, 1, 2, 3}, dead=[]).guilty) == {0}


def test_of_five_three_hang():
    accusations = {rank: {2: "deadline", 3: "deadline", 4: "deadline"} for rank in (0, 1)}
    assert not {0, 1} & set(judge(accusations, answered={0, 1}, dead=[]).guilty)


def test_the_record_of_a_total_loss_names_everyone():
    world = World(ep_size=3, slots_per_rank=8, restart=True).boot()
    serve_all(world, 20)
    for rank in (0, 2, 1):
        world.kill(rank)
    world.pass_time(2.0)
    world.settle()
    check_all(world, 20)
    assert world.brain.state.recoveries[0].ranks == [0, 2, 1]


def test_a_seat_that_starts_is_no_member_of_a_recovery():
    world = World(restart=True, restart_backoff_s=0.1).boot()
    world.unfenceable = {2}
    world.unstartable = {3}
    world.kill(2)
    world.kill(3)
    world.pass_time(0.5)
    assert world.brain.state.seats[3].state is SeatState.STARTING
    world.feed(ev.RankFenced(2, 0))
    assert world.brain.state.membership.ranks == (0, 1)


def test_a_late_report_does_not_bring_back_what_a_newer_order_overwrites():
    """Found by random schedules: the report of epoch 1 arrived after epoch 2 had ordered the same slot anew, and epoch 3 counted on it."""
    world = World(ep_size=5, slots_per_rank=6, num_layers=1)
    for rank in range(5):
        world.feed(ev.RankConnected(Hello(rank, 0, 1, "h", "t", "")))
        world.say(rank, DenseLoaded(0, 1.0))
    first = dict(world.inbox)
    world.inbox.clear()
    for rank in (4, 3):
        world.kill(rank)
        again = {(o.layer, o.slot): (r, o) for r, m in world.inbox if isinstance(m, Install) for o in m.loads}
        for key, (r, order) in again.items():
            old = next((o for o in first[r].loads if (o.layer, o.slot) == key), None)
            if old is not None and old.expert != order.expert:
                loaded = LoadedSlot(old.layer, old.slot, old.expert, 7)
                world.say(r, Installed(first[r].epoch, (loaded,), {}, 0.1))
                assert world.brain.state.contents.experts[key] == -1
    world.settle()
    assert not world.brain.state.contents.mismatches(world.brain.state.plan.placement)


def test_a_seat_that_is_filled_again_is_no_member_of_the_next_epoch_yet():
    """While rank 2 is still being fenced, rank 1's seat has a new process; then the last member, rank 0, dies: nobody is left to plan for,
    and those that start boot anew."""
    world = World(ep_size=3, restart=True, restart_backoff_s=0.05).boot()
    world.unfenceable, world.unstartable = {2}, {1}
    for rank in (2, 1):
        world.kill(rank)
    world.pass_time(0.1)
    assert world.brain.state.seats[1].state is SeatState.STARTING
    world.kill(0)
    assert world.brain.state.group.phase is Phase.BOOTING
    world.unfenceable, world.unstartable = set(), set()
    world.inbox.append((1, "hello"))
    for _ in range(20):
        world.pass_time(0.5)
        world.settle()
    assert world.brain.state.membership.ranks == (0, 1, 2)
