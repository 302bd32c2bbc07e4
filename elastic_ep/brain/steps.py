"""Steps as transactions: started on every member, committed when all have answered. Functions over the brain's state."""

from __future__ import annotations

from elastic_ep.brain import changes, members, operations
from elastic_ep.brain.events import Emit, FailureCause, Send, StepCommitted
from elastic_ep.brain.messages import RunStep, SampledToken, SequenceWork, StepDone
from elastic_ep.brain.requests import Sequence
from elastic_ep.brain.scheduler import StepWork, decode_work, place_waiting, step_work
from elastic_ep.brain.seats import Seat
from elastic_ep.brain.state import BrainState, Transaction
from elastic_ep.core.recovery import Phase, Trigger

_MAY_STEP = (Phase.SERVING, Phase.RESUMING)


def run_step(state: BrainState, now: float) -> None:
    """Start the next step if the group may serve and there is anything to do; before it, install a change that is due."""
    if state.group.phase not in _MAY_STEP or state.step is not None:
        return
    changes.consider(state, now)
    state.out += state.between_steps
    state.between_steps = []
    if state.change is not None and state.change.is_due:
        changes.switch(state, now)
        return
    work = _next_work(state)
    if not any(work.values()):
        if state.group.phase is Phase.RESUMING:
            resumed(state, now, "nothing to resume")
            run_step(state, now)  # what waited for the end of the recovery begins now, not with the next event
        return
    state.steps_run += 1
    state.step = Transaction(state.steps_run, set(work), now, now + state.settings.step_timeout_s, work)
    for rank, items in work.items():
        state.step.release[rank], state.release[rank] = tuple(state.release[rank]), []
        message = RunStep(state.membership.epoch, state.step.number, tuple(w for _, w in items), state.step.release[rank])
        state.out.append(Send(rank, message))


def _next_work(state: BrainState) -> StepWork:
    """Of the first step after a recovery: streams that lost nothing go on, and do not wait for the prefill of those that moved."""
    if not (state.requests.waiting or state.requests.running):
        return {}
    place_waiting(state.requests, operations.homes(state), state.settings.limits)
    where = (state.requests, state.membership.ranks, state.settings.limits)
    if state.group.phase is Phase.RESUMING and any((work := decode_work(*where)).values()):
        return work
    return step_work(*where)


def on_step_done(state: BrainState, seat: Seat, done: StepDone, now: float) -> None:
    step = state.step
    if step is None or (done.epoch, done.step) != (state.membership.epoch, step.number):
        return
    step.pending.discard(seat.rank)
    if done.expert_counts is not None:
        state.load.add(done.expert_counts, now)
    for token in done.tokens:
        step.tokens[token.seq_id] = token
    if not step.pending:
        commit(state, step, now)


def commit(state: BrainState, step: Transaction, now: float) -> None:
    for rank, items in step.work.items():
        for _, work in items:
            if work.sample is not None and work.seq_id not in step.tokens:
                members.fail(state, rank, FailureCause.FATAL, f"no token for sequence {work.seq_id} in step {step.number}", now)
                return
    state.step = None
    state.out.append(StepCommitted(step.number, step.started))
    for items in step.work.values():
        for sequence, work in items:
            commit_sequence(state, sequence, work, step.tokens.get(work.seq_id))
    if state.group.phase is Phase.RESUMING and step.tokens:
        resumed(state, now, f"step {step.number} committed")


def commit_sequence(state: BrainState, sequence: Sequence, work: SequenceWork, token: SampledToken | None) -> None:
    request_id = sequence.request.request_id
    if state.requests.find(request_id) is not sequence:
        return
    event = sequence.commit(work, token)
    if event is None:
        return
    state.tokens_committed += 1
    state.out.append(Emit(request_id, event))
    if event.finish:
        members.drop(state, request_id)
        state.requests.finished += 1


def resumed(state: BrainState, now: float, reason: str) -> None:
    state.group.apply(Trigger.COMMITTED, now=now, epoch=state.membership.epoch, reason=reason)
    members.close_record(state, now)
