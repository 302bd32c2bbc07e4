"""The digest that is computed on the way is the digest of what lies in the slot, whoever computes it and however the bytes came."""

from __future__ import annotations

import mmap
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import save_file

from elastic_ep.core.errors import CheckpointError
from elastic_ep.runtime.weights import digest as digests
from elastic_ep.runtime.weights.base import LocalSource, Piece, SlotLayout, digest_of, read_verified, zeroed
from elastic_ep.runtime.weights.checkpoint import CheckpointSource, TensorReader
from elastic_ep.runtime.weights.headers import read_headers

BLOCK = 1024
EDGES = [1, 64, 240, 241, 256, 319, 320, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 63, 2 * BLOCK + 64, (1 << 20) + 65]


@pytest.fixture(params=["compiled", "python"])
def by(request, monkeypatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(digests, "_native", None)
        monkeypatch.setattr(digests, "CHUNK_BYTES", 700)
    elif digests._native is None:
        pytest.skip("the helper was not compiled")
    return request.param


def test_a_copy_has_the_digest_of_its_bytes(by):
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for n in [*EDGES, *(int(n) for n in rng.integers(1, 20_000, 60))]:
        start = int(rng.choice([0, 32, 5]))  # into memory that is aligned, and into memory that is not
        source, memory = rng.integers(0, 256, n, dtype=np.uint8), np.full(n + 200, 170, dtype=np.uint8)
        begin = -memory.ctypes.data % 32 + start
        found = digests.copy(memory[begin : begin + n], source)
        assert found == (n, xxhash.xxh3_64_intdigest(source.data)), (n, start)
        assert (memory[begin : begin + n] == source).all(), (n, start)
        assert (memory[:begin] == 170).all(), "nothing before it is touched"
        assert (memory[begin + n :] == 170).all(), "nothing after it is touched"


def test_memory_of_another_process_is_read_with_its_digest():
    if not digests.can_read_memory(EDGES[-1]):
        pytest.skip("the helper was not compiled")
    rng = np.random.default_rng(5)
    pages = mmap.mmap(-1, 1 << 22)  # shared with the child: it says where it has mapped them
    source = np.frombuffer(pages, np.uint8)
    source[:] = rng.integers(0, 256, len(source), dtype=np.uint8)
    gate, told = os.pipe()
    child = os.fork()
    if not child:
        os.read(gate, 1)
        os._exit(0)
    try:
        for n in [n for n in EDGES if n > 240] + [3 << 20]:
            slot = np.zeros(n, np.uint8)
            assert digests.read_memory(slot, child, source.ctypes.data + 3) == xxhash.xxh3_64_intdigest(source[3 : 3 + n].data)
            assert (slot == source[3 : 3 + n]).all()
        with pytest.raises(OSError, match="Bad address"):
            digests.read_memory(np.zeros(4096, np.uint8), child, 4096)
    finally:
        os.write(told, b"x")
        os.waitpid(child, 0)
        os.close(gate)
        os.close(told)
    with pytest.raises(ProcessLookupError):
        digests.read_memory(np.zeros(4096, np.uint8), child, source.ctypes.data)
    del source


def test_what_is_copied_is_what_was_digested_though_somebody_writes_there(by):
    """A slot that is overwritten while it is copied gives torn bytes; their digest must not be that of the whole ones."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    source, stop = rng.integers(0, 256, 1 << 20, dtype=np.uint8), threading.Event()

    def write() -> None:
        while not stop.is_set():
            source[int(rng.integers(len(source)))] ^= 255

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for start in (0, 5) * 20:  # 5: not aligned, where the plain loop copies
            memory = np.empty(len(source) + 64, dtype=np.uint8)
            begin = -memory.ctypes.data % 32 + start
            copied = memory[begin : begin + len(source)]
            assert digests.copy(copied, source).digest == xxhash.xxh3_64_intdigest(copied.data)
    finally:
        stop.set()
        writer.join()


def layout_and_source(folder: Path, stored: torch.dtype, wanted: torch.dtype, rows: int) -> tuple[SlotLayout, CheckpointSource]:
    """A fused part of two tensors that the file names in the other order, a bias with padding after it, and a part of many experts."""
    torch.manual_seed(rows)
    tensors = {name: torch.randn(*shape).to(stored) for name, shape in {"up": (rows, 9), "gate": (rows, 9), "bias": (3,)}.items()}
    tensors["down"] = torch.randn(4, 9, rows).to(stored)
    save_file(tensors, folder / "model.safetensors")
    layout = SlotLayout((("both", (2 * rows, 9)), ("bias", (3,)), ("down", (9, rows))), wanted)
    pieces = [
        Piece("down", 2, (9, rows), "down", 0),
        Piece("up", None, (rows, 9), "both", rows * 9),
        Piece("bias", None, (3,), "bias", 0),
        Piece("gate", None, (rows, 9), "both", 0),
    ]
    return layout, CheckpointSource(TensorReader(read_headers(folder)), layout, lambda layer, expert: pieces)


@pytest.mark.parametrize("rows", [1, 7, 300, 9000])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_an_expert_of_a_checkpoint(by, tmp_path, stored, wanted, rows):
    """In pieces that are not in order, with padding that holds something, converted or not."""
    layout, source = layout_and_source(tmp_path, stored, wanted, rows)
    slot = torch.full((layout.num_bytes,), 3, dtype=torch.uint8)
    found = source.read(0, 0, slot)
    assert found.digest == digest_of(slot)
    clean = torch.zeros_like(slot)
    assert source.read(0, 0, clean) == found, "what memory held before is not in the digest"
    assert clean.equal(slot)
    assert found.num_bytes == (2 * 9 * rows + 3 + 9 * rows) * stored.itemsize
    torch.manual_seed(rows)
    up, gate, bias = torch.randn(rows, 9), torch.randn(rows, 9), torch.randn(3)
    down = torch.randn(4, 9, rows)[2]
    views = layout.views(slot)
    for name, tensor in {"both": torch.cat([gate, up]), "bias": bias, "down": down}.items():
        assert views[name].equal(tensor.to(stored).to(wanted)), name
    source.close()


def test_a_file_that_ends_early(by, tmp_path):
    layout, source = layout_and_source(tmp_path, torch.float32, torch.float32, 300)
    entry = source._reader._entries["gate"]
    with entry.file.open("r+b") as file:
        file.truncate(entry.begin + 41)
    with pytest.raises(CheckpointError, match=r"model.safetensors ends inside gate \(41 of \d+ bytes\); download it again"):
        source.read(0, 0, zeroed(layout.num_bytes))
    source.close()


def test_a_file_that_is_gone(by, tmp_path):
    layout, source = layout_and_source(tmp_path, torch.float32, torch.float32, 7)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read \w+ from .*: No such file or directory; check the disk"):
        source.read(0, 0, zeroed(layout.num_bytes))


def test_a_move_inside_the_rank(by):
    there = torch.arange(5000).to(torch.uint8)
    slot = zeroed(5000)
    loaded = read_verified([LocalSource(lambda layer, expert: there)], 0, 0, slot, digest_of(there))
    assert (loaded.digest, slot.equal(there)) == (digest_of(there), True)


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, (2 << 20) - 1, 2 << 20, (5 << 20) + 7])
def test_zeroed_memory(num_bytes):
    memory = zeroed(num_bytes)
    assert memory.shape == (num_bytes,)
    assert not memory.any()
    memory.fill_(7)
    if num_bytes:
        assert memory.data_ptr() % (4096 if num_bytes < 2 << 20 else 2 << 20) == 0
