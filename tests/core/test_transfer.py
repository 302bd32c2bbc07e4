"""Transfer plans, executed step by step against a model of slot contents."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.core.eplb.resilient import solve_placement
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.links import LinkLoads, LinkSpeeds, Source, SourceKind
from elastic_ep.core.placement import ExpertPlacement
from elastic_ep.core.topology import Topology
from elastic_ep.core.transfer import pick_sources, plan_transfer

FEW = settings(max_examples=150, deadline=None, derandomize=True)


def execute(plan, contents, target, topology, active, node, staging_slots, backups=None):
    """Do every round on a copy of the contents; checks sources, buffers and coverage on the way."""
    held = contents.copy()
    live = topology.live_slot_mask(active)
    held[:, ~live] = -1
    wanted = target.physical_to_logical_map
    needed = [set(row[row >= 0].tolist()) for row in wanted]
    for index, step in enumerate(plan.rounds):
        before = held.copy()
        written = {(c.layer, c.slot) for c in step.copies}
        assert len(written) == len(step.copies)
        for copy in step.copies:
            assert topology.rank_of_slot[copy.slot] == copy.rank
            assert active[copy.rank]
            source = copy.source
            if source.kind is SourceKind.HOST:
                assert backups[node[copy.rank]][copy.layer, copy.expert]
            elif source.kind is not SourceKind.CHECKPOINT:
                assert active[source.rank]
                assert topology.rank_of_slot[source.slot] == source.rank
                assert before[copy.layer, source.slot] == copy.expert
                assert not (step.in_place and (copy.layer, source.slot) in written)
                same = node[source.rank] == node[copy.rank]
                assert source.kind is (SourceKind.SAME_NODE if same else SourceKind.OTHER_NODE)
            held[copy.layer, copy.slot] = copy.expert
        if not step.in_place:
            assert max(Counter(c.rank for c in step.copies).values(), default=0) <= staging_slots
        for move in step.local_moves:
            assert topology.rank_of_slot[move.slot] == topology.rank_of_slot[move.from_slot]
            held[move.layer, move.slot] = before[move.layer, move.from_slot]
        for layer, row in enumerate(held):
            had = set(before[layer].tolist()) & needed[layer]
            assert had <= set(row.tolist()), "a round left an expert without a replica"
            if index + 1 >= plan.num_coverage_rounds:
                assert needed[layer] <= set(row.tolist())
    np.testing.assert_array_equal(np.where(wanted >= 0, held, -1), wanted)
    return held


@st.composite
def journeys(draw):
    """(contents, target, topology, active): any contents, and a target that covers every expert, near them or far."""
    ep_size = draw(st.integers(1, 6))
    slots = tuple(draw(st.lists(st.integers(1, 4), min_size=ep_size, max_size=ep_size)))
    nodes = tuple(draw(st.lists(st.sampled_from("ab"), min_size=ep_size, max_size=ep_size)))
    active = np.array(draw(st.lists(st.integers(0, 1), min_size=ep_size, max_size=ep_size).filter(any)))
    topology = Topology(slots, {"node": nodes})
    live = int(topology.live_slot_mask(active).sum())
    num_experts = draw(st.integers(1, live))
    rng = np.random.default_rng(draw(st.integers(0, 100_000)))
    load = rng.lognormal(0, 1, (2, num_experts))
    near = draw(st.booleans())
    contents = rng.integers(-1, num_experts, (2, topology.num_slots))
    if draw(st.booleans()):
        contents = solve_placement(load[:, ::-1].copy(), topology, np.ones(ep_size), tolerance=0.0).placement.physical_to_logical_map.copy()
    previous = ExpertPlacement(contents, num_experts) if near else None
    return contents, solve_placement(load, topology, active, previous).placement, topology, active


def lacking(contents, target, topology, active):
    """(layer, expert, rank) for each rank that is to have an expert and does not: what has to be brought, and no more."""
    held, wanted, live = contents.tolist(), target.physical_to_logical_map.tolist(), topology.live_slot_mask(active)
    rank_of = topology.rank_of_slot.tolist()
    have = {(layer, e, rank_of[s]) for layer, row in enumerate(held) for s, e in enumerate(row) if live[s]}
    need = {(layer, e, rank_of[s]) for layer, row in enumerate(wanted) for s, e in enumerate(row) if e >= 0}
    return sorted(need - have)


def check_times(plan, node, speeds, expert_bytes):
    """Bytes and seconds are those of the copies, link by link."""
    total = LinkLoads(speeds, node)
    for step in plan.rounds:
        links = LinkLoads(speeds, node)
        for copy in step.copies:
            for link, _ in links.links_of(copy.source, copy.rank):
                links.num_bytes[link] += expert_bytes
                total.num_bytes[link] += expert_bytes
        assert step.seconds == max(links.seconds().values(), default=0.0)
    assert plan.link_bytes == total.num_bytes
    assert plan.link_seconds == total.seconds()
    assert plan.seconds == sum(step.seconds for step in plan.rounds)
    assert plan.coverage_seconds == sum(step.seconds for step in plan.rounds[: plan.num_coverage_rounds])


@FEW
@given(journeys(), st.integers(1, 3), st.booleans())
def test_plans_can_be_executed(journey, staging_slots, in_place):
    contents, target, topology, active = journey
    speeds = LinkSpeeds(same_node=8.0, other_node=4.0, host=2.0, checkpoint=1.0)
    plan = plan_transfer(contents, target, topology, active, staging_slots=staging_slots, expert_bytes=10, in_place=in_place, speeds=speeds)
    execute(plan, contents, target, topology, active, topology.labels("node"), staging_slots)
    assert sum(plan.bytes_by_kind.values()) == 10 * plan.num_copies
    copies = sorted((c.layer, c.expert, c.rank) for step in plan.rounds for c in step.copies)
    assert copies == lacking(contents, target, topology, active)
    assert any(step.in_place for step in plan.rounds) <= in_place
    check_times(plan, topology.labels("node"), speeds, 10)


@FEW
@given(journeys())
def test_nothing_moves_when_contents_are_right(journey):
    _, target, topology, active = journey
    plan = plan_transfer(target.physical_to_logical_map, target, topology, active)
    assert plan.rounds == ()
    assert plan.num_kept == (target.physical_to_logical_map >= 0).sum()


def placement(rows, num_experts):
    return ExpertPlacement(np.array(rows), num_experts)


def test_single_replicas_change_places_with_one_buffer_each():
    # Ranks 0 and 1 hold {0, 1} and {2, 3} and are to change places entirely: two rounds of one copy to each, never a gap.
    topology = Topology((2, 2), {"node": ("a", "a")})
    contents = np.array([[0, 1, 2, 3]])
    plan = plan_transfer(contents, placement([[2, 3, 0, 1]], 4), topology, [1, 1])
    assert [len(r.copies) for r in plan.rounds] == [2, 2]
    execute(plan, contents, placement([[2, 3, 0, 1]], 4), topology, [1, 1], ("a", "a"), 1)


def test_within_a_rank_nothing_goes_over_a_link():
    plan = plan_transfer(np.array([[0, 1, 2]]), placement([[2, 0, 1]], 3), Topology((3,)), [1])
    assert plan.num_copies == 0
    assert [(m.slot, m.from_slot) for m in plan.rounds[0].local_moves] == [(0, 2), (1, 0), (2, 1)]
    assert plan.seconds == 0.0


def test_sources_are_alive_near_and_shared_out():
    # Expert 0 is on rank 0 (dead), on ranks 1 and 2 of node a and on rank 4 of node b; rank 3 of node a and ranks 5, 6 of node b want it.
    nodes = ("a", "a", "a", "a", "b", "b", "b")
    topology = Topology((1,) * 7, {"node": nodes})
    contents = np.array([[0, 0, 0, 1, 0, 1, 1]])
    active = [0, 1, 1, 1, 1, 1, 1]
    target = placement([[-1, 1, 0, 0, 0, 0, 0]], 2)
    plan = plan_transfer(contents, target, topology, active, expert_bytes=100)
    execute(plan, contents, target, topology, active, nodes, 1)
    by_rank = {c.rank: c.source for step in plan.rounds for c in step.copies}
    assert by_rank[3].kind is by_rank[5].kind is by_rank[6].kind is SourceKind.SAME_NODE
    assert 0 not in {s.rank for s in by_rank.values()}


def test_one_rank_does_not_send_to_all():
    # Eight ranks want expert 0; two hold it. Each sends half of the bytes.
    topology = Topology((1,) * 10, {"node": ("a",) * 10})
    contents = np.array([[0, 0] + [1] * 8])
    target = placement([[1, 0] + [0] * 8], 2)
    plan = plan_transfer(contents, target, topology, [1] * 10, expert_bytes=100)
    sent = {k.owner: v for k, v in plan.link_bytes.items() if k.name == "out same_node"}
    assert max(sent[0], sent[1]) <= 500


def test_lost_experts_come_from_host_memory_before_the_checkpoint_and_come_first():
    topology = Topology((2, 2), {"node": ("a", "b")})
    contents = np.array([[0, 1, 0, -1], [0, 1, 2, 0]])
    target = placement([[0, 1, 0, 2], [1, 0, 2, 0]], 3)
    backup = np.zeros((2, 3), dtype=bool)
    backup[0, 2] = True
    plan = plan_transfer(contents, target, topology, [1, 1], backups={"b": backup}, expert_bytes=7)
    assert plan.num_coverage_rounds == 1
    assert plan.rounds[0].in_place
    assert [(c.layer, c.slot, c.expert, c.source.kind) for c in plan.rounds[0].copies] == [(0, 3, 2, SourceKind.HOST)]
    assert plan.bytes_by_kind == {SourceKind.HOST: 7}
    execute(plan, contents, target, topology, [1, 1], ("a", "b"), 1, {"b": backup})


def test_times_follow_the_links():
    topology = Topology((1, 1), {"node": ("a", "b")})
    speeds = LinkSpeeds(other_node=10.0, checkpoint=1.0)
    plan = plan_transfer(np.array([[0, -1]]), placement([[0, 0]], 1), topology, [1, 1], expert_bytes=20, speeds=speeds)
    assert plan.seconds == 2.0
    plan = plan_transfer(np.array([[-1, -1]]), placement([[0, -1]], 1), topology, [1, 1], expert_bytes=20, speeds=speeds)
    assert (plan.coverage_seconds, plan.seconds) == (20.0, 20.0)
    assert {k.name: v for k, v in plan.link_seconds.items()} == {"checkpoint": 20.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contents": np.zeros((1, 3))}, "do not belong together"),
        ({"contents": np.zeros((2, 2))}, "do not belong together"),
        ({"topology": Topology((1, 2))}, "do not belong together"),
        ({"staging_slots": 0}, "staging_slots is 0"),
        ({"active_ranks": [1, 0]}, "puts expert 1 of layer 0 into slot 1 of a dead rank"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"contents": [[0, 1]], "target": placement([[0, 1]], 2), "topology": Topology((1, 1)), "active_ranks": [1, 1], **change}
    with pytest.raises(InvalidInputError, match=message):
        plan_transfer(**arguments)


def test_buffers_are_filled_in_every_round():
    # Rank 1 is empty and takes five experts, two at a time; rank 2 takes one, beside the first two.
    topology = Topology((5, 5, 1))
    contents = np.array([[0, 1, 2, 3, 4] + [-1] * 6])
    plan = plan_transfer(contents, placement([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]], 5), topology, [1, 1, 1], staging_slots=2)
    assert [[c.rank for c in step.copies] for step in plan.rounds] == [[1, 1, 2], [1, 1], [1]]
    assert plan.num_kept == 5
    assert plan.num_coverage_rounds == 0


def test_an_expert_goes_where_it_is_meant_to_be():
    # Both slots of rank 1 can be given up, the lower one too; the copy takes the one that the target names: nothing is to be permuted.
    plan = plan_transfer(np.array([[0, 1, -1, -1]]), placement([[0, 1, -1, 0]], 2), Topology((2, 2)), [1, 1])
    assert [(c.slot, c.expert) for step in plan.rounds for c in step.copies] == [(3, 0)]
    assert not any(step.local_moves for step in plan.rounds)


def test_a_doubled_expert_gives_up_one_slot_only():
    # Rank 0 holds expert 0 twice and is to hold 0 and 1: one of the two goes, and the rank has expert 0 all the time.
    contents = np.array([[0, 0, 1, 1]])
    target = placement([[1, 0, 1, 0]], 2)
    plan = plan_transfer(contents, target, Topology((2, 2)), [1, 1])
    execute(plan, contents, target, Topology((2, 2)), [1, 1], ("0", "1"), 1)
    assert [len(step.copies) for step in plan.rounds] == [2]
    assert [(c.slot, c.expert) for c in plan.rounds[0].copies] == [(0, 1), (3, 0)]


def test_a_ring_of_single_replicas_turns_in_one_round():
    # Three ranks hold one expert each and pass it on: nobody can begin alone, all can together.
    topology = Topology((1, 1, 1))
    contents, target = np.array([[0, 1, 2]]), placement([[2, 0, 1]], 3)
    plan = plan_transfer(contents, target, topology, [1, 1, 1])
    assert [len(step.copies) for step in plan.rounds] == [3]
    execute(plan, contents, target, topology, [1, 1, 1], ("0", "1", "2"), 1)


def test_of_equal_sources_the_lowest_slot_is_read():
    topology = Topology.uniform(3, 27)
    held = np.full((1, 27), -1)
    held[0, [16, 3]] = 0
    target = held.copy()
    target[0, 20] = 0
    plan = plan_transfer(held, ExpertPlacement(target, 1), topology, [1, 1, 1])
    assert [copy.source for copy in plan.rounds[0].copies] == [Source(SourceKind.OTHER_NODE, 0, 3)]


def test_loads_of_a_recovery_share_out_the_links():
    # Ranks 2 and 3 read one expert each; ranks 0 and 1 hold both, and each sends one. What a load overwrites is no source.
    topology = Topology((2, 2, 1, 1), {"node": ("a", "a", "a", "a")})
    held = np.array([[0, 1, 0, 1, -1, -1]])
    assert pick_sources([(0, 4, 0), (0, 5, 1)], held, topology, expert_bytes=10) == [
        Source(SourceKind.SAME_NODE, 0, 0),
        Source(SourceKind.SAME_NODE, 1, 3),
    ]
    assert pick_sources([(0, 4, 0), (0, 0, 2)], held, topology) == [Source(SourceKind.SAME_NODE, 1, 2), Source(SourceKind.CHECKPOINT)]


def test_loads_of_a_recovery_come_from_the_nearest():
    topology = Topology((2, 2, 2), {"node": ("a", "b", "b"), "rack": ("x", "x", "y")})
    held = np.array([[0, 1, -1, -1, 0, -1], [-1, -1, 3, -1, -1, -1]])
    backups = {"b": np.array([[False] * 4, [False, True, False, False]])}
    loads = [(0, 3, 0), (0, 2, 1), (1, 3, 3), (1, 4, 1), (1, 5, 2)]
    assert pick_sources(loads, held, topology, backups=backups) == [
        Source(SourceKind.SAME_NODE, 2, 4),
        Source(SourceKind.OTHER_NODE, 0, 1),
        Source(SourceKind.LOCAL, 1, 2),
        Source(SourceKind.HOST),
        Source(SourceKind.CHECKPOINT),
    ]
    assert pick_sources([(0, 3, 0)], held, topology, node_level="rack") == [Source(SourceKind.SAME_NODE, 0, 0)]
    assert pick_sources([(0, 3, 0)], held, Topology((2, 2, 2))) == [Source(SourceKind.OTHER_NODE, 0, 0)], "ranks are nodes of their own"


def test_speeds_decide_among_sources():
    topology = Topology((1, 1), {"node": ("a", "b")})
    held, slow_network = np.array([[0, -1]]), LinkSpeeds(other_node=1.0, checkpoint=10.0)
    assert pick_sources([(0, 1, 0)], held, topology, speeds=slow_network) == [Source(SourceKind.CHECKPOINT)]


def test_an_expert_that_is_on_its_way_already_is_not_brought_twice():
    """Rank 0 gives its only replica of expert 1 up for expert 0, in the round that brings expert 1 to rank 1: that is one copy of each."""
    topology = Topology((1, 4))
    contents, target = np.array([[1, 0, 2, 0, 0]]), placement([[0, 0, 1, 2, -1]], 3)
    plan = plan_transfer(contents, target, topology, [1, 1], staging_slots=2)
    execute(plan, contents, target, topology, [1, 1], ("0", "1"), 2)
    assert [sorted((c.expert, c.rank) for c in step.copies) for step in plan.rounds if step.copies] == [[(0, 0), (1, 1)]]


def test_the_last_replica_waits_for_its_heir():
    """Ranks 0 and 1 hold expert 4 and are to give it up; rank 2, its heir, takes experts 0 and 1 first. One of the two must wait for it."""
    topology = Topology((1, 1, 3, 4))
    contents = np.array([[4, 4, -1, -1, -1, 0, 1, 2, 3]])
    target = placement([[2, 3, 0, 1, 4, 0, 1, 2, 3]], 5)
    plan = plan_transfer(contents, target, topology, [1, 1, 1, 1])
    execute(plan, contents, target, topology, [1, 1, 1, 1], ("0", "1", "2", "3"), 1)
    assert [len(step.copies) for step in plan.rounds] == [2, 1, 2]


def test_a_chain_that_runs_into_a_ring_leaves_it_to_turn_alone():
    """Expert 0 is to displace 1, that 2, that 3, and 3 belongs where 1 was going: 2 and 3 change places; 0 waits, or 1 would be nowhere."""
    topology = Topology((1, 2, 2))
    contents, target = np.array([[1, 2, 4, 3, 0]]), placement([[0, 1, 3, 2, 4]], 5)
    plan = plan_transfer(contents, target, topology, [1, 1, 1])
    execute(plan, contents, target, topology, [1, 1, 1], ("0", "1", "2"), 1)
    assert [(c.rank, c.slot, c.expert) for c in plan.rounds[0].copies] == [(1, 1, 3), (2, 3, 2)]


def test_an_expert_that_a_chain_brings_is_not_brought_again():
    """The other order: making room for expert 0 in rank 0 sends expert 1 to rank 1, which was to get it anyhow and has room for two."""
    topology = Topology((1, 4))
    contents, target = np.array([[1, 0, 2, -1, -1]]), placement([[0, 0, 2, 1, -1]], 3)
    plan = plan_transfer(contents, target, topology, [1, 1], staging_slots=2)
    assert [[(c.slot, c.expert) for c in step.copies] for step in plan.rounds] == [[(0, 0), (3, 1)]]


def test_replicas_that_are_too_many_go_in_one_round():
    topology = Topology((1, 1, 1, 2))
    plan = plan_transfer(np.array([[0, 0, 0, 1, 2]]), placement([[1, 2, 0, 1, 2]], 3), topology, [1] * 4)
    assert [[(c.rank, c.expert) for c in step.copies] for step in plan.rounds] == [[(0, 1), (1, 2)]]


def test_what_is_lost_or_rare_comes_first():
    # Rank 2 takes one expert at a time: 2, which is nowhere, then 1, which has one replica, then 0, which has two.
    topology = Topology((2, 2, 3))
    contents, target = np.array([[0, 1, 0, -1, -1, -1, -1]]), placement([[0, 1, 0, -1, 0, 1, 2]], 3)
    plan = plan_transfer(contents, target, topology, [1, 1, 1], in_place=False)
    assert [[c.expert for c in step.copies] for step in plan.rounds] == [[2], [1], [0]]
    assert plan.num_coverage_rounds == 1


def test_lost_experts_are_dealt_out():
    # Both ranks are to hold both lost experts: before serving goes on, each loads one.
    topology = Topology((2, 2))
    plan = plan_transfer(np.full((1, 4), -1), placement([[0, 1, 0, 1]], 2), topology, [1, 1])
    assert [(c.slot, c.expert) for c in plan.rounds[0].copies] == [(0, 0), (3, 1)]
    assert plan.num_coverage_rounds == 1


def test_a_lost_expert_goes_where_nothing_has_to_make_room():
    # Rank 0 could take expert 0 only into the slot of expert 1, and would have to swap them afterwards; rank 1 has the very slot free.
    contents, target = np.array([[1, -1, -1, 2]]), placement([[0, 1, 0, 2]], 3)
    plan = plan_transfer(contents, target, Topology((2, 2)), [1, 1])
    assert [(c.slot, c.expert) for c in plan.rounds[0].copies] == [(2, 0)]
    assert plan.rounds[0].in_place


def test_lost_experts_in_place_leave_one_replica_of_what_they_overwrite():
    # Expert 2 has two replicas, in the very slots of the two lost ones, and is to live in rank 2. One is overwritten at once, one not yet.
    topology = Topology((1, 1, 1))
    contents, target = np.array([[2, 2, -1]]), placement([[0, 1, 2]], 3)
    plan = plan_transfer(contents, target, topology, [1, 1, 1])
    execute(plan, contents, target, topology, [1, 1, 1], ("0", "1", "2"), 1)
    assert [(step.in_place, [(c.rank, c.expert) for c in step.copies]) for step in plan.rounds] == [
        (True, [(0, 0)]),
        (False, [(1, 1), (2, 2)]),
    ]
    assert plan.num_coverage_rounds == 2


def test_copies_of_no_bytes_take_no_time():
    plan = plan_transfer(np.array([[0, -1]]), placement([[0, 0]], 1), Topology((1, 1)), [1, 1], expert_bytes=0)
    assert (plan.num_copies, plan.seconds) == (1, 0.0)


def test_without_a_size_bytes_count_copies():
    plan = plan_transfer(np.array([[0, -1]]), placement([[0, 0]], 1), Topology((1, 1)), [1, 1])
    assert plan.bytes_by_kind == {SourceKind.OTHER_NODE: 1}


def test_plans_are_not_edited():
    plan = plan_transfer(np.array([[0, -1]]), placement([[0, 0]], 1), Topology((1, 1)), [1, 1])
    for record, name in ((plan, "seconds"), (plan.rounds[0], "seconds")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, 0.0)


@st.composite
def reshuffles(draw):
    """(contents, target, topology): few experts in few slots, anywhere before and after; most live nowhere else."""
    slots = tuple(draw(st.lists(st.integers(1, 3), min_size=2, max_size=5)))
    num_experts = draw(st.integers(max(1, sum(slots) - 3), sum(slots)))
    spare = [-1] * (sum(slots) - num_experts)
    filler = draw(st.lists(st.integers(-1, num_experts - 1), min_size=len(spare), max_size=len(spare)))
    contents = np.array([draw(st.permutations([*range(num_experts), *filler]))])
    filler = draw(st.lists(st.integers(-1, num_experts - 1), min_size=len(spare), max_size=len(spare)))
    return contents, placement([draw(st.permutations([*range(num_experts), *filler]))], num_experts), Topology(slots)


@FEW
@given(reshuffles(), st.integers(1, 2))
def test_rings_turn_with_one_buffer(journey, staging_slots):
    contents, target, topology = journey
    active = [1] * topology.ep_size
    plan = plan_transfer(contents, target, topology, active, staging_slots=staging_slots)
    execute(plan, contents, target, topology, active, topology.labels("rank"), staging_slots)
    copies = sorted((c.layer, c.expert, c.rank) for step in plan.rounds for c in step.copies)
    assert copies == lacking(contents, target, topology, active)
    assert plan.num_coverage_rounds == 0
