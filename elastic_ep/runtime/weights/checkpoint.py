"""Experts and dense tensors read from safetensors files, straight into the memory that will hold them.

Bytes are read with pread, not mapped: no page of the file counts as this process's memory, and a file that shrinks under us is an
error with a name instead of a SIGBUS.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from elastic_ep.core.errors import CheckpointError
from elastic_ep.runtime.weights.base import Piece, SlotLayout
from elastic_ep.runtime.weights.digest import CHUNK_BYTES, Cut, Digest, Read, Stretch, can_read, read
from elastic_ep.runtime.weights.headers import TensorEntry

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorReader:
    """Reads tensors by name. Files are opened when first needed and kept open."""

    def __init__(self, entries: Mapping[str, TensorEntry]):
        self._entries = entries
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read_into(self, name: str, item: int | None, into: torch.Tensor, digest: Digest | None = None) -> int:
        """Fill a contiguous CPU tensor with a tensor, or with its `item`-th entry, converting the dtype, and feed the digest with what
        the tensor holds then. Returns the bytes read."""
        entry, count = self._entries[name], into.numel()
        itemsize, begin = self._place(name, item, count)
        source = DTYPES[entry.dtype]
        flat = into.view(-1)
        step = max(count, 1) if digest is None and source == into.dtype else CHUNK_BYTES // into.dtype.itemsize
        staging = None if source == into.dtype else torch.empty(min(step, count), dtype=source)
        for first in range(0, count, step):
            stretch = flat[first : first + step]
            if staging is None:
                self._pread(entry.file, name, begin + first * itemsize, stretch)
            else:
                part = staging[: len(stretch)]
                self._pread(entry.file, name, begin + first * itemsize, part)
                stretch.copy_(part)
            if digest is not None:
                digest.update(stretch.view(torch.uint8).numpy().data)
        return count * itemsize

    def stretch(self, name: str, item: int | None, count: int, dtype: torch.dtype, begin: int) -> Stretch | None:
        """What `read_into` would read, as bytes that go to `begin` of a slot; None if they must be converted. Raises CheckpointError."""
        entry = self._entries[name]
        if DTYPES[entry.dtype] != dtype:
            return None
        itemsize, offset = self._place(name, item, count)
        try:
            return Stretch(self._open(entry.file), offset, begin, count * itemsize)
        except OSError as error:
            raise self._unreadable(name, error) from error

    def cut(self, name: str, cut: Cut, num_bytes: int) -> CheckpointError:
        """What to say of a stretch that was not read whole."""
        if cut.errno:
            return self._unreadable(name, OSError(cut.errno, os.strerror(cut.errno)))
        return self._ended(name, cut.got, num_bytes)

    def _place(self, name: str, item: int | None, count: int) -> tuple[int, int]:
        """(bytes of an element, where in its file `count` elements begin)."""
        entry = self._entries[name]
        itemsize = (entry.end - entry.begin) // max(1, _numel(entry.shape))
        return itemsize, entry.begin + (0 if item is None else item * count * itemsize)

    def _unreadable(self, name: str, error: OSError) -> CheckpointError:
        path = self._entries[name].file
        return CheckpointError(f"cannot read {name} from {path}: {error.strerror}; check the disk or download the file again")

    def _ended(self, name: str, got: int, num_bytes: int) -> CheckpointError:
        return CheckpointError(f"{self._entries[name].file} ends inside {name} ({got} of {num_bytes} bytes); download it again")

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def _pread(self, path: Path, name: str, offset: int, into: torch.Tensor) -> None:
        view = into.view(torch.uint8).numpy().data
        done = 0
        try:
            fd = self._open(path)
            while done < len(view):
                got = os.preadv(fd, [view[done:]], offset + done)
                if got == 0:
                    raise self._ended(name, done, len(view))
                done += got
        except OSError as error:
            raise self._unreadable(name, error) from error

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[path]


class CheckpointSource:
    """The `ExpertSource` that always has everything: the checkpoint.

    Args:
        pieces: (MoE layer, expert) -> what to read and where it goes; the model family knows the names.
    """

    kind = "checkpoint"

    def __init__(self, reader: TensorReader, layout: SlotLayout, pieces: Callable[[int, int], Sequence[Piece]]):
        self._reader = reader
        self._layout = layout
        self._pieces = pieces

    def read(self, layer: int, expert: int, slot: torch.Tensor) -> Read:
        """See `ExpertSource.read`. Pieces are read in the order in which they lie in the slot, as the digest wants them; what lies
        between is made zero, whatever the memory held before."""
        size, offsets = self._layout.dtype.itemsize, self._layout.offsets
        pieces = sorted(self._pieces(layer, expert), key=lambda piece: offsets[piece.part] + piece.first * size)
        end = 0
        for piece in pieces:
            begin = offsets[piece.part] + piece.first * size
            slot[end:begin] = 0
            end = begin + _numel(piece.shape) * size
        slot[end:] = 0
        stretches = []
        for piece in pieces if can_read(len(slot), len(pieces)) else ():
            begin = offsets[piece.part] + piece.first * size
            stretches.append(self._reader.stretch(piece.tensor, piece.item, _numel(piece.shape), self._layout.dtype, begin))
        whole = [stretch for stretch in stretches if stretch is not None]
        if len(whole) < len(pieces):
            return self._read_pieces(pieces, slot)
        try:
            return Read(sum(stretch.num_bytes for stretch in whole), read(slot.numpy(), whole))
        except Cut as cut:
            raise self._reader.cut(pieces[cut.index].tensor, cut, whole[cut.index].num_bytes) from None

    def _read_pieces(self, pieces: Sequence[Piece], slot: torch.Tensor) -> Read:
        """The same one by one, with conversion."""
        parts, size = self._layout.views(slot), self._layout.dtype.itemsize
        digest, total, end = Digest(), 0, 0
        for piece in pieces:
            begin, count = self._layout.offsets[piece.part] + piece.first * size, _numel(piece.shape)
            assert begin >= end, f"{piece} overlaps the one before it"
            digest.update(slot[end:begin].numpy().data)  # padding
            into = parts[piece.part].view(-1)[piece.first : piece.first + count]
            total += self._reader.read_into(piece.tensor, piece.item, into, digest)
            end = begin + count * size
        digest.update(slot[end:].numpy().data)
        return Read(total, digest.intdigest())

    def known_digest(self, layer: int, expert: int) -> int | None:
        return None

    def close(self) -> None:
        self._reader.close()


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
