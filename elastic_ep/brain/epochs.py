"""From a plan to an installed epoch, and who is at fault when ranks cannot reach each other. Functions over the brain's state."""

from __future__ import annotations

from dataclasses import replace

from elastic_ep.brain import members, operations
from elastic_ep.brain.events import FailureCause, GroupPlan, Planned, Send
from elastic_ep.brain.messages import Install, Installed, InstallFailed, LoadOrder
from elastic_ep.brain.seats import Seat, SeatState
from elastic_ep.brain.state import BrainState, Transaction
from elastic_ep.brain.verdict import DEADLINE, judge
from elastic_ep.core.recovery import Phase, Tier, Trigger


def on_planned(state: BrainState, event: Planned, now: float) -> None:
    if event.epoch != state.membership.epoch or state.group.phase is not Phase.PLANNING:
        return
    epoch = state.membership.epoch
    if event.plan is None:
        state.group.apply(Trigger.TOO_FEW_SLOTS, now=now, epoch=epoch, reason=event.reason)
        members.abort_all(state, event.reason)
        operations.undo(state, event.reason, now)
        members.close_record(state, now)
        return
    state.plan = event.plan
    state.group.apply(Trigger.PLANNED, now=now, epoch=epoch, reason=event.plan.reason)
    if state.record:
        state.record.planned, state.record.reason = now, event.plan.reason
        state.record.experts_lost = max(state.record.experts_lost, event.plan.experts_lost)
        state.record.tier = max(state.record.tier, Tier.COVER if event.plan.loads else Tier.MASK)
    send_installs(state, event.plan, now)


def load_orders(state: BrainState, plan: GroupPlan) -> dict[int, tuple[LoadOrder, ...]]:
    """What each rank is to load for a plan, with where from and which digest must come."""
    orders: dict[int, list[LoadOrder]] = {}
    for (layer, slot, expert), source in zip(plan.loads, plan.sources, strict=True):
        order = LoadOrder(layer, slot, expert, source.kind.value, source.rank, state.digests.get((layer, expert)))
        orders.setdefault(int(state.topology.rank_of_slot[slot]), []).append(order)
    return {rank: tuple(loads) for rank, loads in sorted(orders.items())}


def note_sources(state: BrainState, rank: int, errors: tuple[str, ...]) -> None:
    """Sources that a rank had to pass over."""
    if errors:
        state.publish("source_failed", rank=rank, errors=list(errors[:4]), more=max(0, len(errors) - 4))


def install_of(state: BrainState, epoch: int, active: tuple[int, ...], plan: GroupPlan) -> Install:
    """What an epoch with these members installs; each member's own loads are still to be put in."""
    return Install(
        epoch=epoch,
        active_ranks=active,
        slots_per_rank=state.topology.slots_per_rank,
        num_layers=state.settings.num_layers,
        num_experts=state.settings.plan.num_experts,
        peers={},
        physical_to_logical_map=plan.placement.physical_to_logical_map.astype("<i4").tobytes(),
        quotas=None if plan.quotas is None else plan.quotas.astype("<f8").tobytes(),
        streamed=tuple((layer, expert, rank) for (layer, expert), rank in sorted(plan.streamed.items())),
        loads=(),
        deadline_s=state.settings.install_timeout_s / 2,
        streamed_digests=tuple(state.digests.get(pair) for pair in sorted(plan.streamed)),
    )


def send_installs(state: BrainState, plan: GroupPlan, now: float) -> None:
    ranks = state.membership.ranks
    orders = dict.fromkeys(ranks, ()) | load_orders(state, plan)
    for layer, slot, _ in plan.loads:
        state.contents.order(layer, slot, state.membership.epoch)
    peers = {rank: state.seats[rank].address for rank in ranks}
    patience = state.settings.install_deadline_s(max(map(len, orders.values())))
    state.install = Transaction(state.membership.epoch, set(ranks), now, now + patience)
    common = install_of(state, state.membership.epoch, state.membership.active, plan)
    state.out += [Send(rank, replace(common, peers=peers, loads=orders[rank])) for rank in ranks]


def record_loaded(state: BrainState, seat: Seat, message: Installed | InstallFailed, now: float) -> bool:
    """Take over what a rank has loaded. The first digest of an expert is the one to match: a rank that read other bytes is given up."""
    for slot in message.loaded:
        known = state.digests.setdefault((slot.layer, slot.expert), slot.digest)
        if known != slot.digest:
            detail = f"layer {slot.layer} expert {slot.expert}: digest {slot.digest:016x}, read before as {known:016x}"
            members.fail(state, seat.rank, FailureCause.FATAL, detail, now)
            return False
        state.contents.record(slot.layer, slot.slot, slot.expert, slot.digest, message.epoch)
    return True


def on_installed(state: BrainState, seat: Seat, message: Installed, now: float) -> None:
    if not record_loaded(state, seat, message, now):
        return
    note_sources(state, seat.rank, message.source_errors)
    if state.record:
        for kind, num_bytes in message.bytes_read.items():
            state.record.bytes_moved[kind] += num_bytes
        if message.epoch == state.membership.epoch:
            state.record.rank_move_ms = max(state.record.rank_move_ms, message.move_ms)
    if state.install is None or message.epoch != state.install.number:
        return
    state.install.pending.discard(seat.rank)
    if state.install.pending:
        return
    state.install = None
    assert state.plan is not None
    assert not state.contents.mismatches(state.plan.placement), "a member does not hold what the placement says"
    for rank in state.membership.ranks:
        if state.seats[rank].state is SeatState.READY:
            state.seats[rank].move(SeatState.ACTIVE)
            state.seats[rank].failed_starts = 0
            state.seats[rank].member_since = now
    operations.check(state, now)
    if state.record:
        state.record.moved = now
    state.group.apply(Trigger.INSTALLED, now=now, epoch=message.epoch, reason=f"{len(state.membership.ranks)} ranks installed")
    state.publish("installed", epoch=message.epoch, active_ranks=list(state.membership.active))


def on_install_failed(state: BrainState, seat: Seat, message: InstallFailed, now: float) -> None:
    if not record_loaded(state, seat, message, now):
        return
    if state.install is None or message.epoch != state.install.number:
        return
    if message.error:
        members.fail(state, seat.rank, FailureCause.FATAL, message.error, now)
    else:
        accuse(state, state.install, seat.rank, message.failed_peers, now)


def accuse(state: BrainState, transaction: Transaction, accuser: int, accused: dict[int, str], now: float) -> None:
    """Judge when the window closes, or, of missed deadlines only, when everyone else has spoken. A closed channel mostly means a
    process that ended, and the news of that is on its way here."""
    transaction.accusations[accuser] = accused
    if transaction.verdict_at is None:
        transaction.verdict_at = now + state.settings.verdict_window_s
    named = {peer for peers in transaction.accusations.values() for peer in peers}
    late = all(how == DEADLINE for peers in transaction.accusations.values() for how in peers.values())
    if late and not transaction.pending - set(transaction.accusations) - named:
        reach_verdict(state, transaction, now)


def reach_verdict(state: BrainState, transaction: Transaction, now: float) -> None:
    transaction.verdict_at = None
    answered = set(state.membership.ranks) - transaction.pending | set(transaction.accusations)
    dead = [s.rank for s in state.seats if not s.is_alive]
    for rank, reason in judge(transaction.accusations, answered, dead).guilty.items():
        members.fail(state, rank, FailureCause.PEERS, reason, now)
