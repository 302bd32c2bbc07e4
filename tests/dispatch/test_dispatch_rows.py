"""Compiled and NumPy forms of planning, gathering and summing: equal to the last bit, and neither reads outside what it was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.dispatch import rows
from elastic_ep.runtime.dispatch.grouping import BadPairsError, distinct_rows, plan_arrival, plan_departure

compiled = pytest.param("compiled", marks=pytest.mark.skipif(rows.compiled is None, reason="the extension was not built"))


@pytest.fixture(params=[compiled, "numpy"])
def form(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(rows, "compiled", None)
    return request.param


def bits(array: torch.Tensor) -> list[int]:
    return array.view(torch.int16 if array.dtype == torch.bfloat16 else torch.int32).flatten().tolist()


def test_departure_example(form: str) -> None:
    plan = plan_departure(np.array([[0, 2], [2, 1]]), np.array([[0, 1], [1, 1]], dtype=np.int32), 2)
    assert plan.pairs.tolist() == [[0, 0], [0, 2], [1, 2], [1, 1]]
    assert plan.start == [0, 1, 4]
    assert plan.position.tolist() == [[0, 1], [2, 3]]
    assert plan.pairs_for(1).tolist() == [[0, 2], [1, 2], [1, 1]]


def test_each_row_goes_once_to_a_rank_with_several_of_its_experts(form: str) -> None:
    plan = plan_departure(np.array([[5, 1, 5], [2, 3, 4], [0, 1, 2]]), np.array([[1, 1, 1], [0, 1, 0], [1, 0, 1]], dtype=np.int32), 2)
    sent = distinct_rows(plan.pairs_for(1))
    assert sent.tokens.tolist() == [0, 1, 2]
    assert sent.pairs.tolist() == [[0, 5], [0, 1], [0, 5], [1, 3], [2, 0], [2, 2]]
    nothing = distinct_rows(plan.pairs_for(1)[:0])
    assert len(nothing.tokens) == 0
    assert nothing.pairs.shape == (0, 2)


@pytest.mark.parametrize("rank", [-1, 2, 2**31 - 1])
def test_a_pair_without_a_rank_is_refused(form: str, rank: int) -> None:
    with pytest.raises(InvalidInputError, match=f"expert 7 is served by rank {rank}"):
        plan_departure(np.array([[0, 7]]), np.array([[0, rank]], dtype=np.int32), 2)


def test_arrival_example(form: str) -> None:
    pairs = [np.array(p, dtype=np.int32).reshape(-1, 2) for p in ([[0, 4], [0, 1], [1, 4]], [], [[2, 1], [0, 0]])]
    plan = plan_arrival(pairs, [2, 0, 3], np.ones(5, dtype=bool))
    assert plan.groups == ((0, 0, 1), (1, 1, 3), (4, 3, 5))
    assert plan.source_of.tolist() == [2, 0, 2, 0, 0]
    assert plan.row_of.tolist() == [0, 0, 2, 0, 1]
    assert plan.back.tolist() == [3, 1, 4, 2, 0]


@pytest.mark.parametrize("pair", [[2, 1], [-1, 1], [0, 3], [0, -1], [0, 5], [2**31 - 1, 0], [0, -(2**31)]])
def test_pairs_that_name_what_is_not_there_are_refused(form: str, pair: list[int]) -> None:
    good = np.array([[0, 0], [1, 4]], dtype=np.int32)
    served = np.array([True, True, True, False, True])
    with pytest.raises(BadPairsError) as caught:
        plan_arrival([good, np.array([[0, 0], pair], dtype=np.int32), good], [2, 2, 2], served)
    assert caught.value.source == 1


def test_both_forms_plan_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        tokens, top_k, ranks, experts = (int(n) for n in rng.integers((0, 1, 1, 1), (20, 9, 6, 40)))
        ids = rng.integers(0, experts, (tokens, top_k))
        destination = rng.integers(0, ranks, (tokens, top_k)).astype(np.int32)
        pairs = [rng.integers(0, (7, experts), (int(n), 2)).astype(np.int32) for n in rng.integers(0, 30, ranks)]
        plans = []
        for form in (rows.compiled, None):
            with monkeypatch.context() as patch:
                patch.setattr(rows, "compiled", form)
                out = plan_departure(ids, destination, ranks)
                back = plan_arrival(pairs, [7] * ranks, np.ones(experts, dtype=bool))
            arrays = (out.pairs, out.position, back.source_of, back.row_of, back.back)
            plans.append((out.start, back.groups, [a.tolist() for a in arrays]))
        assert plans[0] == plans[1]


def test_gather(form: str) -> None:
    sources = [np.arange(6, dtype=np.float32).reshape(3, 2), np.empty((0, 2), np.float32), 10 * np.ones((1, 2), np.float32)]
    out = np.empty((4, 2), dtype=np.float32)
    rows.gather(out, sources, np.array([0, 2, 0, 0], dtype=np.int32), np.array([2, 0, 0, 2], dtype=np.int32))
    assert out.tolist() == [[4, 5], [10, 10], [0, 1], [4, 5]]


@pytest.mark.parametrize(("source", "row"), [(0, 3), (0, -1), (1, 0), (0, 2**31 - 1)])
def test_gather_refuses_rows_that_no_source_has(form: str, source: int, row: int) -> None:
    sources = [np.zeros((3, 2), np.float32), np.zeros((0, 2), np.float32)]
    with pytest.raises(IndexError, match="gather"):
        rows.gather(np.empty((1, 2), np.float32), sources, np.array([source], np.int32), np.array([row], np.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [1, 7, 512, 1300])
def test_sums_are_rounded_step_by_step(form: str, dtype: torch.dtype, hidden: int) -> None:
    rng = np.random.default_rng(hidden)
    for top_k in (1, 2, 8):
        tokens = 33
        values = rng.standard_normal((tokens * top_k + 5, hidden)) * 10.0 ** rng.integers(-42, 30, (tokens * top_k + 5, 1))
        source = torch.from_numpy(values).to(dtype)
        weights = torch.from_numpy(rng.standard_normal((tokens, top_k)).astype(np.float32))
        row_of = rng.permutation(len(source))[: tokens * top_k].astype(np.int32)
        position = rng.permutation(tokens * top_k).reshape(tokens, top_k).astype(np.int32)
        got = rows.weighted_sum([rows.as_array(source)], np.zeros_like(row_of), row_of, position, weights, hidden, dtype)
        terms = [weights[:, k, None] * source[torch.from_numpy(row_of[position[:, k]]).long()].float() for k in range(top_k)]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        assert bits(got) == bits(total.to(dtype))


def test_rounding_to_bfloat16_at_its_edges(form: str) -> None:
    """1.0 times a weight is the weight: ties, overflow, subnormals and infinities reach the last rounding as they are."""
    patterns = [
        0,
        1 << 31,
        0x3F808000,
        0x3F818000,
        0x3F807FFF,
        0x3F808001,
        0x7F7FFFFF,
        0x7F800000,
        0xFF800000,
        1,
        0x8000,
        0x18000,
        0x807FFFFF,
    ]
    weights = torch.from_numpy(np.array(patterns, dtype=np.uint32).view(np.float32)).view(-1, 1)
    place = np.arange(len(patterns), dtype=np.int32)
    sources = [rows.as_array(torch.ones(len(patterns), 1, dtype=torch.bfloat16))]
    got = rows.weighted_sum(sources, np.zeros_like(place), place, place.reshape(-1, 1), weights, 1, torch.bfloat16)
    assert bits(got) == bits(weights.bfloat16())


def test_nan_and_no_tokens(form: str) -> None:
    source = rows.as_array(torch.tensor([[float("nan"), 1.0]]).bfloat16())
    one = np.zeros(1, np.int32)
    got = rows.weighted_sum([source], one, one, one.reshape(1, 1), torch.ones(1, 1), 2, torch.bfloat16)
    assert bits(got) == [0x7FC0, 0x3F80]
    none = rows.weighted_sum([source], one[:0], one[:0], np.empty((0, 4), np.int32), torch.ones(0, 4), 2, torch.bfloat16)
    assert none.shape == (0, 2)


def test_a_row_buffer_is_reused_and_grows() -> None:
    buffer = rows.RowBuffer()
    first, array = buffer.take(4, 3, torch.float32)
    array[:] = 7.0
    assert bool((first == 7.0).all())
    again, _ = buffer.take(2, 3, torch.float32)
    assert again.data_ptr() == first.data_ptr()
    assert buffer.take(400, 3, torch.bfloat16)[0].shape == (400, 3)
    assert buffer.take(0, 3, torch.bfloat16)[1].shape == (0, 3)
