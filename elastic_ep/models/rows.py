"""How many rows make a row's bits independent of the others, and the check that this processor's libraries keep to it.

Products, norms and attention go through our own kernels, where a row knows no other. What transformers computes by itself is left:
its routers multiply by the library, which takes another kernel below `MIN_ROWS` rows; and its vectorised elementwise functions handle
the last elements of a flat array, those that do not fill two vectors, by another routine. Padding the step's rows meets both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from elastic_ep.core.errors import ElasticEPError

MIN_ROWS = 4
_VECTOR_ELEMENTS = 64
"""twice the widest vector (512 bits) of the narrowest dtype (16 bits)"""
_PROBE_ROWS = (4, 5, 6, 7, 8, 11, 16, 29)


def row_multiple(lengths: Iterable[int]) -> int:
    """The least number m such that m rows of any of these lengths fill whole pairs of vectors."""
    return math.lcm(1, *(_VECTOR_ELEMENTS // math.gcd(_VECTOR_ELEMENTS, length) for length in lengths if length > 0))


def padded_rows(count: int, multiple: int) -> int:
    """Rows to compute for `count` real ones: at least MIN_ROWS, a multiple of `multiple`."""
    return -(-max(count, MIN_ROWS) // multiple) * multiple


def check_matmul(weights: Iterable[torch.Tensor], multiply: Callable[..., torch.Tensor] = torch.matmul) -> None:
    """Compare each row of x @ weight over several numbers of rows, bit by bit, once per shape and layout.

    Args:
        weights: [in, out] as they are multiplied (transposed views count as their own layout).
        multiply: the product to judge.

    Raises ElasticEPError naming the shape where this processor's library does not keep a row's bits.
    """
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        key = (tuple(weight.shape), weight.stride(), weight.dtype)
        if key in seen:
            continue
        seen.add(key)
        x = torch.randn(max(_PROBE_ROWS), weight.shape[0], generator=generator).to(weight.dtype)
        full = multiply(x, weight)
        for rows in _PROBE_ROWS:
            if not torch.equal(multiply(x[-rows:].clone(), weight), full[-rows:]):
                raise ElasticEPError(
                    f"on this processor a {weight.dtype} product with a {list(weight.shape)} matrix gives other bits for {rows} rows than "
                    f"for {len(full)}, so tokens could differ after a failure; serve with fast math if that is acceptable"
                )
