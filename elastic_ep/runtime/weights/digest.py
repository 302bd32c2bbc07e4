"""Digests of bytes that are just being read or copied: each stretch is hashed while it is in the cache, so that memory is passed over once.

The digest is xxh3_64 over all bytes of a slot, padding between its parts included.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

Digest = xxhash.xxh3_64
"""what is fed with `update(bytes)` in the order of a slot and asked for `intdigest()`; lets other threads run while it hashes"""
CHUNK_BYTES = 1 << 20
"""Read, then hashed. Stays in a core's share of the last cache; smaller ones hand the interpreter back and forth more often, which costs
a background thread its turn."""


class Read(NamedTuple):
    """What an `ExpertSource` did.

    Attributes:
        num_bytes: read from the source.
        digest: of the slot's bytes as they are now.
    """

    num_bytes: int
    digest: int


def copy(into: NDArray[np.uint8], source: NDArray[np.uint8]) -> Read:
    """Copy uint8 [n]. The digest is of what was written."""
    digest = Digest()
    for begin in range(0, len(into), CHUNK_BYTES):
        stretch = into[begin : begin + CHUNK_BYTES]
        np.copyto(stretch, source[begin : begin + CHUNK_BYTES])
        digest.update(stretch.data)
    return Read(len(into), digest.intdigest())
