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
from elastic_ep.runtime.weights.headers import TensorEntry

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CHUNK_BYTES = 16 << 20


class TensorReader:
    """Reads tensors by name. Files are opened when first needed and kept open."""

    def __init__(self, entries: Mapping[str, TensorEntry]):
        self._entries = entries
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read_into(self, name: str, item: int | None, into: torch.Tensor) -> int:
        """Fill a contiguous CPU tensor with a tensor, or with its `item`-th entry, converting the dtype. Returns the bytes read."""
        entry = self._entries[name]
        count = into.numel()
        itemsize = (entry.end - entry.begin) // max(1, _numel(entry.shape))
        begin = entry.begin + (0 if item is None else item * count * itemsize)
        source = DTYPES[entry.dtype]
        flat = into.view(-1)
        if source == into.dtype:
            self._pread(entry.file, name, begin, flat)
        else:
            step = _CHUNK_BYTES // itemsize
            staging = torch.empty(min(step, count), dtype=source)
            for first in range(0, count, step):
                part = staging[: min(step, count - first)]
                self._pread(entry.file, name, begin + first * itemsize, part)
                flat[first : first + step].copy_(part)
        return count * itemsize

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
                    raise CheckpointError(f"{path} ends inside {name} ({done} of {len(view)} bytes); download it again")
                done += got
        except OSError as error:
            raise CheckpointError(f"cannot read {name} from {path}: {error.strerror}; check the disk or download the file again") from error

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

    def read(self, layer: int, expert: int, slot: torch.Tensor) -> int:
        parts = self._layout.views(slot)
        total = 0
        for piece in self._pieces(layer, expert):
            flat = parts[piece.part].view(-1)
            total += self._reader.read_into(piece.tensor, piece.item, flat[piece.first : piece.first + _numel(piece.shape)])
        return total

    def known_digest(self, layer: int, expert: int) -> int | None:
        return None

    def close(self) -> None:
        self._reader.close()


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
