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

    Temperature 0 takes the largest logit, the lowest id among equals. Otherwise a uniform number that a counter-based generator
    (Philox) gives for (seed, position) is looked up in the cumulative sum, in float64, of the probabilities: in order of id, or, with
    top_p below 1, of the fewest tokens whose mass reaches top_p, from the most likely (equals by id). Log-probabilities are those of
    the untouched distribution.
    """
    token = int(logits.argmax())
    if not np.isfinite(logits[token]):  # the largest is NaN or infinite: there is nothing to draw from
        lowest, highest = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)
        logits = np.nan_to_num(logits, nan=lowest, posinf=highest, neginf=lowest)
    elif params.temperature:
        token = _draw(logits, params, position)
    if params.top_logprobs is None:
        return Sampled(token, None, ())
    logprobs = _log_softmax(logits)
    best = _largest(logits, params.top_logprobs)
    return Sampled(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in best))


def uniform(seed: int, position: int) -> float:
    """The uniform number in [0, 1) of (seed, position)."""
    generator = np.random.Philox(key=np.array([seed & 0xFFFFFFFFFFFFFFFF, position], dtype=np.uint64))
    return float(generator.random_raw() >> 11) * 2.0**-53


def _draw(logits: NDArray[np.float32], params: SamplingParams, position: int) -> int:
    weights = np.exp((logits.astype(np.float64) - float(logits.max())) / params.temperature)
    ids = None if params.top_p >= 1.0 else _nucleus(logits, weights, params.top_p)
    cumulative = np.cumsum(weights if ids is None else weights[ids])
    target = uniform(params.seed, position) * cumulative[-1]
    index = min(int(np.searchsorted(cumulative, target, side="right")), len(cumulative) - 1)
    return index if ids is None else int(ids[index])


def _nucleus(logits: NDArray[np.float32], weights: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Ids of the fewest tokens whose weights reach top_p of the whole, most likely first."""
    goal, count = top_p * float(weights.sum()), 64
    while True:
        ids = _largest(logits, count)
        cumulative = np.cumsum(weights[ids])
        if cumulative[-1] >= goal or len(ids) == len(logits):
            return ids[: int(np.searchsorted(cumulative, goal, side="left")) + 1]
        count *= 8


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
