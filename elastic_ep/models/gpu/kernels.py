"""Triton kernels whose rows do not know each other: tiles of one size in every batch, sums in one order, so that a row has the same bits
whatever else is in the step. Imported on machines with Triton only.

Products accumulate in float32 along K in tiles of BK from 0; attention runs over keys in tiles that begin at multiples of BLOCK from
position 0. Neither order depends on the number of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product(x, w, row_mask, col_mask, depth, x_stride, w_row, w_col, rows, cols, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """float32 [BM, BN]: x[rows] @ w[cols].T, w addressed by w_row (out) and w_col (in)."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    inner = tl.arange(0, BK)
    x_at = x + rows.to(tl.int64)[:, None] * x_stride
    w_at = w + cols.to(tl.int64)[None, :] * w_row
    for k in range(0, depth, BK):
        keep = k + inner < depth
        a = tl.load(x_at + (k + inner)[None, :], mask=row_mask[:, None] & keep[None, :], other=0.0)
        b = tl.load(w_at + (k + inner).to(tl.int64)[:, None] * w_col, mask=keep[:, None] & col_mask[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def linear(x, w, bias, out, num_rows, num_out, depth, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out [rows, out] = x [rows, depth] @ w [out, depth].T + bias; one program per tile of out."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    row_mask, col_mask = rows < num_rows, cols < num_out
    acc = _product(x, w, row_mask, col_mask, depth, depth, depth, 1, rows, cols, BM, BN, BK)
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * num_out + cols[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])


@triton.jit
def grouped(
    x,
    out,
    offsets,
    slot_of,
    wrong,
    memory,
    slot_elements,
    weight_at,
    bias_at,
    num_out,
    depth,
    HAS_BIAS: tl.constexpr,
    IN_OUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[begin:end] = x[begin:end] @ (weight of the slot that holds expert e) + bias, for each expert's rows offsets[e]:offsets[e + 1].

    memory: the slots of the layer, `slot_elements` each; weight_at, bias_at: elements from a slot's begin. An expert of slot -2 is left
    out; one of slot -1 should have no rows, and sets wrong[0] to itself plus one. Programs: (tiles of out, experts, row tiles handled
    side by side).
    """
    expert = tl.program_id(1)
    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    if begin >= end:
        return
    slot = tl.load(slot_of + expert)
    if slot < 0:
        if slot == -1:
            tl.store(wrong, expert + 1)
        return
    base = memory + slot.to(tl.int64) * slot_elements
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    col_mask = cols < num_out
    for first in range(begin + tl.program_id(2) * BM, end, BM * tl.num_programs(2)):
        rows = first + tl.arange(0, BM)
        row_mask = rows < end
        if IN_OUT:
            acc = _product(x, base + weight_at, row_mask, col_mask, depth, depth, 1, num_out, rows, cols, BM, BN, BK)
        else:
            acc = _product(x, base + weight_at, row_mask, col_mask, depth, depth, depth, 1, rows, cols, BM, BN, BK)
        if HAS_BIAS:
            acc += tl.load(base + bias_at + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        at = rows.to(tl.int64)[:, None] * num_out + cols[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])


@triton.jit
def swiglu(x, out, total, width, BLOCK: tl.constexpr):
    """out [rows, width] = silu(gate) * up of x [rows, 2 width], rounded after each; rows from the device: total[0].

    Any number of programs."""
    num_rows = tl.load(total)
    cols = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        for first in range(0, width, BLOCK):
            mask = first + cols < width
            at = (tl.zeros((BLOCK,), dtype=tl.int64) + row) * width + first + cols
            gate_at = x + at + (tl.zeros((BLOCK,), dtype=tl.int64) + row) * width
            gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(gate_at + width, mask=mask, other=0.0)
            inner = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty)
            tl.store(out + at, inner * up, mask=mask)


@triton.jit
def rms_norm(x, weight, out, dim, epsilon, ROUNDS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """One row per program, whole in registers."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < dim
    value = tl.load(x + row * dim + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / dim + epsilon)
    w = tl.load(weight + cols, mask=mask, other=0.0)
    normed = value * scale
    result = (normed * w.to(tl.float32)).to(out.dtype.element_ty) if ROUNDS_LAST else normed.to(out.dtype.element_ty) * w
    tl.store(out + row * dim + cols, result, mask=mask)


@triton.jit(do_not_specialize=["pages_per_sequence"])
def attend(
    query,
    keys,
    values,
    out,
    sinks,
    sequence_of,
    position_of,
    pages,
    pages_per_sequence,
    scale,
    window,
    num_kv_heads,
    key_dim,
    value_dim,
    GROUP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """One token and one key head (with its GROUP query heads) per program.

    query [T, heads, key_dim]; keys [pages * PAGE, kv heads, key_dim]; values likewise; sequence_of, position_of int64 [T]; pages int64
    [sequences, pages_per_sequence]; out [T, heads, value_dim]. Causal, over the last `window` keys (0: all).
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(position_of + token)
    table = pages + tl.load(sequence_of + token) * pages_per_sequence
    num_heads = num_kv_heads * GROUP
    group, dims, vdims = tl.arange(0, BH), tl.arange(0, BD), tl.arange(0, BV)
    heads = head * GROUP + group
    head_mask = group < GROUP
    q_at = query + (token * num_heads + heads)[:, None] * key_dim + dims[None, :]
    q = tl.load(q_at, mask=head_mask[:, None] & (dims < key_dim)[None, :], other=0.0)
    first = position * 0
    if window > 0:
        first = tl.maximum(position + 1 - window, 0)
    best = tl.full((BH,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BH,), dtype=tl.float32)
    if HAS_SINKS:
        best = tl.load(sinks + heads, mask=head_mask, other=0.0).to(tl.float32)
        total += 1.0
    acc = tl.zeros((BH, BV), dtype=tl.float32)
    for start in range(first // BLOCK * BLOCK, position + 1, BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen = (at >= first) & (at <= position)
        page = tl.load(table + at // PAGE, mask=seen, other=0)
        cell = (page.to(tl.int64) * PAGE + at % PAGE) * num_kv_heads + head
        k = tl.load(keys + cell[None, :] * key_dim + dims[:, None], mask=seen[None, :] & (dims < key_dim)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp(best - higher)
        weights = tl.exp(scores - higher[:, None])
        v = tl.load(values + cell[:, None] * value_dim + vdims[None, :], mask=seen[:, None] & (vdims < value_dim)[None, :], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        best = higher
    result = acc / total[:, None]
    out_at = out + (token * num_heads + heads)[:, None] * value_dim + vdims[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=head_mask[:, None] & (vdims < value_dim)[None, :])
