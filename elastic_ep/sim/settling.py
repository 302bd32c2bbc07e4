"""When a run is over: not when the clients are served, but when the group has what it can have again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic_ep.brain import members
from elastic_ep.brain.seats import SeatState
from elastic_ep.core.recovery import Phase

if TYPE_CHECKING:
    from elastic_ep.sim.world import World


def unsettled(world: World) -> str:
    """What is still to come though no client waits for it: hosts that return, seats that are filled, redundancy. "" when nothing is."""
    state = world.brain.state
    if world.stopped is not None or state.stopping:
        return ""
    for host in world.hosts.values():
        if not host.agent or host.holder != host.agent:
            return f"host {host.machine.name} is away"
    settled = (SeatState.ACTIVE, SeatState.READY) if state.group.phase is Phase.REFUSING else (SeatState.ACTIVE,)
    for seat in state.seats:
        if seat.state not in settled and (seat.is_alive or seat.state is SeatState.FENCING or members.may_restart(state, seat)):
            return f"rank {seat.rank} is {seat.state.value}"
    for process in world.processes.values():
        if process.is_alive and not process.is_stopped and not world.brain.expects(process.rank, process.incarnation):
            return f"process {process.incarnation} of rank {process.rank} was given up, and runs on"
    is_calm = state.change is None and state.next_round is None and not state.restore_due and state.group.phase is Phase.SERVING
    return "" if is_calm or state.group.phase is Phase.REFUSING else f"the group is {state.group.phase.value}, and changes"
