"""What an operator asks of the group: grow, shrink, drain a rank. One at a time, named, and either done or undone. Functions over the
brain's state.

Growing adds seats and starts their processes; when all are ready they become members together, or, if one of them fails before, none does.
Shrinking and draining make the others take over what the leavers hold, staged while all serve; then, between two steps, they leave.
"""

from __future__ import annotations

from elastic_ep.brain.events import DrainRequested, Fence, ScaleRequested
from elastic_ep.brain.seats import Seat, SeatState
from elastic_ep.brain.state import BrainState, Operation, OperationKind, OperationState
from elastic_ep.core.membership import Membership
from elastic_ep.core.recovery import Phase
from elastic_ep.core.topology import Topology

OPERATIONS_KEPT = 64

Request = ScaleRequested | DrainRequested


def wanted_seats(state: BrainState) -> list[Seat]:
    """Seats that are to be filled: all but those that were retired."""
    return [seat for seat in state.seats if seat.state is not SeatState.RETIRED]


def refusal(state: BrainState, request: Request) -> str | None:
    """Why this cannot be begun now; None if it can, or if the operation is known already."""
    if request.operation_id in state.operations:
        return None
    if state.operation is not None:
        return f"operation {state.operation.operation_id} is still running ({state.operation.describe()}); wait for it"
    if state.stopping:
        return "the server is stopping"
    if state.group.phase in (Phase.BOOTING, Phase.REFUSING, Phase.DOWN):
        return f"the group is {state.group.phase.value}; wait until it serves"
    if isinstance(request, DrainRequested):
        return _drain_refusal(state, request.rank)
    num_experts, size = state.settings.plan.num_experts, request.new_ep_size
    if not 1 <= size <= num_experts:
        return f"new_ep_size is {size}; give 1 to {num_experts}, the number of experts"
    return _slots_refusal(state, _leavers(state, size))


def _drain_refusal(state: BrainState, rank: int) -> str | None:
    if not 0 <= rank < len(state.seats):
        return f"there is no rank {rank}; ranks are 0 to {len(state.seats) - 1}"
    if state.seats[rank].state is SeatState.RETIRED:
        return f"rank {rank} is retired already"
    return _slots_refusal(state, (rank,))


def _slots_refusal(state: BrainState, leavers: tuple[int, ...]) -> str | None:
    stay = [rank for rank in state.membership.ranks if rank not in leavers and state.seats[rank].is_alive]
    if not stay:
        return "no member would be left to serve"
    slots = sum(state.topology.slots_per_rank[rank] for rank in stay)
    if slots < state.settings.plan.num_experts and not state.settings.plan.stream_when_short and leavers:
        return f"{slots} slots would be left for {state.settings.plan.num_experts} experts, and --when-short is refuse; keep more ranks"
    return None


def _leavers(state: BrainState, size: int) -> tuple[int, ...]:
    """Who goes when the group shrinks: seats without a member first, then the highest ranks."""
    seats = sorted(wanted_seats(state), key=lambda s: (not state.membership.is_active(s.rank), s.rank), reverse=True)
    return tuple(sorted(seat.rank for seat in seats[: max(0, len(seats) - size)]))


def begin(state: BrainState, request: Request, now: float) -> None:
    """Begin what `refusal` had nothing against. A known operation is left as it is."""
    if request.operation_id in state.operations or refusal(state, request) is not None:
        return
    if isinstance(request, DrainRequested):
        operation = Operation(request.operation_id, OperationKind.DRAIN, request.rank, request.drain, now, leavers=(request.rank,))
    else:
        size = request.new_ep_size
        operation = Operation(request.operation_id, OperationKind.SCALE, size, request.drain, now, leavers=_leavers(state, size))
        operation.seats_to_add = max(0, size - len(wanted_seats(state)))
        if not operation.seats_to_add:
            operation.joiners = operation.seats_before = _start_again(state, operation.leavers, now)
    state.operation = state.operations[request.operation_id] = operation
    while len(state.operations) > OPERATIONS_KEPT:
        del state.operations[next(iter(state.operations))]
    state.publish("operation_started", **operation.as_status())
    for rank in operation.leavers:
        if not (state.membership.is_active(rank) and state.seats[rank].is_alive):  # the members of a group in recovery are not news
            retire(state, state.seats[rank], now)
    check(state, now)


def grow(state: BrainState, now: float) -> None:
    """Add the seats that the running operation asks for. Only while nothing is planned or staged: plans know the seats of their time."""
    operation = state.operation
    if operation is not None and operation.seats_to_add:
        operation.joiners = _add_seats(state, operation.seats_to_add, now)
        operation.seats_to_add = 0


def _start_again(state: BrainState, leavers: tuple[int, ...], now: float) -> tuple[int, ...]:
    """Have the dead seats filled for which no process is to be started any more, but those of hosts that are away."""
    given_up = [s for s in state.seats if s.state is SeatState.DEAD and s.restart_at is None and not s.absent and s.rank not in leavers]
    return _order_processes(state, [seat.rank for seat in given_up], now)


def _add_seats(state: BrainState, count: int, now: float) -> tuple[int, ...]:
    """Fill retired seats again whose host is here, the lowest first, then make new ones with as many slots as the last seat, on the first
    one's host."""
    added = [seat.rank for seat in state.seats if seat.state is SeatState.RETIRED and not seat.absent][:count]
    missing = count - len(added)
    if missing > 0:
        topology, old = state.topology, len(state.seats)
        slots = topology.slots_per_rank[-1]
        domains = {level: (*labels, *labels[:1] * missing) for level, labels in topology.domains.items()}
        state.topology = Topology(topology.slots_per_rank + (slots,) * missing, domains)
        state.contents.grow(slots * missing)
        state.membership = Membership(state.membership.epoch, state.membership.active + (0,) * missing)
        for rank in range(old, old + missing):
            state.seats.append(Seat(rank, state=SeatState.RETIRED, last_sign=now))
            state.release[rank] = []
            added.append(rank)
    return _order_processes(state, added, now)


def _order_processes(state: BrainState, ranks: list[int], now: float) -> tuple[int, ...]:
    for rank in ranks:
        seat = state.seats[rank]
        seat.failed_starts, seat.failure, seat.restart_at = 0, "", now
        state.starts_due_at = now
    return tuple(ranks)


def retire(state: BrainState, seat: Seat, now: float) -> None:
    """Empty a seat for good. What its process holds is not needed any more; nothing that it says counts from here on."""
    seat.restart_at = seat.start_deadline = None
    if seat.state is SeatState.DEAD:
        seat.move(SeatState.RETIRED)
    if seat.state is SeatState.RETIRED:
        return
    if state.change is not None and seat.rank in state.change.joiners:
        state.drop_change()
    seat.is_leaving = True
    if seat.state is SeatState.FENCING:
        return
    seat.move(SeatState.FENCING)
    seat.failure = "retired"
    state.requests.evict_rank(seat.rank)  # its process may go on for a while, but no step asks it any more
    state.publish("rank_retired", rank=seat.rank)
    state.out.append(Fence(seat.rank, seat.incarnation, "retired"))
    state.fence_deadline = now + state.settings.fence_timeout_s


def is_held_back(state: BrainState, rank: int) -> bool:
    """Whether a rank that is ready has to wait for the others of its operation."""
    operation = state.operation
    if operation is None or rank not in operation.joiners:
        return False
    return any(state.seats[r].state not in (SeatState.READY, SeatState.ACTIVE) for r in operation.joiners)


def leavers_ready(state: BrainState) -> tuple[int, ...]:
    """Members that are to leave and may begin to: those that finish their requests first have none left."""
    operation = state.operation
    if operation is None or any(not state.membership.is_active(r) for r in operation.joiners):
        return ()
    leavers = tuple(rank for rank in operation.leavers if state.membership.is_active(rank))
    if operation.drain == "finish" and any(s.home in leavers for s in state.requests.running.values()):
        return ()
    return leavers


def homes(state: BrainState) -> tuple[int, ...]:
    """Members that take new sequences."""
    leaving = state.operation.leavers if state.operation is not None else ()
    return tuple(rank for rank in state.membership.ranks if rank not in leaving)


def on_seat_lost(state: BrainState, rank: int, now: float) -> None:
    """A rank failed. If the running operation was waiting for it to join, or can no more do without the leavers, undo the operation."""
    operation = state.operation
    if operation is None:
        return
    if rank not in operation.joiners or state.membership.is_active(rank):
        short = _slots_refusal(state, operation.leavers) if operation.leavers else None
        if short is not None:
            _finish(state, OperationState.FAILED, f"rank {rank} failed, and {short}", now)
        elif rank in operation.joiners and not state.settings.restart:
            _finish(state, OperationState.FAILED, f"rank {rank} failed while it joined, and is not started again; the others stay", now)
        return
    undo(state, f"rank {rank} failed before it was a member: {state.seats[rank].failure}", now)


def on_seat_left_out(state: BrainState, rank: int, reason: str, now: float) -> None:
    """No process is started for this seat any more. It was a member when it died, so its operation is not undone; but it never ends."""
    if state.operation is not None and rank in state.operation.joiners:
        _finish(state, OperationState.FAILED, f"rank {rank}: {reason}; the others stay", now)


def undo(state: BrainState, reason: str, now: float) -> None:
    """Give the running operation up, if there is one. Its joiners go again, unless nobody else is there to serve. A seat that was there
    before stays: processes are started for it like for any other."""
    operation = state.operation
    if operation is None:
        return
    for joiner in operation.joiners if state.group.phase is not Phase.BOOTING else ():
        if not state.membership.is_active(joiner) and joiner not in operation.seats_before:
            retire(state, state.seats[joiner], now)
    _finish(state, OperationState.FAILED, reason, now)


def abandon(state: BrainState, reason: str) -> None:
    """The server ends before the running operation has; how long it took says nothing."""
    _finish(state, OperationState.FAILED, reason, None)


def check(state: BrainState, now: float) -> None:
    """Close the running operation if what it was for is so."""
    operation = state.operation
    if operation is None:
        return
    joined = all(state.membership.is_active(r) and state.seats[r].state is SeatState.ACTIVE for r in operation.joiners)
    left = all(state.seats[r].state is SeatState.RETIRED for r in operation.leavers)
    if joined and left and not operation.seats_to_add:
        _finish(state, OperationState.DONE, "", now)


def _finish(state: BrainState, how: OperationState, reason: str, now: float | None) -> None:
    operation = state.operation
    assert operation is not None
    operation.state, operation.reason, operation.finished = how, reason, now
    state.operation = None
    state.restore_due = True
    state.publish("operation_finished", **operation.as_status())
