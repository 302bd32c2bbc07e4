"""How many rows make a row's bits independent of the others.

Products, norms and attention go through our own kernels, where a row knows no other. What transformers computes by itself is left: the
library's vectorised elementwise functions handle the last elements of a flat array, those that do not fill two vectors, by another
routine. Padding the step's rows meets that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

_VECTOR_ELEMENTS = 64
"""twice the widest vector (512 bits) of the narrowest dtype (16 bits)"""


def row_multiple(lengths: Iterable[int]) -> int:
    """The least number m such that m rows of any of these lengths fill whole pairs of vectors."""
    return math.lcm(1, *(_VECTOR_ELEMENTS // math.gcd(_VECTOR_ELEMENTS, length) for length in lengths if length > 0))


def padded_rows(count: int, multiple: int) -> int:
    """Rows to compute for `count` real ones: a multiple of `multiple`."""
    return -(-count // multiple) * multiple
