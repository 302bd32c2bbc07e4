"""Death and hang in a real MPI job: a spare process takes the seat of each that dies."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dispatch_processes import Fault, Ranks
from dispatch_world import CONNECT_S
from mpi_job import MpiJob
from test_dispatch_faults import BIG, SOON_S, check_named, name_of

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.dispatch.base import FailureKind, Interrupted, PeerFailed
from elastic_ep.runtime.dispatch.mpi import MpiDispatcher

SEATS = range(4)
KILLS = [
    Fault("before_dispatch"),
    Fault("before_combine", layer=1),
    Fault("mid_dispatch", messages_sent=1),
    Fault("mid_combine", messages_sent=2),
]
DEADLINE_S = 1.0
"""no rank may come this late to an exchange, however busy the machine"""
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def seats(mpi_job: MpiJob) -> Iterator[Ranks]:
    folder = Path(tempfile.mkdtemp(prefix="eep"))
    yield Ranks("mpi", folder / "ranks", {"grace_s": 0.5, "deadline_s": 10.0}, mpi_job)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ranks(seats: Ranks) -> Ranks:
    """All seats taken and connected, each by a new dispatcher."""
    for seat in SEATS:
        if seat in seats.members:
            restart(seats, seat, seats.options)
        else:
            seats.start(seat)
    seats.install(SEATS)
    return seats


def restart(ranks: Ranks, seat: int, options: dict[str, Any]) -> None:
    """Another dispatcher in the same process."""
    ranks.tell(seat, "start", seat, options)
    ranks.answer(seat)


@pytest.mark.parametrize("fault", KILLS, ids=name_of)
def test_killed(ranks: Ranks, fault: Fault) -> None:
    """Large rows: in the middle of an exchange some have arrived, some are being read from the dead process's memory."""
    ranks.check_steps(SEATS, 3)
    reports = ranks.run(SEATS, faults={2: fault}, **BIG)
    ranks.wait_dead(2)
    check_named(reports, {2: FailureKind.CLOSED})
    assert max(r.took_s for (r,) in reports.values()) < SOON_S
    ranks.install([0, 1, 3])
    ranks.check_steps([0, 1, 3], 20)


@pytest.mark.parametrize("point", ["before_dispatch", "before_combine"])
def test_stopped_is_named_at_the_deadline_and_changes_nothing_when_it_wakes(ranks: Ranks, point: str) -> None:
    """Woken, it finds itself dropped; named again, it serves again."""
    for seat in SEATS:
        restart(ranks, seat, {"deadline_s": DEADLINE_S})
    ranks.install(SEATS)
    reports = ranks.run(SEATS, faults={1: Fault(point, signal=signal.SIGSTOP)}, **BIG)
    try:
        check_named(reports, {1: FailureKind.DEADLINE})
        assert all(DEADLINE_S - 0.05 < r.took_s < DEADLINE_S + SOON_S for (r,) in reports.values())
        ranks.install([0, 2, 3])
        ranks.check_steps([0, 2, 3], 20)
    finally:
        ranks.members[1].process.wake()
    (woken,) = ranks.answer(1)
    assert woken.outcome == PeerFailed(dict.fromkeys([0, 2, 3], FailureKind.CLOSED))
    ranks.check_steps([0, 2, 3], 20)
    ranks.install(SEATS)
    ranks.check_steps(SEATS, 3, **BIG)


def test_a_rank_that_left_and_came_back_is_heard_by_ranks_that_saw_neither(ranks: Ranks) -> None:
    """Its farewell and its hello wait for the others, who still hold its link for open when they are told to connect."""
    for present in 20 * [[0, 1], SEATS]:
        restart(ranks, 0, ranks.options)
        ranks.install(present, deadline_s=2.0)
        ranks.check_steps(present, 1)


def test_one_rank_is_in_the_next_connect_while_another_is_still_in_the_last(ranks: Ranks) -> None:
    """Rank 3 does not come. Rank 0 gives it up before rank 1 does, and is told to go on without waiting for that."""
    given_up = PeerFailed({3: FailureKind.DEADLINE})
    three = {r: ranks.members[r].address for r in (0, 1, 3)}
    ranks.epoch += 2
    for rank, deadline_s in ((0, 0.1), (1, 0.5)):
        ranks.tell(rank, "connect", three, deadline_s, ranks.epoch - 1)
    assert ranks.answer(0) == given_up
    for rank in (0, 1):
        ranks.tell(rank, "connect", {r: three[r] for r in (0, 1)}, 5.0, ranks.epoch)
    assert [ranks.answer(rank) for rank in (1, 0, 1)] == [given_up, None, None]
    ranks.check_steps([0, 1], 3)
    ranks.tell(0, "connect", three, 1.0, ranks.epoch)
    with pytest.raises(InvalidInputError, match="give each a higher one"):
        ranks.answer(0)


def test_a_process_in_another_seat_than_before_is_no_stranger(ranks: Ranks) -> None:
    """What it said in its old seat, and what was said to that, is still to be read."""
    ranks.members[1], ranks.members[2] = ranks.members[2], ranks.members[1]
    restart(ranks, 1, ranks.options)
    restart(ranks, 2, ranks.options)
    ranks.install(SEATS, deadline_s=5.0)
    ranks.check_steps(SEATS, 1)


def test_rows_that_nobody_has_read_outlive_their_dispatcher(ranks: Ranks) -> None:
    """MPI reads them from where they were when they are asked for at last, in the next connect of a rank that did not come to the step."""
    restart(ranks, 0, ranks.options | {"deadline_s": 0.1})
    for _ in range(5):
        ranks.install([0, 1])
        ranks.tell(0, "steps", [ranks.step([0, 1], **BIG)], None)
        (report,) = ranks.answer(0)
        assert report.outcome == PeerFailed({1: FailureKind.DEADLINE})
        restart(ranks, 0, ranks.options | {"deadline_s": 0.1})
    ranks.install([0, 1], deadline_s=5.0)
    restart(ranks, 0, ranks.options)
    ranks.install([0, 1], deadline_s=5.0)
    ranks.check_steps([0, 1], 3, **BIG)


def test_a_word_from_the_controller_ends_a_wait(ranks: Ranks) -> None:
    """The pipe of rank 0 stands for its control channel; rank 1 never comes to the step."""
    restart(ranks, 0, {"interruptible": True})
    ranks.install([0, 1])
    ranks.tell(0, "steps", [ranks.step([0, 1])], None)
    ranks.tell(0, "connect", {0: ranks.members[0].address}, CONNECT_S, ranks.epoch + 1)
    (report,) = ranks.answer(0)
    assert report.outcome == Interrupted()
    assert ranks.answer(0) is None


def test_a_process_that_does_not_exist_or_two_ranks_in_one_are_refused(ranks: Ranks) -> None:
    for peers, words in (({0: "mpi:99"}, "no process"), ({1: "unix:a"}, "no process"), ({1: "mpi:1", 2: "mpi:1"}, "its own process")):
        ranks.tell(0, "connect", peers, 1.0, ranks.epoch + 1)
        with pytest.raises(InvalidInputError, match=words):
            ranks.answer(0)


def test_without_mpi_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(InvalidInputError, match=r"pip install 'elastic-ep\[mpi\]'"):
        MpiDispatcher(0).listen()


def test_two_killed_at_once_then_one_that_nobody_waits_for(ranks: Ranks) -> None:
    """`connect` names a dead process as soon as MPI knows of its death, not at the deadline."""
    reports = ranks.run(SEATS, faults={0: Fault("before_dispatch"), 3: Fault("before_dispatch")})
    check_named(reports, {0: FailureKind.CLOSED, 3: FailureKind.CLOSED})
    ranks.wait_dead(0)
    ranks.wait_dead(3)
    ranks.install([1, 2])
    ranks.check_steps([1, 2], 20)
    ranks.install([1])
    peers = {r: ranks.members[r].address for r in (1, 2)}
    ranks.members[2].process.kill()
    ranks.wait_dead(2)
    begin = time.monotonic()
    ranks.epoch += 1
    ranks.tell(1, "connect", peers, CONNECT_S, ranks.epoch)
    assert ranks.answer(1) == PeerFailed({2: FailureKind.CLOSED})
    assert time.monotonic() - begin < CONNECT_S / 2
    ranks.install([1])
    ranks.check_steps([1], 20)
