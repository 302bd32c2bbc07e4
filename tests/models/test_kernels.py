"""The compiled kernels against plain double-precision arithmetic, and their fast paths against the portable one, bit by bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.models.families import KVShape
from elastic_ep.models.kernels import kernels
from elastic_ep.models.kv import PagedKV
from elastic_ep.models.linear import Weight, multiply_groups, swiglu

DTYPES = (torch.float32, torch.bfloat16)
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def weight_of(num_in: int, num_out: int, dtype: torch.dtype, is_in_out: bool, seed: int = 0, bias: bool = True) -> Weight:
    shape = (num_in, num_out) if is_in_out else (num_out, num_in)
    return Weight(random(*shape, dtype=dtype, seed=seed), random(num_out, dtype=dtype, seed=seed + 1) if bias else None, is_in_out)


def product(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    matrix = weight.matrix.double() if weight.is_in_out else weight.matrix.double().t()
    return x.double() @ matrix + (0 if weight.bias is None else weight.bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_in_out", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), [(1, 1), (7, 5), (8, 12), (20, 80), (64, 24), (65, 37), (513, 101), (4200, 40)])
def test_matmul(dtype: torch.dtype, is_in_out: bool, num_in: int, num_out: int) -> None:
    """Right, for every number of rows, each row the same bits as alone."""
    weight = weight_of(num_in, num_out, dtype, is_in_out)
    x = random(70, num_in, dtype=dtype)
    expected = product(x, weight)
    whole = torch.empty(70, num_out, dtype=dtype)
    multiply_groups(x, [(0, 70)], [weight], whole)
    assert ((whole.double() - expected).abs().max() / expected.abs().max()) < EPSILON[dtype] * (1 + num_in / 2000)
    for rows in (1, 2, 3, 4, 5, 8, 11, 12, 13, 31, 64, 69):
        part = torch.empty(rows, num_out, dtype=dtype)
        multiply_groups(x[70 - rows :].clone(), [(0, rows)], [weight], part)
        assert torch.equal(part, whole[70 - rows :]), f"{rows} rows"


def test_groups_leave_other_rows_alone() -> None:
    weights = [weight_of(24, 16, torch.float32, False, seed=i, bias=i == 1) for i in range(3)]
    x, out = random(20, 24), torch.full((20, 16), 7.0)
    multiply_groups(x, [(0, 1), (1, 9), (12, 18)], weights, out)
    for (begin, end), weight in zip([(0, 1), (1, 9), (12, 18)], weights, strict=True):
        assert torch.allclose(out[begin:end].double(), product(x[begin:end], weight), atol=1e-4)
    assert torch.equal(out[9:12], torch.full((3, 16), 7.0))
    assert torch.equal(out[18:], torch.full((2, 16), 7.0))


def test_rounding_to_bfloat16_is_torchs() -> None:
    """One-wide products of every kind of float32 value that two bfloat16 factors give: ties, denormals, infinities, NaN."""
    values = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(torch.bfloat16).view(-1, 1)
    for factor in (1.0, 1.0078125, -3.140625, 1e-30):
        weight = Weight(torch.tensor([[factor]], dtype=torch.bfloat16), None)
        out = torch.empty_like(values)
        multiply_groups(values, [(0, len(values))], [weight], out)
        expected = (values.float() * weight.matrix.float()[0] + 0.0).to(torch.bfloat16)
        assert torch.equal(out.nan_to_num(nan=1.5), expected.nan_to_num(nan=1.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 8, 20, 64, 513])
@pytest.mark.parametrize("rounds_last", [False, True])
def test_rms_norm(dtype: torch.dtype, dim: int, rounds_last: bool) -> None:
    x, weight = random(9, dim, dtype=dtype), random(dim, dtype=dtype, seed=3)
    out = torch.empty_like(x)
    call = (x.data_ptr(), weight.data_ptr(), out.data_ptr(), 9, dim, 1e-6, dtype == torch.bfloat16, rounds_last)
    kernels().rms_norm(*call, False)
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = (weight * scaled).to(dtype) if rounds_last else weight * scaled.to(dtype)
    assert (out.float() - expected.float()).abs().max() <= EPSILON[dtype] * expected.float().abs().max()
    fast = out.clone()
    kernels().rms_norm(*call, True)
    assert torch.equal(fast, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 8, 20, 333])
def test_swiglu(dtype: torch.dtype, dim: int) -> None:
    x = random(11, 2 * dim, dtype=dtype) * 5
    x[0, 0] = 200.0
    x[1, 0] = -200.0
    gate, up = x.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    out = swiglu(x)
    assert (out.float() - expected.float()).abs().max() <= EPSILON[dtype] * expected.float().abs().max()
    portable = torch.empty_like(out)
    kernels().swiglu(x.data_ptr(), portable.data_ptr(), 11, dim, dtype == torch.bfloat16, True)
    assert torch.equal(portable, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_in_out", [False, True])
def test_portable_matmul_gives_the_same_bits(dtype: torch.dtype, is_in_out: bool) -> None:
    weight = weight_of(77, 40, dtype, is_in_out)
    x = random(33, 77, dtype=dtype)
    fast, portable = torch.empty(33, 40, dtype=dtype), torch.empty(33, 40, dtype=dtype)
    for out, is_portable in ((fast, False), (portable, True)):
        group = (0, 33, *weight.addresses)
        kernels().matmul(x.data_ptr(), out.data_ptr(), group, 77, 40, dtype == torch.bfloat16, is_in_out, is_portable)
    assert torch.equal(fast, portable)


# ---- attention

SHAPES = [(4, 2, 24, 24), (4, 4, 32, 20), (8, 1, 64, 64), (3, 3, 7, 9), (6, 2, 128, 8)]
"""query heads, key heads, key dim, value dim"""


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, sinks: torch.Tensor | None) -> torch.Tensor:
    count, heads, dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], 1).double() for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * dim**-0.5
    i = torch.arange(count)
    seen = i[None, :] <= i[:, None]
    if window:
        seen &= i[None, :] > i[:, None] - window
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(heads, count, 1)], -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :count], v)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("window", "with_sinks"), [(0, False), (0, True), (1, False), (16, True), (64, False), (90, False)])
def test_attention(shape: tuple[int, int, int, int], window: int, with_sinks: bool) -> None:
    """Right to float32, at lengths around the tile; two sequences in one call, in pages that are not in order."""
    heads, kv_heads, key_dim, value_dim = shape
    sinks = random(heads) if with_sinks else None
    kv = PagedKV(2, KVShape(kv_heads, key_dim, value_dim), 1024)
    lengths = (63, 64, 65, 130, 1)
    inputs = {n: (random(n, heads, key_dim), random(n, kv_heads, key_dim, seed=1), random(n, kv_heads, value_dim, seed=2)) for n in lengths}
    for a, b in itertools.pairwise(lengths):
        for seq_id in (a, b):
            kv.extend(seq_id, 0, seq_id)
        q, k, v = (torch.cat(pair) for pair in zip(inputs[a], inputs[b], strict=True))
        out = torch.empty(a + b, heads, value_dim)
        kv.attend(1, q, k, v, out, kv.runs([(a, 0, a), (b, 0, b)]), key_dim**-0.5, window, sinks)
        expected = torch.cat([plain_attention(*inputs[n], window, sinks) for n in (a, b)])
        assert (out - expected).abs().max() < 3e-6
        kv.release(a)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_bits(shape: tuple[int, int, int, int]) -> None:
    """All at once, in chunks and one by one; the portable path too; memory that held something else before."""
    heads, kv_heads, key_dim, value_dim = shape
    q, k, v = random(150, heads, key_dim), random(150, kv_heads, key_dim, seed=1), random(150, kv_heads, value_dim, seed=2)
    kv = PagedKV(1, KVShape(kv_heads, key_dim, value_dim), 192)
    kv.extend(9, 0, 192)
    dirty = torch.full((192, kv_heads, max(key_dim, value_dim)), torch.nan)
    junk = dirty[..., :key_dim].contiguous(), dirty[..., :value_dim].contiguous()
    kv.attend(0, torch.zeros(192, heads, key_dim), *junk, torch.empty(192, heads, value_dim), kv.runs([(9, 0, 192)]), 1.0)
    kv.release(9)
    results = []
    for sizes in ([150], [64, 64, 22], [1] * 150, [3, 61, 1, 85]):
        out, start = torch.empty(150, heads, value_dim), 0
        for count in sizes:
            kv.extend(1, start, count)
            part = slice(start, start + count)
            kv.attend(0, q[part], k[part], v[part], out[part], kv.runs([(1, start, count)]), 0.3, 100, None)
            start += count
        results.append(out)
        kv.release(1)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert not results[0].isnan().any()


def test_portable_attention_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random(100, 4, 40), random(100, 2, 40, seed=1), random(100, 2, 24, seed=2)

    class Portable:
        TILE = kernels().TILE

        @staticmethod
        def attend(*args: object) -> None:
            kernels().attend(*args[:-1], True)

    results = []
    for implementation in (kernels(), Portable):
        kv = PagedKV(1, KVShape(2, 40, 24), 128)
        kv._kernels = implementation
        kv.extend(1, 0, 100)
        out = torch.empty(100, 4, 24)
        kv.attend(0, q, k, v, out, kv.runs([(1, 0, 100)]), 0.2, 0, None)
        results.append(out)
    assert torch.equal(*results)


class TestPages:
    def test_capacity(self) -> None:
        kv = PagedKV(1, KVShape(1, 8, 8), 130)
        assert (kv.num_pages, kv.page_tokens) == (3, 64)
        kv.extend(1, 0, 65)
        with pytest.raises(InvalidInputError, match="sequence 2 needs 2 more pages of 64 tokens, 1 of 3 are free"):
            kv.extend(2, 0, 100)
        kv.extend(2, 0, 64)
        kv.release(1)
        kv.extend(2, 64, 64)
        assert kv.num_free_pages == 1

    def test_gap_is_refused(self) -> None:
        kv = PagedKV(1, KVShape(1, 8, 8), 640)
        kv.extend(1, 0, 10)
        with pytest.raises(InvalidInputError, match="has 10 positions on this rank, its work starts at 11"):
            kv.extend(1, 11, 1)
        kv.extend(1, 5, 1)
        with pytest.raises(InvalidInputError, match="has 6 positions"):
            kv.extend(1, 10, 1)
        with pytest.raises(InvalidInputError, match="has 0 positions"):
            kv.extend(2, 1, 1)
        kv.release(3)
