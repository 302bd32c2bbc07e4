"""Where the parts of an expert lie in a slot. Apart from the tensors, so that the controller, which has none, can count bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

ALIGNMENT = 64
"""bytes; matrix kernels may pick another order of sums for a matrix that starts elsewhere in a cache line"""

Parts = Sequence[tuple[str, tuple[int, ...]]]


def part_offsets(parts: Parts, itemsize: int) -> tuple[dict[str, int], int]:
    """(byte offset of each part, bytes of a slot), padding between parts included."""
    offsets, end = {}, 0
    for name, shape in parts:
        offsets[name] = end
        end = -(-(end + math.prod(shape) * itemsize) // ALIGNMENT) * ALIGNMENT
    return offsets, end
