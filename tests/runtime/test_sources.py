"""Where experts come from: each source alone, a source that fails, bytes that are wrong, and slots that change under way."""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from elastic_ep.brain.messages import LoadOrder
from elastic_ep.core.errors import CheckpointError, InvalidInputError, WrongExpertError
from elastic_ep.runtime.upkeep import IDLE_S, Upkeep
from elastic_ep.runtime.weights.base import Loaded, digest_of, read_verified
from elastic_ep.runtime.weights.digest import Read
from elastic_ep.runtime.weights.host import HostBackup, _available_bytes
from elastic_ep.runtime.weights.pages import _COLLAPSE, HUGE_PAGE, SharedPages, _libc
from elastic_ep.runtime.weights.peer import PeerServer
from elastic_ep.runtime.weights.peer_memory import MemoryAccess, allow_reading
from elastic_ep.runtime.weights.sources import Peers, Sources

LAYERS, EXPERTS, BYTES = 2, 4, 256


def expert(layer: int, index: int) -> torch.Tensor:
    """The bytes of an expert: they say which it is."""
    return (torch.arange(BYTES) * (layer * EXPERTS + index + 3) % 251).to(torch.uint8)


class FakeCheckpoint:
    kind = "checkpoint"

    def __init__(self) -> None:
        self.reads = 0
        self.error = ""

    def read(self, layer: int, index: int, slot: torch.Tensor) -> Read:
        if self.error:
            raise CheckpointError(self.error)
        self.reads += 1
        slot.copy_(expert(layer, index))
        return Read(BYTES, digest_of(slot))

    def known_digest(self, layer: int, index: int) -> int | None:
        return None

    def close(self) -> None: ...


class FakeSlots:
    """Slots of one rank, 4 per layer: slot i of each layer holds what `held` says."""

    shape = (LAYERS, EXPERTS, BYTES)

    def __init__(self, *held: tuple[int, int, int]) -> None:
        self.checkpoint = FakeCheckpoint()
        self.backup: HostBackup | None = None
        self.memory = torch.zeros(LAYERS, 4, BYTES, dtype=torch.uint8)
        self.held: dict[tuple[int, int], tuple[int, int]] = {}
        for layer, slot, index in held:
            self.memory[layer, slot] = expert(layer, index)
            self.held[layer, slot] = (index, digest_of(expert(layer, index)))

    def bytes_of(self, layer: int, index: int) -> torch.Tensor | None:
        found = [slot for (at, slot), (held, _) in self.held.items() if (at, held) == (layer, index)]
        return self.memory[layer, found[0]] if found else None

    def slot_bytes(self, layer: int, slot: int) -> torch.Tensor:
        return self.memory[layer, slot]

    def addresses(self) -> np.ndarray:
        found = np.zeros((LAYERS, EXPERTS), np.uint64)
        for (layer, slot), (index, _) in self.held.items():
            found[layer, index] = self.memory[layer, slot].data_ptr()
        return found


@pytest.fixture
def peers():
    made = Peers(0, "unix:/none", "secret", FakeSlots.shape, MemoryAccess(BYTES))
    yield made
    made.close()


@pytest.fixture
def backup():
    fd = HostBackup.create(LAYERS, EXPERTS, BYTES)
    yield HostBackup(fd, LAYERS, EXPERTS, BYTES)
    os.close(fd)


def read(sources, layer: int, index: int, digest: int | None = None) -> tuple[Loaded, torch.Tensor]:
    slot = torch.zeros(BYTES, dtype=torch.uint8)
    return read_verified(sources, layer, index, slot, digest), slot


def serve(tmp_path: Path, rank: int, slots: FakeSlots, token: str = "secret") -> str:
    server = PeerServer(rank, f"unix:{tmp_path}/{rank}.weights", token)
    server.find, server.addresses = slots.bytes_of, slots.addresses
    return server.listen()


def test_a_peer_sends_what_it_holds(tmp_path, peers):
    address = serve(tmp_path, 1, FakeSlots((1, 2, 3)))
    source = peers.source(1, {1: address})
    loaded, slot = read([source], 1, 3)
    assert (loaded.kind, loaded.num_bytes) == ("peer", BYTES)
    assert slot.equal(expert(1, 3))
    with pytest.raises(CheckpointError, match="rank 1 sent 0 bytes for expert 2 of MoE layer 1, not 256"):
        read([source], 1, 2)
    assert read([source], 1, 3)[1].equal(expert(1, 3)), "it is asked again over a new connection"


def test_a_peer_is_not_asked_without_the_token(tmp_path):
    address = serve(tmp_path, 1, FakeSlots((0, 0, 0)))
    with pytest.raises(CheckpointError, match="rank 1 at unix:"):
        read([Peers(0, "unix:/none", "another", FakeSlots.shape).source(1, {1: address})], 0, 0)


def test_a_peer_listens_again_once_its_socket_was_removed(tmp_path, peers):
    server = PeerServer(1, f"unix:{tmp_path}/1.weights", "secret")
    server.find = FakeSlots((1, 2, 3)).bytes_of
    others = set(threading.enumerate())
    address = server.listen()
    (listens,) = (thread for thread in threading.enumerate() if thread not in others)
    (tmp_path / "1.weights").unlink()
    assert server.listen() == server.listen() == address
    assert read([peers.source(1, {1: address})], 1, 3)[1].equal(expert(1, 3))
    listens.join(10)
    assert not listens.is_alive()


def test_a_peer_that_died_or_hangs_is_passed_over(tmp_path, peers, monkeypatch):
    monkeypatch.setattr("elastic_ep.runtime.weights.peer._IDLE_TIMEOUT_S", 0.05)
    hung = socket.socket(socket.AF_UNIX)
    hung.bind(f"{tmp_path}/hung")
    hung.listen()
    slots = FakeSlots()
    sources = Sources(slots, peers)
    for peer, address in ((1, f"unix:{tmp_path}/hung"), (2, f"unix:{tmp_path}/nobody")):
        loaded, slot = read(sources.chain(LoadOrder(0, 0, 2, "same_node", peer), {peer: address}), 0, 2)
        assert loaded.kind == "checkpoint"
        assert slot.equal(expert(0, 2))
        assert loaded.errors[0].startswith(f"peer: rank {peer} at {address}:"), loaded.errors
    hung.close()


class CountedSlots(FakeSlots):
    """Notes what is asked for over the channel."""

    def __init__(self, *held: tuple[int, int, int]) -> None:
        super().__init__(*held)
        self.sent: list[tuple[int, int]] = []
        self.asked_where = 0

    def bytes_of(self, layer: int, index: int) -> torch.Tensor | None:
        self.sent.append((layer, index))
        return super().bytes_of(layer, index)

    def addresses(self) -> np.ndarray:
        self.asked_where += 1
        return super().addresses()


@pytest.fixture
def neighbour(tmp_path, peers):
    """A rank of this host that holds experts 1 and 2 of layer 0, and read(expert, known=True): what comes from it for an order."""
    slots, own = CountedSlots((0, 0, 1), (0, 3, 2)), FakeSlots()
    addresses, sources = {1: serve(tmp_path, 1, slots)}, Sources(own, peers)

    def read_one(index: int, known: bool = True) -> tuple[Loaded, torch.Tensor]:
        digest = digest_of(expert(0, index)) if known else None
        return read(sources.chain(LoadOrder(0, 0, index, "same_node", 1, digest), addresses), 0, index, digest)

    return slots, sources, read_one


def test_a_neighbours_memory_is_read_and_it_need_not_do_anything(neighbour):
    slots, _, read_one = neighbour
    for index in (1, 2, 1):
        loaded, slot = read_one(index)
        assert (loaded.kind, loaded.num_bytes, loaded.errors) == ("peer", BYTES, ())
        assert slot.equal(expert(0, index))
    assert (slots.sent, slots.asked_where) == ([], 1)


def test_the_memory_of_another_process_is_read(tmp_path, peers):
    """A real neighbour, which is asked where, and sends nothing."""
    told, gate = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        allow_reading()
        slots = CountedSlots((0, 0, 1), (1, 2, 3))
        serve(tmp_path, 1, slots)
        os.write(told[1], b"!")
        os.read(gate[0], 1)
        os._exit(10 * slots.asked_where + len(slots.sent))
    try:
        os.read(told[0], 1)
        for layer, index in ((0, 1), (1, 3)):
            digest = digest_of(expert(layer, index))
            source = peers.source(1, {1: f"unix:{tmp_path}/1.weights"}, is_digest_known=True)
            loaded, slot = read([source], layer, index, digest)
            assert (loaded.kind, slot.equal(expert(layer, index))) == ("peer", True)
    finally:
        os.write(gate[1], b"!")
        status = os.waitpid(child, 0)[1]
        for fd in (*told, *gate):
            os.close(fd)
    assert os.waitstatus_to_exitcode(status) == 10, "asked where once, and for no expert"


def test_an_expert_that_has_moved_is_never_taken_for_another(neighbour):
    slots, sources, read_one = neighbour
    read_one(1)
    slots.memory[0, 0] = expert(0, 3)
    slots.held[0, 0] = (3, digest_of(expert(0, 3)))
    loaded, slot = read_one(1)
    assert loaded.kind == "checkpoint"
    assert "peer: expert 1 of MoE layer 0 was read with digest" in loaded.errors[0]
    assert slot.equal(expert(0, 1))
    sources.begin_order(7)
    loaded, slot = read_one(3)
    assert (loaded.kind, slot.equal(expert(0, 3))) == ("peer", True)
    sources.begin_order(7)
    read_one(3)
    assert (slots.sent, slots.asked_where) == ([], 2)


def test_without_a_digest_to_compare_with_a_neighbour_is_asked(neighbour):
    slots, _, read_one = neighbour
    assert read_one(2, known=False)[0].kind == "peer"
    assert (slots.sent, slots.asked_where) == ([(0, 2)], 0)


@pytest.mark.parametrize("errno_", [errno.EPERM, errno.ENOSYS, errno.ESRCH, errno.EFAULT])
def test_where_memory_cannot_be_read_experts_are_sent(neighbour, monkeypatch, errno_):
    slots, _, read_one = neighbour
    tries = []

    def refuse(*args: object) -> int:
        tries.append(args)
        raise OSError(errno_, os.strerror(errno_))

    monkeypatch.setattr("elastic_ep.runtime.weights.peer_memory.read_memory", refuse)
    for index in (1, 2):
        loaded, slot = read_one(index)
        assert (loaded.kind, loaded.errors, slot.equal(expert(0, index))) == ("peer", (), True)
    assert slots.sent == [(0, 1), (0, 2)]
    assert len(tries) == (1 if errno_ in (errno.EPERM, errno.ENOSYS) else 2), "a refusal is for good"


def test_a_neighbour_whose_slots_are_on_a_device_sends_them(tmp_path, peers):
    slots = CountedSlots((0, 0, 1))
    slots.addresses = lambda: None
    digest = digest_of(expert(0, 1))
    source = peers.source(1, {1: serve(tmp_path, 1, slots)}, is_digest_known=True)
    assert read([source], 0, 1, digest)[1].equal(expert(0, 1))
    assert slots.sent == [(0, 1)]


def test_wrong_bytes_are_passed_over_wherever_they_come_from(tmp_path, peers, backup):
    """One flipped bit in a peer's slot, and one in the backup: the checkpoint's bytes are taken."""
    digest = digest_of(expert(0, 1))
    peer, slots = FakeSlots((0, 0, 1)), FakeSlots()
    backup.write(0, 1, expert(0, 1), digest)
    slots.backup = backup
    sources = Sources(slots, peers)
    chain = sources.chain(LoadOrder(0, 0, 1, "other_node", 1, digest), {1: serve(tmp_path, 1, peer)})
    assert read(chain, 0, 1, digest)[0].kind == "peer"
    peer.memory[0, 0, 77] ^= 4
    loaded, _ = read(chain, 0, 1, digest)
    assert loaded.kind == "host"
    assert f"its bytes had {digest:016x} before; the peer holds it elsewhere by now, or its memory fails" in loaded.errors[0]
    backup._slots[0, 1, 5] ^= 1
    loaded, slot = read(chain, 0, 1, digest)
    assert (loaded.kind, len(loaded.errors)) == ("checkpoint", 2)
    assert slot.equal(expert(0, 1))
    with pytest.raises(CheckpointError, match="expert 1 of MoE layer 0 was read with digest"):
        read(chain, 0, 1, digest ^ 1)


def test_the_order_of_sources(tmp_path, peers, backup):
    slots = FakeSlots((1, 0, 2))
    slots.backup = backup
    sources = Sources(slots, peers)
    kinds = lambda *order: [s.kind for s in sources.chain(LoadOrder(1, 3, 2, *order), {1: f"unix:{tmp_path}/1"})]  # noqa: E731
    assert kinds("local", 0) == ["local", "host", "checkpoint"]
    assert kinds("same_node", 1) == ["peer", "host", "checkpoint"]
    assert kinds("same_node", 9) == ["host", "checkpoint"], "a rank whose address is not known"
    assert kinds("host") == ["host", "checkpoint"]
    assert kinds("checkpoint") == ["checkpoint", "host"], "a disk that fails is not the end"
    loaded, slot = read(sources.chain(LoadOrder(1, 3, 2, "local", 0), {}), 1, 2)
    assert (loaded.kind, slot.equal(expert(1, 2))) == ("local", True)


def test_the_backup_is_filled_from_slots_first(backup):
    slots = FakeSlots((0, 0, 3), (1, 1, 0))
    slots.backup = backup
    upkeep = Upkeep(slots, 0, slots.held, (0, 1), fill_bytes_per_s=1e9, scrub_bytes_per_s=0)
    for _ in range(LAYERS * EXPERTS):
        assert upkeep.step() == pytest.approx(BYTES / 1e9)
    for _ in range(LAYERS * EXPERTS):
        assert upkeep.step() == pytest.approx(BYTES / 1e9), "each expert's pages are mapped, at the same pace"
    assert upkeep.step() == IDLE_S
    assert backup.experts.all()
    assert slots.checkpoint.reads == LAYERS * EXPERTS - 2
    for layer in range(LAYERS):
        for index in range(EXPERTS):
            assert read([backup], layer, index)[1].equal(expert(layer, index))
            assert backup.known_digest(layer, index) == digest_of(expert(layer, index))


def test_nobody_reads_ahead_before_the_rank_is_a_member(backup):
    slots = FakeSlots()
    slots.backup = backup
    assert Upkeep(slots, 0, slots.held, (0, 1), 1e9, 1e9).step() == IDLE_S
    assert not backup.experts.any()


TAKES_TURN = "import fcntl, sys; print('asks', flush=1); fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX); print(flush=1); sys.stdin.read()"
"""a process that has its turn until it is killed"""


def test_one_process_has_its_turn_until_it_ends_it_or_dies(backup):
    assert backup.take_turn()
    command = [sys.executable, "-c", TAKES_TURN, str(backup._fd)]
    with subprocess.Popen(command, pass_fds=[backup._fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            other.stdout.readline()
            assert not select.select([other.stdout], [], [], 0.5)[0], "it waits"
            backup.end_turn()
            assert select.select([other.stdout], [], [], 10)[0]
            assert not backup.take_turn()
        finally:
            other.kill()
        other.wait()
        assert backup.take_turn()


def test_two_processes_share_one_backup(backup):
    other = HostBackup(backup._fd, LAYERS, EXPERTS, BYTES)
    backup.write(1, 2, expert(1, 2), 99)
    assert other.experts[1, 2]
    assert other.known_digest(1, 2) == 99
    assert other.known_digest(0, 0) is None
    with pytest.raises(CheckpointError, match="expert 0 of MoE layer 0 is not in the host backup yet"):
        read([other], 0, 0)
    with pytest.raises(InvalidInputError, match="belongs to another model"):
        HostBackup(backup._fd, LAYERS, EXPERTS, BYTES + 64)


def test_nobody_can_cut_a_backup_short(backup):
    with pytest.raises(PermissionError):
        os.ftruncate(backup._fd, 4096)


def test_a_backup_lies_in_huge_pages_as_far_as_the_system_gives_them():
    """Whatever it gives: they may be turned off, and a file of memory has them by request alone."""
    num_bytes = 3 * HUGE_PAGE + 4096  # so that experts share a page
    fd = HostBackup.create(1, 3, num_bytes)
    first, second = HostBackup(fd, 1, 3, num_bytes), HostBackup(fd, 1, 3, num_bytes)
    contents = [torch.randint(0, 256, (num_bytes,), dtype=torch.uint8) for _ in range(3)]
    for writer, index in ((first, 1), (second, 0), (second, 2)):
        writer.write(0, index, contents[index], 7)
    for reader in (first, second, HostBackup(fd, 1, 3, num_bytes)):
        for index in range(3):
            slot = torch.zeros(num_bytes, dtype=torch.uint8)
            assert reader.read(0, index, slot).digest == digest_of(contents[index])
            assert slot.equal(contents[index])
        assert reader.view(0, 0).ctypes.data % HUGE_PAGE == 0
    before = _huge_bytes()
    probe = SharedPages(fd, 2 * HUGE_PAGE)
    probe.make_huge(0, 1)
    is_given = _libc().madvise(probe.memory.ctypes.data, HUGE_PAGE, _COLLAPSE) == 0
    assert not is_given or before >= 10 * HUGE_PAGE, "each of two writers has those that it wrote, a third reader had all"
    os.close(fd)


def _huge_bytes() -> int:
    """Of this process' mappings of files of memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("ShmemPmdMapped:"))


def test_a_backup_that_the_host_cannot_hold_is_refused():
    with pytest.raises(InvalidInputError, match=r"--host-backup experts needs .* bytes, this host has"):
        HostBackup.create(1 << 20, 1 << 10, 1 << 20)


def test_a_backup_leaves_room_for_the_slots():
    with pytest.raises(InvalidInputError, match=rf"needs \d+ bytes, beside {1 << 50} of the slots of this host's ranks, this host has"):
        HostBackup.create(1, 1, 1, beside=1 << 50)


def test_a_container_has_what_its_control_group_allows(tmp_path):
    """The cache that the group could give back counts; a limit of a group above holds too; the tightest decides."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    inner = groups / "pods" / "one"
    for folder in (proc / "self", inner):
        folder.mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  8000 kB\n")
    (proc / "self" / "cgroup").write_text("3:cpuset:/\n0::/pods/one\n")
    assert _available_bytes(proc, groups) == 8000 * 1024
    for group, most, used in ((inner, "max", 5), (inner.parent, "7000000", 2000000)):
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("anon 3\ninactive_file 400000\nactive_file 100000\n")
    assert _available_bytes(proc, groups) == 5500000
    (inner / "memory.max").write_text("1000\n")
    (inner / "memory.stat").write_text("anon 3\n")
    assert _available_bytes(proc, groups) == 995


def test_a_flipped_bit_in_a_slot_is_found():
    slots = FakeSlots((0, 0, 3), (0, 1, 1), (1, 3, 0))
    first_slot = 8
    held = {(layer, slot + first_slot): value for (layer, slot), value in slots.held.items()}
    upkeep = Upkeep(slots, first_slot, held, (2, 4), 1e9, scrub_bytes_per_s=1e6)
    for _ in range(7):
        assert upkeep.step() == pytest.approx(BYTES / 1e6)
    slots.memory[0, 1, 200] ^= 1
    with pytest.raises(WrongExpertError, match=r"slot 9 of MoE layer 0 holds digest .*; expert 1 was verified there"):
        list(iter(upkeep.step, None))


def test_a_slot_that_is_overwritten_meanwhile_is_no_wrong_slot(monkeypatch):
    slots = FakeSlots((0, 0, 3))
    upkeep = Upkeep(slots, 0, slots.held, (0, 1), 1e9, scrub_bytes_per_s=1e6)

    def overwrite(layer: int, slot: int) -> torch.Tensor:
        slots.held[0, 0] = (2, digest_of(expert(0, 2)))
        return expert(0, 2)

    monkeypatch.setattr(slots, "slot_bytes", overwrite)
    upkeep.step()


def test_a_peer_that_drips_is_passed_over(tmp_path, peers, monkeypatch):
    """It sends a byte now and then, so it is never silent for long: the whole has a deadline, too."""
    monkeypatch.setattr("elastic_ep.runtime.weights.peer._IDLE_TIMEOUT_S", 0.05)
    monkeypatch.setattr("elastic_ep.runtime.weights.peer._SLOWEST_BYTES_PER_S", BYTES / 0.05)
    server = PeerServer(1, f"unix:{tmp_path}/1.weights", "secret")
    stop = threading.Event()

    def drip(sock: socket.socket, data: memoryview) -> None:
        for byte in data:
            sock.sendall(bytes([byte]))
            if stop.wait(0.01):
                return

    monkeypatch.setattr("elastic_ep.runtime.weights.peer._send", drip)
    server.find = FakeSlots((0, 0, 0)).bytes_of
    source = peers.source(1, {1: server.listen()})
    with pytest.raises(CheckpointError, match=r"too slow: \d+ of 256 bytes came in time"):
        read([source], 0, 0)
    stop.set()


def test_a_flipped_bit_is_found_before_the_slot_is_backed_up(backup):
    slots = FakeSlots((0, 0, 3))
    slots.backup = backup
    slots.memory[0, 0, 9] ^= 1
    upkeep = Upkeep(slots, 0, slots.held, (0, 1), fill_bytes_per_s=1e9, scrub_bytes_per_s=0)
    with pytest.raises(WrongExpertError, match="slot 0 of MoE layer 0 holds digest"):
        upkeep.step()
    assert not backup.experts.any()


def test_slots_are_looked_at_while_the_backup_fills(backup, monkeypatch):
    monkeypatch.setattr("elastic_ep.runtime.upkeep.FILLS_PER_SCRUB", 2)
    slots = FakeSlots((0, 0, 3))
    slots.backup = backup
    upkeep = Upkeep(slots, 0, slots.held, (0, 1), fill_bytes_per_s=1e9, scrub_bytes_per_s=1e6)
    waits = [upkeep.step() for _ in range(4)]
    assert waits == pytest.approx([BYTES / 1e9, BYTES / 1e6, BYTES / 1e9, BYTES / 1e6])


def test_the_backup_knows_its_own_digests(backup):
    """Also when nobody else knows one, as for an expert that is streamed: the checkpoint's bytes are taken instead."""
    backup.write(0, 2, expert(0, 2), digest_of(expert(0, 2)))
    backup._slots[0, 2, 100] ^= 8
    loaded, slot = read([backup, FakeCheckpoint()], 0, 2)
    assert (loaded.kind, slot.equal(expert(0, 2))) == ("checkpoint", True)
