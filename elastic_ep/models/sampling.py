"""From logits to a token: a pure function of (seed, position, logits), so that a replay on another rank picks the same token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_ep.brain.messages import SamplingParams


class Sampled(NamedTuple):
    """A token, its log-probability (None if not asked for), and the most likely (token, logprob) pairs, best first."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def sample(logits: NDArray[np.float32], params: SamplingParams, position: int) -> Sampled:
    """Pick the token at `position` from logits float32 [V].

    Temperature 0 takes the largest logit, the lowest id among equals. Otherwise: probabilities in float64, sorted from the largest
    (equals by id), cut to the smallest set whose mass reaches top_p, then the inverse of their cumulative sum at a uniform number that
    a counter-based generator (Philox) gives for (seed, position). Log-probabilities are those of the untouched distribution.
    """
    token = int(logits.argmax()) if params.temperature == 0 else _draw(logits, params, position)
    if params.top_logprobs is None:
        return Sampled(token, None, ())
    logprobs = _log_softmax(logits)
    best = _largest(logits, params.top_logprobs)
    return Sampled(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in best))


def uniform(seed: int, position: int) -> float:
    """The uniform number in [0, 1) of (seed, position)."""
    generator = np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, position])
    return float(generator.random_raw() >> 11) * 2.0**-53


def _draw(logits: NDArray[np.float32], params: SamplingParams, position: int) -> int:
    scaled = logits.astype(np.float64) / params.temperature
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled[order] - scaled[order[0]])
    cumulative = np.cumsum(weights)
    kept = len(weights)
    if params.top_p < 1.0:
        kept = min(kept, int(np.searchsorted(cumulative, params.top_p * cumulative[-1], side="left")) + 1)
    target = uniform(params.seed, position) * cumulative[kept - 1]
    index = int(np.searchsorted(cumulative[:kept], target, side="right"))
    return int(order[min(index, kept - 1)])


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    out: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return out


def _largest(logits: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Ids of the `count` largest logits, best first, equals by id."""
    count = min(count, len(logits))
    if count == 0:
        return np.empty(0, dtype=np.intp)
    threshold = np.partition(logits, len(logits) - count)[len(logits) - count]
    candidates = np.flatnonzero(logits >= threshold)
    return candidates[np.argsort(-logits[candidates], kind="stable")][:count]
