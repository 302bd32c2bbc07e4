"""Sampling is a pure function of (seed, position, logits), and samples what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elastic_ep.brain.messages import SamplingParams
from elastic_ep.models.sampling import sample, uniform


def logits_of(count: int, seed: int, spread: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(count) * spread).astype(np.float32)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.array([1.0, 3.0, -2.0, 3.0], dtype=np.float32)
    assert sample(logits, SamplingParams(temperature=0, seed=9), 5).token == 1


def test_same_inputs_same_token_others_differ() -> None:
    logits = logits_of(1000, 1)
    first = [sample(logits, SamplingParams(temperature=1.0, seed=7), position).token for position in range(50)]
    assert first == [sample(logits.copy(), SamplingParams(temperature=1.0, seed=7), position).token for position in range(50)]
    assert first != [sample(logits, SamplingParams(temperature=1.0, seed=8), position).token for position in range(50)]
    assert len(set(first)) > 10


def test_seeds_are_64_bit_and_any_sign() -> None:
    assert uniform(2**64 - 1, 3) == uniform(-1, 3) != uniform(2**63, 3)
    numbers = [uniform(s, p) for s in range(40) for p in range(40)]
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1
    assert abs(np.mean(numbers) - 0.5) < 0.02


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.7, 1.0), (1.0, 0.8), (0.7, 0.5)])
def test_frequencies(temperature: float, top_p: float) -> None:
    """20000 draws against the exact distribution, by chi-square."""
    logits = logits_of(20, 3, 1.0)
    weights = np.exp(logits.astype(np.float64) / temperature)
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1] if top_p < 1 else order
    expected = np.zeros(20)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=42)
    draws = np.bincount([sample(logits, params, position).token for position in range(20000)], minlength=20)
    assert draws[expected == 0].sum() == 0
    seen = expected > 0
    chi_square = ((draws[seen] - 20000 * expected[seen]) ** 2 / (20000 * expected[seen])).sum()
    assert chi_square < 50, "99.99 % of honest samplers stay below"


def test_a_small_nucleus_is_greedy_and_a_flat_one_keeps_going() -> None:
    assert sample(logits_of(5000, 4), SamplingParams(top_p=1e-9, seed=1), 0).token == int(logits_of(5000, 4).argmax())
    flat = np.zeros(5000, dtype=np.float32)
    tokens = {sample(flat, SamplingParams(top_p=0.5, seed=1), position).token for position in range(400)}
    assert max(tokens) < 2500, "equals are kept by id"
    assert len(tokens) > 300


def test_large_vocabulary_equals_the_plain_definition() -> None:
    logits = logits_of(30000, 5)
    for position in range(20):
        params = SamplingParams(temperature=0.9, top_p=0.95, seed=position)
        weights = np.exp((logits.astype(np.float64) - logits.max()) / 0.9)
        order = np.argsort(-logits, kind="stable")
        cumulative = np.cumsum(weights[order])
        kept = int(np.searchsorted(cumulative, 0.95 * weights.sum())) + 1
        index = int(np.searchsorted(cumulative[:kept], uniform(position, position) * cumulative[kept - 1], side="right"))
        assert sample(logits, params, position).token == order[index]


def test_logprobs_are_of_the_untouched_distribution() -> None:
    logits = logits_of(300, 6)
    logits[17] = logits[200]
    expected = torch.log_softmax(torch.from_numpy(logits).double(), 0).numpy()
    out = sample(logits, SamplingParams(temperature=0.3, top_p=0.5, seed=2, top_logprobs=300), 4)
    assert out.logprob == pytest.approx(expected[out.token], abs=1e-9)
    assert [token for token, _ in out.top] == np.argsort(-logits, kind="stable").tolist()
    assert [p for _, p in out.top] == pytest.approx(sorted(expected, reverse=True))
    assert sample(logits, SamplingParams(seed=2, top_logprobs=0), 4).top == ()
    assert sample(logits, SamplingParams(seed=2), 4).logprob is None
    assert len(sample(logits, SamplingParams(seed=2, top_logprobs=5), 4).top) == 5


def test_extreme_logits() -> None:
    logits = np.array([-np.inf, 1e30, -1e30, 0.0], dtype=np.float32)
    for temperature in (0.0, 1e-6, 1.0, 100.0):
        out = sample(logits, SamplingParams(temperature=temperature, seed=1, top_logprobs=2), 0)
        assert (out.token, out.logprob) == (1, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("count", [1, 3, 500])
def test_logits_that_are_no_numbers_end_in_a_token(bad: float, count: int) -> None:
    """A nucleus is never looked for among them: that search would not end."""
    logits = logits_of(500, 7)
    logits[:count] = bad
    for params in (SamplingParams(seed=1, top_p=0.9, top_logprobs=3), SamplingParams(temperature=0)):
        assert sample(logits, params, 0).token == 0
