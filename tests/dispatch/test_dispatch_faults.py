"""Real processes that die or hang in the middle of a layer: who is named, how soon, what is left intact, and that the survivors go on."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from dispatch_processes import Fault, Report

from elastic_ep.runtime.dispatch.base import FailureKind, PeerFailed

pytestmark = pytest.mark.timeout(60)
SOON_S = 2.0
BIG = {"hidden": 4096, "max_tokens": 64}
BETWEEN = [Fault("before_dispatch"), Fault("before_dispatch", layer=1), Fault("before_combine")]
IN_SMALL_FRAMES = [
    Fault("mid_dispatch", bytes_sent=1),
    Fault("mid_dispatch", bytes_sent=64),
    Fault("mid_dispatch", bytes_sent=700),
    Fault("mid_combine", layer=1, bytes_sent=100),
]
IN_LARGE_FRAMES = [
    Fault("mid_dispatch", bytes_sent=64),
    Fault("mid_dispatch", bytes_sent=150_000),
    Fault("mid_combine", bytes_sent=150_000),
]
KILLS = [
    *(("unix", fault) for fault in BETWEEN + IN_SMALL_FRAMES),
    *(("inline", fault) for fault in IN_LARGE_FRAMES),
    *(("tcp", fault) for fault in [BETWEEN[0], *IN_LARGE_FRAMES[1:]]),
]


def name_of(fault: Fault) -> str:
    return f"{fault.point}-layer{fault.layer}-{fault.bytes_sent}bytes"


def check_named(reports: dict[int, list[Report]], failed: dict[int, FailureKind]) -> None:
    for rank, (report,) in reports.items():
        assert report.outcome == PeerFailed(failed), f"rank {rank}"
        assert report.wrong == (), f"rank {rank}"


@pytest.mark.parametrize(("backend", "fault"), KILLS, ids=lambda value: value if isinstance(value, str) else name_of(value))
def test_killed(make_ranks: Any, backend: str, fault: Fault) -> None:
    ranks = make_ranks(backend, 4, grace_s=0.5)
    ranks.check_steps(range(4), 3)
    ranks.install(range(4))
    reports = ranks.run(range(4), faults={2: fault}, **BIG)
    ranks.wait_dead(2)
    check_named(reports, {2: FailureKind.CLOSED})
    assert max(r.took_s for (r,) in reports.values()) < SOON_S
    ranks.install([0, 1, 3])
    ranks.check_steps([0, 1, 3], 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_shared_memory_are_not_overwritten_before_they_are_read(make_ranks: Any, dtype: torch.dtype) -> None:
    """Large rows, many layers, more ranks than cores: a region that is written too early shows as a wrong sum."""
    make_ranks("unix", 4).check_steps(range(4), 6, num_layers=6, hidden=8192, max_tokens=24, dtype=dtype)


def test_killed_one_after_the_other_down_to_one(make_ranks: Any) -> None:
    ranks = make_ranks("unix", 4)
    alive = [0, 1, 2, 3]
    for victim in (0, 3, 1):
        ranks.run(alive, faults={victim: Fault("before_combine")})
        ranks.wait_dead(victim)
        alive.remove(victim)
        ranks.install(alive)
        ranks.check_steps(alive, 20, dtype=torch.bfloat16)


def test_two_killed_at_once(make_ranks: Any) -> None:
    ranks = make_ranks("unix", 4, grace_s=0.5)
    reports = ranks.run(range(4), faults={0: Fault("before_dispatch"), 3: Fault("before_dispatch")})
    check_named(reports, {0: FailureKind.CLOSED, 3: FailureKind.CLOSED})
    ranks.wait_dead(0)
    ranks.wait_dead(3)
    ranks.install([1, 2])
    ranks.check_steps([1, 2], 100)


@pytest.mark.parametrize("point", ["before_dispatch", "before_combine"])
@pytest.mark.parametrize("backend", ["unix", "tcp"])
def test_stopped_is_named_at_the_deadline_and_changes_nothing_when_it_wakes(make_ranks: Any, backend: str, point: str) -> None:
    ranks = make_ranks(backend, 3, deadline_s=0.4)
    reports = ranks.run(range(3), faults={1: Fault(point, signal=signal.SIGSTOP)})
    check_named(reports, {1: FailureKind.DEADLINE})
    assert all(0.35 < r.took_s < SOON_S for (r,) in reports.values())
    ranks.install([0, 2])
    ranks.check_steps([0, 2], 50)
    os.kill(ranks.pid(1), signal.SIGCONT)
    (woken,) = ranks.answer(1)
    assert woken.outcome == PeerFailed({0: FailureKind.CLOSED, 2: FailureKind.CLOSED})
    ranks.check_steps([0, 2], 50)


def test_a_new_process_takes_the_seat_while_the_old_one_is_stopped(make_ranks: Any) -> None:
    ranks = make_ranks("unix", 3, deadline_s=0.4)
    ranks.run(range(3), faults={1: Fault("before_dispatch", signal=signal.SIGSTOP)})
    old = ranks.members.pop(1)
    ranks.start(1)
    ranks.install(range(3))
    ranks.check_steps(range(3), 20)
    os.kill(old.process.pid, signal.SIGCONT)
    assert old.pipe.poll(20)
    old.pipe.recv()
    ranks.check_steps(range(3), 20, num_layers=1)
    old.process.kill()
    old.process.join()
    old.pipe.close()


@pytest.mark.parametrize("seat", [0, 1, 2])
@pytest.mark.parametrize("backend", ["unix", "tcp"])
def test_a_newcomer_joins_running_ranks(make_ranks: Any, backend: str, seat: int) -> None:
    ranks = make_ranks(backend, 3)
    os.kill(ranks.pid(seat), signal.SIGKILL)
    ranks.wait_dead(seat)
    others = [r for r in range(3) if r != seat]
    ranks.install(others)
    ranks.check_steps(others, 5)
    ranks.start(seat)
    ranks.install(range(3))
    ranks.check_steps(range(3), 20)


def test_killed_while_no_call_runs_shows_at_the_next_call(make_ranks: Any) -> None:
    ranks = make_ranks("unix", 3, grace_s=0.5)
    ranks.check_steps(range(3), 2)
    os.kill(ranks.pid(1), signal.SIGKILL)
    ranks.wait_dead(1)
    ranks.install([0, 2])
    ranks.check_steps([0, 2], 5)
    os.kill(ranks.pid(2), signal.SIGKILL)
    ranks.wait_dead(2)
    ranks.epoch += 1
    ranks.tell(0, "steps", [ranks.step([0, 2])], None)
    (report,) = ranks.answer(0)
    assert report.outcome == PeerFailed({2: FailureKind.CLOSED})
