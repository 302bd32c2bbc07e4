"""Digests of bytes that are just being read or copied: each stretch is hashed while it is in the cache, so that memory is passed over once.

The digest is xxh3_64 over all bytes of a slot, padding between its parts included. `_digest.c` computes the same number, a whole expert in
one call: a thread that asks for the interpreter after each stretch waits for the steps' thread each time. Without it, this module does.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

Digest = xxhash.xxh3_64
"""what is fed with `update(bytes)` in the order of a slot and asked for `intdigest()`; lets other threads run while it hashes"""
CHUNK_BYTES = 1 << 20
"""Read, then hashed, where that is done here. Smaller ones hand the interpreter back and forth more often."""
_SHORT = 240
"""up to here the digest has other rules, which `_digest.c` does not know"""
_MOST_STRETCHES = 32


class Read(NamedTuple):
    """What an `ExpertSource` did.

    Attributes:
        num_bytes: read from the source.
        digest: of the slot's bytes as they are now.
    """

    num_bytes: int
    digest: int


class Stretch(NamedTuple):
    """Bytes of a file that go to [begin, begin + num_bytes) of a slot."""

    fd: int
    offset: int
    begin: int
    num_bytes: int


class Cut(Exception):
    """A read of stretches that failed: `index` of the stretch, bytes that came, errno (0: the file ended)."""

    def __init__(self, index: int, got: int, errno: int) -> None:
        super().__init__(index, got, errno)
        self.index, self.got, self.errno = index, got, errno


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("elastic_ep.runtime.weights._digest")
    except ImportError:  # no compiler when it was installed
        return None


_native = _load()


def copy(into: NDArray[np.uint8], source: NDArray[np.uint8]) -> Read:
    """Copy uint8 [n], contiguous. The digest is of what was copied."""
    if _native is not None and len(into) > _SHORT:
        return Read(len(into), _native.copy(into.ctypes.data, source.ctypes.data, len(into)))
    digest = Digest()
    for begin in range(0, len(into), CHUNK_BYTES):
        stretch = into[begin : begin + CHUNK_BYTES]
        np.copyto(stretch, source[begin : begin + CHUNK_BYTES])
        digest.update(stretch.data)
    return Read(len(into), digest.intdigest())


def can_read(num_bytes: int, num_stretches: int) -> bool:
    """Whether `read` can fill a slot of so many bytes."""
    return _native is not None and num_bytes > _SHORT and num_stretches <= _MOST_STRETCHES


def read(slot: NDArray[np.uint8], stretches: Sequence[Stretch]) -> int:
    """Fill a slot from files; returns its digest. The stretches ascend in the slot. Raises Cut."""
    assert _native is not None
    digest, index, got, errno = _native.read(slot.ctypes.data, len(slot), tuple(stretches))
    if index >= 0:
        raise Cut(index, got, errno)
    return int(digest)


def can_read_memory(num_bytes: int) -> bool:
    """Whether `read_memory` can fill a slot of so many bytes."""
    return _native is not None and num_bytes > _SHORT


def read_memory(slot: NDArray[np.uint8], pid: int, address: int) -> int:
    """Fill a slot from another process' memory; returns its digest. Raises OSError: EPERM where the system does not let us read it, ESRCH
    when the process is gone, EFAULT when so many bytes are not there."""
    assert _native is not None
    digest, errno = _native.read_memory(slot.ctypes.data, len(slot), pid, address)
    if errno:
        raise OSError(errno, os.strerror(errno))
    return int(digest)
