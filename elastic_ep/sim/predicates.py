"""The promises of docs/guarantees.md as predicates, one function per promise, asked after every event of a run.

A predicate sees the world as it is: what the brain believes beside what slots do hold, what clients have received beside what they should.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

from elastic_ep.brain import events as ev
from elastic_ep.brain import members, operations
from elastic_ep.brain.messages import Install, RunStep, StepDone
from elastic_ep.brain.seats import SeatState
from elastic_ep.core.placement import EMPTY
from elastic_ep.core.recovery import Phase
from elastic_ep.sim import tokens
from elastic_ep.sim.planning import describe, topology_of
from elastic_ep.sim.process import Process
from elastic_ep.sim.records import NOTHING, Declared, Heard
from elastic_ep.sim.settling import unsettled
from elastic_ep.sim.world import World


class Violation(Exception):
    """A promise was broken: which predicate says so, and how."""

    def __init__(self, predicate: str, what: str) -> None:
        super().__init__(f"{predicate}: {what}")
        self.predicate, self.what = predicate, what


def require(is_kept: object, predicate: str, what: str) -> None:
    if not is_kept:
        raise Violation(predicate, what)


def same_tokens(world: World) -> None:
    """Promise 1: what a client has received is the beginning of what a run without faults gives."""
    for kind, *data in world.facts:
        if kind == "hole":
            raise Violation("same_tokens", f"rank {data[0].rank} starts at {data[1].start}, past its KV of sequence {data[1].seq_id}")
        if kind == "emitted":
            client = data[0]
            wanted = client.wanted[: len(client.tokens)]
            if client.tokens != wanted:
                raise Violation("same_tokens", f"received {client.tokens}, a run without faults gives {wanted}")


def exactly_once(world: World) -> None:
    """Promise 2: indices run without a gap, nothing follows the end, a step's tokens come only if every member answered done, and an
    error only when no rank can be had, or when told to refuse."""
    for kind, *data in world.facts:
        if kind == "emitted":
            client, event = data
            if event.token is not None:
                require(event.index == len(client.tokens) - 1, "exactly_once", f"index {event.index} for token {len(client.tokens) - 1}")
                require(len(client.tokens) <= client.request.max_tokens, "exactly_once", "more tokens than asked for")
            if event.finish == "error":
                state = world.brain.state
                over = state.group.phase in (Phase.DOWN, Phase.REFUSING) or state.stopped
                require(over, "exactly_once", f"a request failed while a rank lives: {event.error}")
            elif event.finish:
                require(len(client.tokens) == client.request.max_tokens, "exactly_once", f"finished with {len(client.tokens)} tokens")
    for heard in world.heard:
        if heard.commands or isinstance(heard.event, ev.RankSaid):
            _check_steps(world, heard)


def _check_steps(world: World, heard: Heard) -> None:
    """Whoever was told to run a step must have answered done before it is committed, once."""
    event, done = heard.event, None
    if isinstance(event, ev.RankSaid) and isinstance(event.message, StepDone):
        done = event.message
        world.answered.setdefault((done.epoch, done.step), set()).add((event.rank, event.incarnation))
    seats = world.brain.state.seats
    for command in heard.commands:
        if isinstance(command, ev.StepCommitted):
            if done is None or done.step != command.step:
                raise Violation("exactly_once", f"step {command.step} committed, and nobody has just finished it")
            key = (done.epoch, done.step)
            missing = world.ordered[key] - world.answered[key]
            require(not missing, "exactly_once", f"step {command.step} committed without {sorted(missing)}")
            require(command.step not in world.committed, "exactly_once", f"step {command.step} committed twice")
            world.committed.add(command.step)
        elif isinstance(command, ev.Send) and isinstance(command.message, RunStep):
            process = (command.rank, seats[command.rank].incarnation)
            world.ordered.setdefault((command.message.epoch, command.message.step), set()).add(process)


def one_epoch(world: World) -> None:
    """Promise 3: whoever finishes a step went by the same epoch and tables as all its peers, and what a process that was given up says
    changes nothing."""
    for kind, *data in world.facts:
        if kind == "finished":
            process, order, parts = data
            own = parts[process.rank].routing
            for rank, part in parts.items():
                if not (part.epoch == order.epoch == own.epoch and (part.routing is own or part.routing.key == own.key)):
                    how = f"step {order.step}: rank {process.rank} in epoch {order.epoch}, rank {rank} in {part.epoch}"
                    raise Violation("one_epoch", how)
        elif kind == "installed":
            process, order, epoch = data
            require(order.epoch == epoch, "one_epoch", f"rank {process.rank} installs epoch {order.epoch} in {epoch}")
    for heard in world.heard:
        if heard.fingerprint is not None:
            kept = heard.fingerprint == heard.after and not heard.commands
            require(kept, "one_epoch", f"{describe(heard.event, heard.commands)}: changed by a process given up before")
    epoch = world.brain.state.membership.epoch
    if epoch != world.last_epoch:
        require(epoch > world.last_epoch, "one_epoch", f"epoch {epoch} after {world.last_epoch}")
        world.last_epoch = epoch


SLACK_S = 0.1


def bounded_waits(world: World) -> None:
    """Promise 4: whatever the brain waits for has a deadline in sight, no wait lasts longer than the settings say, time that passes moves
    the deadline on, and a process that died, or was stopped, is given up in time."""
    if world.stopped is not None:
        return
    state, now = world.brain.state, world.timeline.now
    due = world.brain.next_deadline()
    if due is None or due > now + 60.0:
        quiet = not any(s.is_alive or s.restart_at is not None for s in state.seats)
        require(quiet, "bounded_waits", f"no deadline in sight while {state.group.phase.value}")
    elif due < now and isinstance(world.heard[-1].event, ev.TimePassed):
        raise Violation("bounded_waits", f"time passed at {now:.6f} and the deadline is still {due:.6f}")
    if state.group.phase is Phase.PLANNING:
        require(world.is_planning, "bounded_waits", "planning, and no plan was asked for")
    elif state.step is None and state.group.phase in (Phase.RESUMING, Phase.SERVING):
        idle = any(s.home is not None for s in state.requests.running.values())
        require(not idle, "bounded_waits", "sequences run, and no step does")
        is_free = state.change is None and state.changes_wait_until is None and not state.stopping
        late = state.restore_due and is_free and state.group.phase is Phase.SERVING
        require(not late, "bounded_waits", "redundancy is to be restored, nothing hinders it, and nothing does it")
    _check_lengths(world, now)
    if not world.heard[0].is_beat:
        _check_seats(world)
        _check_retries(world, now)
    limit = 2 * world.settings.heartbeat_timeout_s + SLACK_S
    for (rank, incarnation), (since, how) in world.harmed.items():
        seat = state.seats[rank]
        since = max(since, world.greeted.get((rank, incarnation), since))  # before its hello, only the boot's deadline holds
        if now > since + limit and seat.incarnation == incarnation and seat.is_alive and seat.state is not SeatState.STARTING:
            raise Violation("bounded_waits", f"rank {rank}: {how} {now - since:.2f} s ago, and not given up")


def _check_lengths(world: World, now: float) -> None:
    """How long the fence, step or install in hand has lasted."""
    state, settings = world.brain.state, world.settings
    for heard in world.heard:
        for command in heard.commands:
            if isinstance(command, ev.Fence):
                world.fenced_at = now
    if state.fence_deadline is not None:
        lasted = now - world.fenced_at
        require(lasted < settings.fence_timeout_s + SLACK_S, "bounded_waits", f"fencing for {lasted:.2f} s")
    for transaction in (state.step, state.install):
        if transaction is not None:
            lasted = now - transaction.started
            patience_s = settings.step_timeout_s if transaction is state.step else settings.install_deadline_s(100)
            if lasted >= 4 * patience_s + SLACK_S:
                raise Violation("bounded_waits", f"transaction {transaction.number} lasts {lasted:.2f} s")


def _check_seats(world: World) -> None:
    """No seat stays empty that may be filled, none is filled whose host is away, and a start waits for nobody who is not coming."""
    state = world.brain.state
    is_booting = state.group.phase is Phase.BOOTING
    for seat in state.seats:
        if seat.state is SeatState.DEAD and seat.restart_at is None and not seat.absent and members.may_restart(state, seat):
            raise Violation("bounded_waits", f"seat {seat.rank} is empty, its host is here, and nobody is to fill it")
        is_booting = is_booting and seat.state not in (SeatState.STARTING, SeatState.LOADING, SeatState.FENCING)
    ready = is_booting and any(seat.state is SeatState.READY for seat in state.seats)
    require(not ready, "bounded_waits", "all ranks that live are ready, and the group still boots")
    for heard in world.heard:
        for command in heard.commands:
            if isinstance(command, ev.StartRank) and state.seats[command.rank].absent:
                raise Violation("bounded_waits", f"rank {command.rank} is started on a host that is away")


def _check_retries(world: World, now: float) -> None:
    """A change that could not be made is not begun again at once."""
    for heard in world.heard:
        for command in heard.commands:
            if isinstance(command, ev.Publish) and command.kind == "change_failed":
                world.change_failed_at = now
            elif isinstance(command, ev.MakePlan) and command.change is not None and world.change_failed_at is not None:
                waited = now - world.change_failed_at
                soonest = world.settings.restart_backoff_s
                require(waited > soonest - 1e-9, "bounded_waits", f"a change that failed is begun again after {waited:.4f} s")
                world.change_failed_at = None


def any_rank_may_die(world: World) -> None:
    """Promise 5: the brain never fails, and never ends while a process lives or may be started."""
    state = world.brain.state
    if state.group.phase is Phase.DOWN and not world.saw_down:
        world.saw_down = True
        require(not any(s.is_alive for s in state.seats), "any_rank_may_die", "down while a rank lives")
        if state.settings.restart:
            left = [s.rank for s in operations.wanted_seats(state) if s.failed_starts < state.settings.restart_limit]
            require(not left, "any_rank_may_die", f"down while seats {left} may be started again")


def declared_survivability(world: World) -> None:
    """Promise 6: what an installed placement is said to survive it does, by the slots as they are; and a loss within it loses no expert."""
    state = world.brain.state
    for heard in world.heard:
        event = heard.event
        if isinstance(event, ev.Planned) and event.change is None and event.plan is not None and event.epoch == state.membership.epoch:
            said = world.declared
            gone = said.members - world.members
            labels = _nodes(world)
            in_one_node = said.any_node and len({labels[rank] for rank, _ in gone}) == 1
            if said.members and event.plan.experts_lost and (len(gone) <= said.any_ranks or in_one_node):
                how = f"said to survive any {said.any_ranks}{' and any node' * said.any_node}; losing {sorted(gone)} does not"
                raise Violation("declared_survivability", how)
        for command in heard.commands:
            if isinstance(command, ev.Send):
                if isinstance(command.message, Install):
                    world.declared = NOTHING
            elif heard.has_installed and isinstance(command, ev.Publish) and command.kind == "installed":
                assert state.plan is not None
                says = state.plan.survives
                world.declared = Declared(int(says["any_ranks"]), bool(says["any_node"]), frozenset(world.members))
                _check_survives(world, world.declared)


def _nodes(world: World) -> tuple[str, ...]:
    topology = topology_of(world.brain)
    return topology.labels("node" if "node" in topology.domains else "rank")


def _check_survives(world: World, said: Declared) -> None:
    state = world.brain.state
    there = {rank for rank, _ in said.members}
    hosts: dict[tuple[int, int], set[int]] = {}
    for rank in there:
        process = world.processes[rank, state.seats[rank].incarnation]
        if process.routing is not None:
            for key in process.routing.own[rank]:
                if key in process.held:
                    hosts.setdefault((key[0], process.held[key][0]), set()).add(rank)
    count = state.settings.num_layers * state.settings.plan.num_experts
    sets = [set(lost) for size in range(1, min(said.any_ranks, len(there)) + 1) for lost in combinations(sorted(there), size)]
    if said.any_node:
        labels = _nodes(world)
        sets += [{rank for rank in there if labels[rank] == label} for label in sorted({labels[rank] for rank in there})]
    for lost in sets:
        left = sum(1 for ranks in hosts.values() if not ranks <= lost)
        if left != count:
            how = f"said to survive any {said.any_ranks}{' and any node' * said.any_node}; losing {sorted(lost)} leaves {left} of {count}"
            raise Violation("declared_survivability", how)


def right_or_refused(world: World) -> None:
    """Promise 7: an installed epoch has a place for every expert on a member, a rank runs a step only with the experts its tables say, and
    requests are refused only when told to and short of slots."""
    state = world.brain.state
    for kind, *data in world.facts:
        if kind == "unrouted":
            raise Violation("right_or_refused", f"rank {data[0].rank}: layer {data[1]} expert {data[2]} is nowhere: a partial sum")
        if kind == "serves":
            process, order = data
            for key, expert in process.routing.own[process.rank].items() if _is_new(world, process) else ():
                held = process.held.get(key, (EMPTY, 0))[0]
                if held != expert:
                    raise Violation("right_or_refused", f"step {order.step}: rank {process.rank} slot {key} has {held}, not {expert}")
    for heard in world.heard:
        if heard.has_installed:
            _check_complete(world)
    if state.group.phase is Phase.REFUSING and world.heard:
        there = sum(s.state is SeatState.ACTIVE for s in state.seats)
        short = there * world.schedule.slots_per_rank < state.settings.plan.num_experts
        require(short and not world.schedule.stream, "right_or_refused", f"refuses with {there} members")


def _check_complete(world: World) -> None:
    state = world.brain.state
    assert state.plan is not None
    owner, active = topology_of(world.brain).rank_of_slot, set(state.membership.ranks)
    rows = state.plan.placement.physical_to_logical_map.tolist()
    for layer, row in enumerate(rows):
        placed = {expert for slot, expert in enumerate(row) if expert != EMPTY and int(owner[slot]) in active}
        placed |= {expert for (at, expert), rank in state.plan.streamed.items() if at == layer and rank in active}
        missing = set(range(state.settings.plan.num_experts)) - placed
        require(not missing, "right_or_refused", f"epoch {state.membership.epoch} layer {layer}: experts {sorted(missing)} are nowhere")


def verified_bytes(world: World) -> None:
    """Promise 8: a slot that serves holds the bytes of the checkpoint, and what the brain believes of a member's slots is so."""
    for kind, *data in world.facts:
        if kind == "serves":
            process = data[0]
            for layer, slot in process.routing.own[process.rank] if _is_new(world, process) else ():
                expert, content = process.held.get((layer, slot), (EMPTY, 0))
                if expert != EMPTY and content != tokens.expert_bytes(layer, expert):
                    how = f"rank {process.rank} serves other bytes than expert {expert}'s in slot {(layer, slot)}"
                    raise Violation("verified_bytes", how)
            world.looked_at[process] = (process.routing, process.held)
    for heard in world.heard:
        if heard.has_installed:
            _check_contents(world)


def _is_new(world: World, process: Process) -> bool:
    """Whether its tables or its slots are others than when both were last compared. Neither is ever changed in place."""
    routing, held = world.looked_at.get(process, (None, None))
    return routing is not process.routing or held is not process.held


def _check_contents(world: World) -> None:
    state = world.brain.state
    believed, digests = state.contents.experts.tolist(), state.contents.digests.tolist()
    for rank in state.membership.ranks:
        process = world.processes[rank, state.seats[rank].incarnation]
        for slot in topology_of(world.brain).slots_of(rank):
            for layer, row in enumerate(believed):
                if row[slot] != EMPTY:
                    held = process.held.get((layer, slot))
                    same = held == (row[slot], digests[layer][slot])
                    require(same, "verified_bytes", f"rank {rank} layer {layer} slot {slot} holds {held}, is believed to hold {row[slot]}")


PROMISES: dict[int, Callable[[World], None]] = {
    1: same_tokens,
    2: exactly_once,
    3: one_epoch,
    4: bounded_waits,
    5: any_rank_may_die,
    6: declared_survivability,
    7: right_or_refused,
    8: verified_bytes,
}


ASKED: dict[str, tuple[Callable[[World], None], ...]] = {
    "hole": (same_tokens,),
    "emitted": (same_tokens, exactly_once),
    "finished": (one_epoch,),
    "installed": (one_epoch,),
    "unrouted": (right_or_refused,),
    "serves": (right_or_refused, verified_bytes),
}
"""which predicates look at a fact of this kind"""


def check(world: World) -> None:
    """Ask all that what has just happened can have broken. Raises Violation.

    While the brain hears nothing it stays as it is, and only those are asked that look at the facts that ranks have made. An event that
    leads to no command and leaves phase and members as they are can break the fourth, or, if it tells of the end of a step or of a
    process that was given up, the second or the third. After any other all are asked.
    """
    if not world.heard:
        for kind in {fact[0] for fact in world.facts}:
            for predicate in ASKED[kind]:
                predicate(world)
        return
    state, heard = world.brain.state, world.heard[0]
    now = (state.membership, state.group.phase)
    if world.facts or heard.commands or len(world.heard) > 1 or world.judged != now or not isinstance(heard.event, ev.RankSaid):
        for predicate in PROMISES.values():
            predicate(world)
        world.judged = now
        return
    if heard.fingerprint is not None:
        one_epoch(world)
    if isinstance(heard.event.message, StepDone):
        exactly_once(world)
    bounded_waits(world)


def check_end(world: World, patience_s: float) -> None:
    """After the last fault everything ends: each request has all its tokens, or an error that the promises allow."""
    operation = world.brain.state.operation if world.operation_runs else None
    if operation is not None:
        raise Violation("bounded_waits", f"{operation.describe()} has not ended {patience_s:g} s after the last fault")
    for name, client in world.clients.items():
        done = client.finish or client.is_cancelled
        phase: Any = world.brain.state.group.phase.value
        require(done, "any_rank_may_die", f"request {name} has {len(client.tokens)} tokens {patience_s:g} s after the last fault, {phase}")
    left = unsettled(world)
    require(not left, "bounded_waits", f"{left} {patience_s:g} s after the last fault")
