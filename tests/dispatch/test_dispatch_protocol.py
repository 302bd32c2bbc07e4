"""The socket backend in one process: interrupts, stale and early frames, handshakes, and peers that say what is not so."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dispatch_cases import Batch, expected, make_batch, make_routing, run_experts, same_bits
from dispatch_world import CONNECT_S, TOKEN, World, run_ranks

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.runtime.dispatch import handshake
from elastic_ep.runtime.dispatch.base import DispatchHandle, FailureKind, Interrupted, PeerFailed, StepPoint
from elastic_ep.runtime.dispatch.frames import FrameFormat, FrameKey, Phase
from elastic_ep.runtime.dispatch.link import LinkedState
from elastic_ep.runtime.dispatch.rows import compiled
from elastic_ep.runtime.dispatch.socket import SocketDispatcher

pytestmark = pytest.mark.timeout(30)
EXPERTS, TOP_K, HIDDEN = 8, 2, 6


def routing_of(ranks: list[int], epoch: int) -> RoutingTable:
    return make_routing(np.random.default_rng(epoch), ranks, EXPERTS, 1, epoch)


def batch_of(rank: int, num_tokens: int, hidden: int = HIDDEN) -> Batch:
    return make_batch(np.random.default_rng((rank, num_tokens)), num_tokens, TOP_K, EXPERTS, hidden, torch.float32)


def dispatch(dispatcher: Any, batch: Batch, ranks: list[int], epoch: int, step: int = 0) -> Any:
    return dispatcher.dispatch(batch.x, batch.topk_ids, batch.topk_weights, routing_of(ranks, epoch), StepPoint(epoch, step, 0))


def layer(dispatcher: Any, batch: Batch, ranks: list[int], epoch: int, step: int = 0) -> Any:
    handle = dispatch(dispatcher, batch, ranks, epoch, step)
    return dispatcher.combine(run_experts(handle), handle) if isinstance(handle, DispatchHandle) else handle


def check_layer(world: World, epoch: int, step: int = 0, num_tokens: int = 4, hidden: int = HIDDEN) -> None:
    batches = {r: batch_of(r, num_tokens, hidden) for r in world.ranks}
    outs = run_ranks({r: lambda r=r: layer(world.dispatchers[r], batches[r], world.ranks, epoch, step) for r in world.ranks})
    for rank, batch in batches.items():
        assert isinstance(outs[rank], torch.Tensor), f"rank {rank}: {outs[rank]}"
        assert same_bits(outs[rank], expected(batch)), f"rank {rank}"


class Switch:
    """An interrupt that a test turns on and off."""

    def __init__(self) -> None:
        self.near, self._far = socket.socketpair()

    def on(self) -> None:
        self._far.send(b"!")

    def off(self) -> None:
        self.near.recv(1)

    def close(self) -> None:
        self.near.close()
        self._far.close()


@pytest.fixture
def switch() -> Iterator[Switch]:
    made = Switch()
    yield made
    made.close()


def interrupted_in(call: Callable[[], Any], switch: Switch, waits_s: float = 0.05) -> Any:
    """Run a call that waits for a peer, interrupt it once it has been waiting, and return what it returned."""
    turn_on = threading.Timer(waits_s, switch.on)
    turn_on.start()
    result = call()
    turn_on.join()
    switch.off()
    return result


# ---- interrupts, old frames, early frames


@pytest.mark.parametrize("backend", ["unix", "inline", "tcp"])
def test_an_interrupt_ends_the_wait_and_leaves_the_channels_usable(make_world: Any, switch: Switch, backend: str) -> None:
    world = make_world(backend, 2, interrupts={0: switch.near, 1: switch.near})
    begin = time.monotonic()
    for epoch in (1, 2, 3):
        assert interrupted_in(lambda e=epoch: dispatch(world.dispatchers[0], batch_of(0, 4), [0, 1], e), switch) == Interrupted()
    assert time.monotonic() - begin < 5
    check_layer(world, epoch=4)
    assert world.dispatchers[1].stale_frames == 3
    assert world.dispatchers[0].stale_frames == 0


def test_an_interrupt_that_is_on_before_the_call_ends_it_at_once(make_world: Any, switch: Switch) -> None:
    world = make_world("unix", 2, interrupts={0: switch.near, 1: switch.near})
    switch.on()
    assert dispatch(world.dispatchers[0], batch_of(0, 1), [0, 1], 1) == Interrupted()
    switch.off()
    check_layer(world, epoch=2)


@pytest.mark.parametrize("backend", ["unix", "inline", "tcp"])
def test_frames_of_a_void_step_are_dropped_and_those_of_the_next_are_kept(make_world: Any, switch: Switch, backend: str) -> None:
    """Rank 1 never saw the void step; rank 0 already waits in the next epoch when rank 1 comes."""
    world = make_world(backend, 2, interrupts={0: switch.near, 1: switch.near})
    zero, one = (world.dispatchers[r] for r in (0, 1))
    handles = run_ranks({r: lambda r=r: dispatch(world.dispatchers[r], batch_of(r, 5), [0, 1], 1) for r in (0, 1)})
    assert interrupted_in(lambda: zero.combine(run_experts(handles[0]), handles[0]), switch) == Interrupted()
    check_layer(world, epoch=2, num_tokens=0)
    assert one.stale_frames == 1
    check_layer(world, epoch=2, step=1)


@pytest.mark.parametrize("num_tokens", [0, 3, 3000])
@pytest.mark.parametrize("backend", ["unix", "inline", "tcp"])
def test_an_early_frame_waits_for_its_turn(make_world: Any, switch: Switch, backend: str, num_tokens: int) -> None:
    """Rank 1 left a step before rank 0 did and is in the next epoch already."""
    other = Switch()
    world = make_world(backend, 2, interrupts={0: switch.near, 1: other.near})
    zero, one = (world.dispatchers[r] for r in (0, 1))
    assert interrupted_in(lambda: dispatch(one, batch_of(1, 2, 64), [0, 1], 1), other) == Interrupted()
    done: list[Any] = []
    ahead = threading.Thread(target=lambda: done.append(layer(one, batch_of(1, num_tokens, 64), [0, 1], 2)))
    ahead.start()
    handle = dispatch(zero, batch_of(0, 2, 64), [0, 1], 1)
    assert isinstance(handle, DispatchHandle)
    assert interrupted_in(lambda: zero.combine(run_experts(handle), handle), switch) == Interrupted()
    out = layer(zero, batch_of(0, num_tokens, 64), [0, 1], 2)
    ahead.join(20)
    other.close()
    assert same_bits(out, expected(batch_of(0, num_tokens, 64)))
    assert same_bits(done[0], expected(batch_of(1, num_tokens, 64)))
    assert (zero.stale_frames, one.stale_frames) == (0, 2)


@pytest.mark.parametrize("backend", ["inline", "tcp"])
def test_half_written_and_half_read_frames_do_not_shift_the_stream(make_world: Any, switch: Switch, backend: str) -> None:
    """Frames far larger than the sockets' buffers are cut off twice: once with nobody reading, once while rank 1 reads."""
    world = make_world(backend, 2, interrupts={0: switch.near, 1: switch.near})
    zero, one = (world.dispatchers[r] for r in (0, 1))
    big = batch_of(0, 3000, 2048)
    assert interrupted_in(lambda: dispatch(zero, big, [0, 1], 1), switch) == Interrupted()
    assert zero._mesh.channels[1].has_unsent
    assert interrupted_in(lambda: dispatch(one, batch_of(1, 1, 2048), [0, 1], 1), switch) == Interrupted()
    check_layer(world, epoch=2, num_tokens=5)
    assert one.stale_frames == 1
    assert zero.stale_frames == 1


def test_a_deadline_names_the_silent_peer_and_the_channel_still_works(make_world: Any) -> None:
    world = make_world("unix", 3, deadline_s=0.2)
    results = run_ranks({r: lambda r=r: dispatch(world.dispatchers[r], batch_of(r, 2), [0, 1, 2], 1) for r in (0, 2)})
    for failed in results.values():
        assert failed.peers == {1: FailureKind.DEADLINE}
        assert isinstance(failed.partial, DispatchHandle)
    check_layer(world, epoch=2)
    assert world.dispatchers[1].stale_frames == 2


def test_what_the_others_sent_is_in_the_partial_result(make_world: Any) -> None:
    world = make_world("unix", 3, grace_s=5.0, deadline_s=5.0)
    world.dispatchers.pop(2).close()
    results = run_ranks({r: lambda r=r: dispatch(world.dispatchers[r], batch_of(r, 6), [0, 1, 2], 1) for r in (0, 1)})
    routing = routing_of([0, 1, 2], 1)
    for rank, failed in results.items():
        assert failed.peers == {2: FailureKind.CLOSED}
        got = [(e, failed.partial.rows[i].tolist()) for e, start, end in failed.partial.groups for i in range(start, end)]
        wanted = []
        for source in (0, 1):
            batch = batch_of(source, 6)
            to = routing.destination_ranks(0, batch.topk_ids.numpy(), source, 0)
            wanted += [(int(batch.topk_ids[t, k]), batch.x[t].tolist()) for t in range(6) for k in range(TOP_K) if to[t, k] == rank]
        assert sorted(got) == sorted(wanted)


def test_sums_of_a_failed_combine_are_those_of_the_peers_that_answered(make_world: Any) -> None:
    world = make_world("unix", 3, grace_s=5.0, deadline_s=5.0)
    handles = run_ranks({r: lambda r=r: dispatch(world.dispatchers[r], batch_of(r, 6), [0, 1, 2], 1) for r in range(3)})
    world.dispatchers.pop(1).close()
    results = run_ranks({r: lambda r=r: world.dispatchers[r].combine(run_experts(handles[r]), handles[r]) for r in (0, 2)})
    for rank, failed in results.items():
        assert failed.peers == {1: FailureKind.CLOSED}
        batch = batch_of(rank, 6)
        to = torch.from_numpy(routing_of([0, 1, 2], 1).destination_ranks(0, batch.topk_ids.numpy(), rank, 0))
        answered = Batch(batch.x, batch.topk_ids, batch.topk_weights * (to != 1))
        assert torch.equal(failed.partial, expected(answered))


@pytest.mark.parametrize("backend", ["unix", "numpy"])
def test_a_signal_is_handled_and_the_wait_goes_on(make_world: Any, backend: str) -> None:
    world = make_world(backend, 2, deadline_s=0.3)
    came: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: came.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        failed = dispatch(world.dispatchers[0], batch_of(0, 2), [0, 1], 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert failed.peers == {1: FailureKind.DEADLINE}
    assert came


@pytest.mark.parametrize("backend", ["unix", "numpy"])
def test_one_who_slept_past_the_deadline_reads_what_came_before_it_blames(make_world: Any, backend: str, switch: Switch) -> None:
    """Both frames are there when rank 0 begins, and its time is up at once, as if it had been stopped in between."""
    world = make_world(backend, 3, interrupts={1: switch.near, 2: switch.near})
    calls = {r: lambda r=r: dispatch(world.dispatchers[r], batch_of(r, 3), [0, 1, 2], 1) for r in (1, 2)}
    switch.on()
    assert run_ranks(calls) == {1: Interrupted(), 2: Interrupted()}
    world.dispatchers[0]._exchange.deadline_s = 0.0
    assert isinstance(dispatch(world.dispatchers[0], batch_of(0, 3), [0, 1, 2], 1), DispatchHandle)


# ---- which path


@pytest.mark.parametrize(("backend", "linked"), [("unix", True), ("numpy", False), ("inline", False), ("page", True), ("tcp", False)])
def test_ranks_that_share_memory_take_the_compiled_path(make_world: Any, backend: str, linked: bool) -> None:
    if compiled is None:
        pytest.skip("the extension was not built")
    world = make_world(backend, 2)
    small, large = 3, 600
    for step, (num_tokens, wanted) in enumerate(((small, linked), (large, linked and backend != "page"), (small, linked))):
        batches = {r: batch_of(r, num_tokens) for r in (0, 1)}
        calls = {r: lambda r=r, b=b, s=step: dispatch(world.dispatchers[r], b, [0, 1], 1, s) for r, b in batches.items()}
        handles = run_ranks(calls)
        assert [isinstance(h.state, LinkedState) for h in handles.values()] == [wanted] * 2
        outs = run_ranks({r: lambda r=r, h=h: world.dispatchers[r].combine(run_experts(h), h) for r, h in handles.items()})
        assert all(same_bits(outs[r], expected(batches[r])) for r in (0, 1))


def test_both_paths_understand_each_other(make_world: Any) -> None:
    """Rank 1 has no extension."""
    world = make_world("unix", 3)
    world.dispatchers[1]._idle_link = lambda: None
    for step in range(5):
        check_layer(world, epoch=1, step=step, num_tokens=step)
    assert all(d.stale_frames == 0 for d in world.dispatchers.values())


# ---- membership


def test_connect_closes_whom_it_does_not_name_and_keeps_the_rest(make_world: Any) -> None:
    world = make_world("unix", 3)
    kept = world.dispatchers[0]._mesh.channels[2]
    gone = world.dispatchers.pop(1)
    assert world.connect() == {0: None, 2: None}
    assert world.dispatchers[0]._mesh.channels == {2: kept}
    check_layer(world, epoch=1)
    assert layer(gone, batch_of(1, 2), [0, 1, 2], 1).peers == {0: FailureKind.CLOSED, 2: FailureKind.CLOSED}
    world.dispatchers[1] = gone
    world.connect()
    check_layer(world, epoch=2)


@pytest.mark.parametrize("seat", [0, 1])
def test_a_new_incarnation_at_the_same_socket_path_replaces_the_old_one(folder: Path, seat: int) -> None:
    places = {r: f"unix:{folder}/{r}" for r in (0, 1)}
    ranks = {r: SocketDispatcher(r, place + "#1", token=TOKEN) for r, place in places.items()}
    world = World(dict(ranks), {r: d.listen() for r, d in ranks.items()})
    assert world.connect() == {0: None, 1: None}
    check_layer(world, epoch=1)
    ranks[seat].close()
    world.dispatchers[seat] = SocketDispatcher(seat, places[seat] + "#2", token=TOKEN)
    world.addresses[seat] = places[seat] + "#2"
    assert world.connect() == {0: None, 1: None}
    check_layer(world, epoch=2)
    world.close()
    assert not any(folder.iterdir())


def test_the_absent_are_named_at_the_deadline_and_the_present_are_connected(make_world: Any, folder: Path) -> None:
    world = make_world("unix", 2)
    peers = {0: world.addresses[0], 1: world.addresses[1], 2: f"unix:{folder}/absent"}
    begin = time.monotonic()
    assert world.dispatchers[0].connect(peers, 0.2) == PeerFailed({2: FailureKind.DEADLINE})
    lone = SocketDispatcher(3, f"unix:{folder}/3", token=TOKEN)
    assert lone.connect({2: peers[2], 3: lone.address}, 0.2) == PeerFailed({2: FailureKind.DEADLINE})
    assert time.monotonic() - begin < 5
    assert world.dispatchers[0].connected_ranks == (1,)
    lone.close()
    world.connect()
    check_layer(world, epoch=1)


def test_connect_is_interrupted(folder: Path, switch: Switch) -> None:
    with SocketDispatcher(0, f"unix:{folder}/0", token=TOKEN, interrupt=switch.near) as one:
        assert interrupted_in(lambda: one.connect({1: f"unix:{folder}/1"}, 20.0), switch) == Interrupted()


@pytest.fixture
def parted(folder: Path, switch: Switch, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Ranks 0 and 1: rank 0 has answered rank 1's call, and is done, when the interrupt comes before rank 1 reads the answer."""
    zero = SocketDispatcher(0, f"unix:{folder}/0", token=TOKEN)
    one = SocketDispatcher(1, f"unix:{folder}/1", token=TOKEN, interrupt=switch.near)
    world = World({0: zero, 1: one}, {0: zero.listen(), 1: one.listen()})
    poll, answered = one._mesh._poll, []

    def interrupted_poll(calls: Any, *rest: Any) -> Any:
        if not answered and any(call._sent for call in calls):
            answered.append(zero.connect(world.addresses, 10.0))
            switch.on()
        return poll(calls, *rest)

    monkeypatch.setattr(one._mesh, "_poll", interrupted_poll)
    assert one.connect(world.addresses, 10.0) == Interrupted()
    assert answered == [None]
    switch.off()
    yield world
    world.close()


def test_an_interrupt_between_a_call_and_its_answer_parts_nobody(parted: World) -> None:
    """Rank 0 is done with the next epoch's connect, too, before rank 1 begins with it."""
    zero, one = parted.dispatchers[0], parted.dispatchers[1]
    assert zero.connect(parted.addresses, 10.0) is None
    assert one.connect(parted.addresses, 1.0) is None
    check_layer(parted, epoch=2)


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_a_deadline_between_a_call_and_its_answer_parts_nobody(folder: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has answered rank 1's call, and is done; before rank 1 reads the answer its deadline passes, since a third rank is missing."""
    zero, one = (SocketDispatcher(r, f"unix:{folder}/{r}" if scheme == "unix" else "tcp:127.0.0.1:0", token=TOKEN) for r in (0, 1))
    with contextlib.closing(World({0: zero, 1: one}, {0: zero.listen(), 1: one.listen()})) as world:
        poll, answered = one._mesh._poll, []

        def late_poll(calls: Any, *rest: Any) -> Any:
            if not answered and any(call._sent for call in calls):
                answered.append(zero.connect(world.addresses, 10.0))
                return {}
            return {fd: what for fd, what in poll(calls, *rest).items() if len(answered) != 1}

        monkeypatch.setattr(one._mesh, "_poll", late_poll)
        missing = world.addresses | {2: f"unix:{folder}/2" if scheme == "unix" else "tcp:127.0.0.1:1"}
        assert one.connect(missing, 0.2) == PeerFailed({0: FailureKind.DEADLINE, 2: FailureKind.DEADLINE})
        answered.append(None)
        assert zero.connect(world.addresses, 10.0) is None
        assert one.connect(world.addresses, 1.0) is None
        check_layer(world, epoch=2)


def test_an_answer_that_came_while_the_rank_was_stopped_past_its_deadline_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero, one = (SocketDispatcher(r, f"unix:{folder}/{r}", token=TOKEN) for r in (0, 1))
    with contextlib.closing(World({0: zero, 1: one}, {0: zero.listen(), 1: one.listen()})) as world:
        poll, answered = one._mesh._poll, []

        def stopped_poll(calls: Any, *rest: Any) -> Any:
            if not answered and any(call._sent for call in calls):
                answered.append(zero.connect(world.addresses, 10.0))
                time.sleep(0.3)
                return {}
            return poll(calls, *rest)

        monkeypatch.setattr(one._mesh, "_poll", stopped_poll)
        assert one.connect(world.addresses, 0.2) is None
        assert answered == [None]


def _connect_without_room(peers: dict[int, str], pipe: Any) -> None:
    """Rank 1, which has address space left for half an outbox."""
    with SocketDispatcher(1, peers[1], token=TOKEN) as dispatcher:
        dispatcher.listen()
        assert dispatcher._mesh.outbox is not None
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + dispatcher._mesh.outbox.region_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        pipe.send(dispatcher.connect(peers, 5.0))
        pipe.recv()


def test_a_rank_without_room_for_a_peers_outbox_shares_none(folder: Path) -> None:
    """Rank 0 is done once it has answered, and must not be counted on to answer again."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    peers = {r: f"unix:{folder}/{r}" for r in (0, 1)}
    starved = context.Process(target=_connect_without_room, args=(peers, theirs), daemon=True)
    starved.start()
    with SocketDispatcher(0, peers[0], token=TOKEN) as zero:
        assert zero.connect(peers, 30.0) is None
        assert ours.poll(10.0)
        assert ours.recv() is None
        assert zero._mesh.channels[1].inbox is None
        ours.send(None)
        starved.join(10.0)
    assert starved.exitcode == 0


def test_an_old_answer_of_a_peer_that_has_hung_up_is_no_channel(parted: World) -> None:
    """Rank 0 has done without rank 1 since, and wants it again."""
    zero, one = parted.dispatchers[0], parted.dispatchers[1]
    assert zero.connect({0: parted.addresses[0]}, 10.0) is None
    assert run_ranks({0: lambda: zero.connect(parted.addresses, 5.0), 1: lambda: one.connect(parted.addresses, 5.0)}) == {0: None, 1: None}
    check_layer(parted, epoch=3)


def test_a_call_that_was_interrupted_ends_with_the_peer_that_it_was_for(folder: Path, switch: Switch) -> None:
    with SocketDispatcher(0, f"unix:{folder}/0", token=TOKEN) as zero, SocketDispatcher(2, f"unix:{folder}/2", token=TOKEN) as two:
        one = SocketDispatcher(1, f"unix:{folder}/1", token=TOKEN, interrupt=switch.near)
        assert interrupted_in(lambda: one.connect({0: zero.address}, 20.0), switch) == Interrupted()
        (call,) = one._mesh._calls.values()
        assert call.sock is not None
        peers = {1: one.address, 2: two.address}
        assert run_ranks({1: lambda: one.connect(peers, 10.0), 2: lambda: two.connect(peers, 10.0)}) == {1: None, 2: None}
        assert (call.sock, one._mesh._calls) == (None, {})
        one.close()


def test_a_wrong_own_address_is_refused(folder: Path) -> None:
    with SocketDispatcher(0, f"unix:{folder}/0", token=TOKEN) as one, pytest.raises(InvalidInputError, match="which listens on"):
        one.connect({0: f"unix:{folder}/other"}, 1.0)


def test_the_same_memory_is_shared_only_where_both_can(folder: Path) -> None:
    """A rank without an outbox (as on a system that cannot make one) talks to one that has one."""
    ranks = {r: SocketDispatcher(r, f"unix:{folder}/{r}", token=TOKEN, shared_bytes=1 << 20 if r % 2 else 0) for r in range(4)}
    world = World(dict(ranks), {r: d.listen() for r, d in ranks.items()})
    world.connect()
    assert {r: sorted(p for p, c in d._mesh.channels.items() if c.inbox) for r, d in ranks.items()} == {0: [], 1: [3], 2: [], 3: [1]}
    check_layer(world, epoch=1)
    world.close()


def test_no_descriptor_is_left_behind(make_world: Any) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    make_world("unix", 3).close()
    before = descriptors()
    for _ in range(3):
        world = make_world("unix", 3)
        check_layer(world, epoch=1)
        world.close()
        world.dispatchers.clear()
    assert descriptors() <= before


# ---- strangers


def dial(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(10)
    sock.connect(address.removeprefix("unix:"))
    return sock


def hello(address: str, own: str, rank: int = 1, target: int = 0, token: str = TOKEN, region_bytes: int = 0) -> bytes:
    return handshake.pack_hello(rank, own, target, address, region_bytes, token)


def spoilt(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    "make_hello",
    [
        lambda a, own: b"GET / HTTP/1.1\r\n".ljust(handshake.HELLO_BYTES, b"\0"),
        lambda a, own: hello(a, own, token="another run's"),
        lambda a, own: spoilt(hello(a, own), 0),
        lambda a, own: spoilt(hello(a, own), 8),
        lambda a, own: spoilt(hello(a, own), 12),
        lambda a, own: hello(a, own, target=5),
        lambda a, own: hello(a + "#old", own),
        lambda a, own: hello(a, own, rank=2),
        lambda a, own: hello(a, own, rank=0),
        lambda a, own: hello(a, own + "#old"),
        lambda a, own: hello(a, own)[:20],
    ],
    ids=["http", "token", "magic", "version", "rank", "target", "old-target", "stranger", "own-seat", "old-incarnation", "cut-short"],
)
def test_a_stranger_is_not_let_in_and_the_real_peer_is(folder: Path, make_hello: Callable[[str, str], bytes]) -> None:
    peers = {r: f"unix:{folder}/{r}" for r in (0, 1)}
    with SocketDispatcher(0, peers[0], token=TOKEN) as zero, SocketDispatcher(1, peers[1], token=TOKEN) as one:
        stranger = dial(peers[0])
        stranger.sendall(make_hello(peers[0], peers[1]))
        stranger.shutdown(socket.SHUT_WR)
        assert run_ranks({0: lambda: zero.connect(peers, CONNECT_S), 1: lambda: one.connect(peers, CONNECT_S)}) == {0: None, 1: None}
        assert stranger.recv(1) == b""
        stranger.close()
        assert (zero.refused_handshakes, one.refused_handshakes) == (1, 0)
        check_layer(World({0: zero, 1: one}, peers), epoch=1)


def test_a_silent_stranger_holds_nobody_up(folder: Path) -> None:
    peers = {r: f"unix:{folder}/{r}" for r in (0, 1)}
    with SocketDispatcher(0, peers[0], token=TOKEN) as zero, SocketDispatcher(1, peers[1], token=TOKEN) as one:
        silent = [dial(peers[0]) for _ in range(20)]
        assert run_ranks({0: lambda: zero.connect(peers, CONNECT_S), 1: lambda: one.connect(peers, CONNECT_S)}) == {0: None, 1: None}
        for sock in silent:
            sock.close()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(lambda raw: b"", FailureKind.CLOSED), (lambda raw: handshake.pack_welcome(raw, 0, "another run's"), FailureKind.PROTOCOL)],
)
def test_an_impostor_that_listens_in_a_peers_seat_is_named(folder: Path, answer: Callable[[bytes], bytes], kind: FailureKind) -> None:
    impostor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    impostor.bind(f"{folder}/0")
    impostor.listen()

    def serve() -> None:
        while True:
            try:
                sock, _ = impostor.accept()
            except OSError:
                return
            # the caller hangs up at its deadline, wherever an attempt stands then
            with sock, contextlib.suppress(OSError):
                raw = sock.recv(handshake.HELLO_BYTES, socket.MSG_WAITALL)
                if raw:
                    sock.sendall(answer(raw))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with SocketDispatcher(1, f"unix:{folder}/1", token=TOKEN) as one:
        assert one.connect({0: f"unix:{folder}/0"}, 0.3) == PeerFailed({0: kind})
        assert one.refused_handshakes > 0 if kind is FailureKind.PROTOCOL else one.refused_handshakes == 0
    impostor.shutdown(socket.SHUT_RDWR)
    impostor.close()
    thread.join(10)


# ---- peers that say what is not so


class RawPeer:
    """Rank 1 by hand: it has shaken hands, and sends what bytes the test wants."""

    def __init__(self, folder: Path, **options: Any):
        self.address = f"unix:{folder}/0"
        own = f"unix:{folder}/1"
        self.dispatcher = SocketDispatcher(0, self.address, token=TOKEN, deadline_s=5.0, **options)
        self.dispatcher.listen()
        self.sock = dial(self.address)
        self.sock.sendall(hello(self.address, own))
        assert self.dispatcher.connect({0: self.address, 1: own}, CONNECT_S) is None
        assert len(self.sock.recv(handshake.WELCOME_BYTES, socket.MSG_WAITALL)) == handshake.WELCOME_BYTES

    def form(self, phase: Phase, dtype_code: int = 0, hidden: int = HIDDEN) -> FrameFormat:
        return FrameFormat(FrameKey(1, 0, 0, phase), dtype_code, hidden)

    def close(self) -> None:
        self.sock.close()
        self.dispatcher.close()


@pytest.fixture
def raw_peer(folder: Path) -> Iterator[RawPeer]:
    peer = RawPeer(folder)
    yield peer
    peer.close()


def pairs_bytes(*pairs: tuple[int, int]) -> bytes:
    return np.array(pairs, dtype=np.int32).tobytes()


def lying(header: bytes, length: int) -> bytes:
    return header[:48] + struct.pack("<Q", length) + header[56:]


ROUTING = routing_of([0, 1], 1)
SERVED = int(np.flatnonzero((ROUTING.replica_rank[0] == 0).any(-1))[0])
NOT_SERVED = int(np.flatnonzero(~(ROUTING.replica_rank[0] == 0).any(-1))[0])
ROW = bytes(4 * HIDDEN)
BAD_DISPATCHES = {
    "garbage": lambda p: b"\xff" * 64,
    "length over the limit": lambda p: p.form(Phase.DISPATCH).pack(False, 2**31, 2**31),
    "length that lies": lambda p: lying(p.form(Phase.DISPATCH).pack(False, 1, 1), 1 << 20),
    "other hidden size": lambda p: p.form(Phase.DISPATCH, hidden=7).pack(False, 0, 0),
    "other dtype": lambda p: p.form(Phase.DISPATCH, dtype_code=1).pack(False, 0, 0),
    "unknown phase": lambda p: b"".join([(h := p.form(Phase.DISPATCH).pack(False, 0, 0))[:5], b"\x02", h[6:]]),
    "row not sent": lambda p: p.form(Phase.DISPATCH).pack(False, 1, 2) + pairs_bytes((0, SERVED), (1, SERVED)) + ROW,
    "negative row": lambda p: p.form(Phase.DISPATCH).pack(False, 1, 1) + pairs_bytes((-1, SERVED)) + ROW,
    "expert not served here": lambda p: p.form(Phase.DISPATCH).pack(False, 1, 1) + pairs_bytes((0, NOT_SERVED)) + ROW,
    "expert that does not exist": lambda p: p.form(Phase.DISPATCH).pack(False, 1, 1) + pairs_bytes((0, EXPERTS)) + ROW,
    "outbox that is not shared": lambda p: p.form(Phase.DISPATCH).pack(True, 1, 1) + pairs_bytes((0, SERVED)),
}


@pytest.mark.parametrize("name", BAD_DISPATCHES)
def test_a_bad_dispatch_frame_is_a_protocol_failure(raw_peer: RawPeer, name: str) -> None:
    raw_peer.sock.sendall(BAD_DISPATCHES[name](raw_peer))
    failed = dispatch(raw_peer.dispatcher, batch_of(0, 3), [0, 1], 1)
    assert failed.peers == {1: FailureKind.PROTOCOL}
    assert raw_peer.dispatcher.refused_frames == 1
    assert isinstance(failed.partial, DispatchHandle)
    assert raw_peer.dispatcher.connected_ranks == ()
    assert dispatch(raw_peer.dispatcher, batch_of(0, 3), [0, 1], 1, step=1).peers == {1: FailureKind.CLOSED}


def test_a_frame_that_claims_much_makes_nobody_allocate_it(folder: Path) -> None:
    peer = RawPeer(folder, max_payload_bytes=1 << 20)
    peer.sock.sendall(peer.form(Phase.DISPATCH).pack(False, 1 << 18, 1 << 18))
    assert dispatch(peer.dispatcher, batch_of(0, 3), [0, 1], 1).peers == {1: FailureKind.PROTOCOL}
    assert not peer.dispatcher._buffers
    peer.close()


@pytest.mark.parametrize("delta", [-1, 1])
def test_a_combine_frame_with_another_number_of_rows_is_a_protocol_failure(raw_peer: RawPeer, delta: int) -> None:
    raw_peer.sock.sendall(raw_peer.form(Phase.DISPATCH).pack(False, 0, 0))
    handle = dispatch(raw_peer.dispatcher, batch_of(0, 30), [0, 1], 1)
    count = len(handle.state.departure.pairs_for(1)) + delta
    raw_peer.sock.sendall(raw_peer.form(Phase.COMBINE).pack(False, 0, count) + ROW * count)
    failed = raw_peer.dispatcher.combine(run_experts(handle), handle)
    assert failed.peers == {1: FailureKind.PROTOCOL}
    assert failed.partial.shape == (30, HIDDEN)


@pytest.mark.parametrize("index", [5, -1])
def test_indices_outside_an_outbox_are_a_protocol_failure(make_world: Any, index: int) -> None:
    """Rank 1 is real but for its combine frame, which names a row past those it says it wrote."""
    world = make_world("unix", 2)
    handles = run_ranks({r: lambda r=r: dispatch(world.dispatchers[r], batch_of(r, 30), [0, 1], 1) for r in (0, 1)})
    channel = world.dispatchers[1]._mesh.channels[0]
    count = len(world.dispatchers[0]._general_state(handles[0].state).departure.pairs_for(1))
    form = FrameFormat(FrameKey(1, 0, 0, Phase.COMBINE), 0, HIDDEN)
    channel.post([form.pack(True, 5, count) + np.full(count, index, dtype=np.int32).tobytes()])
    failed = world.dispatchers[0].combine(run_experts(handles[0]), handles[0])
    assert failed.peers == {1: FailureKind.PROTOCOL}
    assert world.dispatchers[0].refused_frames == 1


def test_an_outbox_larger_than_its_memory_is_a_protocol_failure(make_world: Any) -> None:
    world = make_world("page", 2)
    channel = world.dispatchers[1]._mesh.channels[0]
    channel.post([FrameFormat(FrameKey(1, 0, 0, Phase.DISPATCH), 0, HIDDEN).pack(True, 4096 // 4 // HIDDEN + 1, 0)])
    assert dispatch(world.dispatchers[0], batch_of(0, 3), [0, 1], 1).peers == {1: FailureKind.PROTOCOL}


@pytest.mark.parametrize("sealed", [False, True])
def test_a_memory_file_that_could_shrink_is_not_mapped(folder: Path, sealed: bool) -> None:
    """Rank 0 answers without an outbox of its own, and the rows go through the socket."""
    peers = {r: f"unix:{folder}/{r}" for r in (0, 1)}
    with SocketDispatcher(0, peers[0], token=TOKEN, shared_bytes=8192) as zero:
        fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        # sealed, but too small
        os.ftruncate(fd, 8192 if sealed else 1 << 20)
        if sealed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        sock = dial(peers[0])
        socket.send_fds(sock, [hello(peers[0], peers[1], region_bytes=8192)], [fd])
        os.close(fd)
        assert zero.connect(peers, CONNECT_S) is None
        assert zero._mesh.channels[1].inbox is None
        raw, fds, _, _ = socket.recv_fds(sock, handshake.WELCOME_BYTES, 1)
        assert fds == []
        assert len(raw) == handshake.WELCOME_BYTES
        sock.close()


def test_poll_reports_a_peers_end_of_file_behind_an_early_frame(make_world: Any, switch: Switch) -> None:
    """Rank 1 has sent a frame of a later step and died: rank 0 sees it at once, not at the deadline."""
    world = make_world("unix", 2, deadline_s=10.0)
    channel = world.dispatchers[1]._mesh.channels[0]
    channel.post([FrameFormat(FrameKey(9, 0, 0, Phase.DISPATCH), 0, HIDDEN).pack(False, 0, 0)])
    world.dispatchers.pop(1).close()
    begin = time.monotonic()
    assert dispatch(world.dispatchers[0], batch_of(0, 3), [0, 1], 1).peers == {1: FailureKind.CLOSED}
    assert time.monotonic() - begin < 5
