"""Routed experts as transformers' modules call them: dispatch to the ranks that hold them, compute those that came here, combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from elastic_ep.core.errors import WrongExpertError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.models.build import IMPLEMENTATION
from elastic_ep.models.rows import MIN_ROWS, padded_rows
from elastic_ep.models.slots import ExpertSlots, ExpertWeights
from elastic_ep.runtime.dispatch.base import Dispatcher, DispatchHandle, Interrupted, PeerFailed, StepPoint


Groups = tuple[tuple[int, int, int], ...]
"""(expert, first row, end row), as DispatchHandle.groups"""


class StepVoid(Exception):
    """Unwinds a forward whose exchange failed. Caught where the step was started; never leaves the engine."""

    def __init__(self, outcome: PeerFailed | Interrupted):
        super().__init__(outcome)
        self.outcome = outcome


@dataclass
class StepState:
    """The step in progress, shared by the layers of one engine.

    Attributes:
        num_tokens: real rows; those after it are padding and are not sent.
        counts: pairs sent to each expert, int64 [E] per layer, or None.
    """

    routing: RoutingTable
    dispatcher: Dispatcher
    step: int
    num_tokens: int
    counts: list[np.ndarray] | None = field(default_factory=list)


@dataclass
class LayerExperts:
    """One MoE layer's experts on this rank.

    Attributes:
        layer: index among the MoE layers.
        module: the experts module of transformers; its gate and layout are used, it has no weights.
        row_multiple: rows of intermediate activations that fill whole vectors; 0 computes exactly the rows that came (no invariance).
    """

    layer: int
    rank: int
    module: torch.nn.Module
    slots: ExpertSlots
    row_multiple: int
    state: StepState | None = None

    def forward(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """hidden [rows, H], topk [rows, K] -> [rows, H], zero in the padding. Raises StepVoid."""
        state = self.state
        assert state is not None, "experts outside of a step"
        count = state.num_tokens
        ids = topk_ids[:count].contiguous()
        if state.counts is not None:
            state.counts.append(np.bincount(ids.numpy().ravel(), minlength=self.slots.num_experts))
        combined = self.exchange(hidden[:count].contiguous(), ids, topk_weights[:count].contiguous(), state)
        if count == len(hidden):
            return combined
        out = torch.zeros_like(hidden)
        out[:count] = combined
        return out

    def exchange(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, state: StepState) -> torch.Tensor:
        """One layer's dispatch, expert compute and combine. Raises StepVoid."""
        at = StepPoint(state.routing.epoch, state.step, self.layer)
        handle = state.dispatcher.dispatch(x, ids, weights, state.routing, at)
        if not isinstance(handle, DispatchHandle):
            raise StepVoid(handle)
        combined = state.dispatcher.combine(self.compute(handle, state.routing), handle)
        if not isinstance(combined, torch.Tensor):
            raise StepVoid(combined)
        return combined

    def compute(self, handle: DispatchHandle, routing: RoutingTable) -> torch.Tensor:
        """Run each group of rows through its expert. Returns [N, H], rows as they came, not weighted."""
        rows, groups = handle.rows, handle.groups
        found = [self.slots.find(self.layer, expert) for expert, _, _ in groups]
        held = [weights for weights in found if weights is not None]
        if len(held) == len(groups):
            return self._run(rows, groups, held) if groups else rows
        # A spare buffer is overwritten by the next streamed expert but a few, so those run one at a time.
        out = torch.empty_like(rows)
        for (expert, begin, end), weights in zip(groups, found, strict=True):
            out[begin:end] = self._run(rows[begin:end], ((expert, 0, end - begin),), [weights or self._stream(expert, routing)])
        return out

    def _run(self, rows: torch.Tensor, groups: Groups, weights: Sequence[ExpertWeights]) -> torch.Tensor:
        bounds, take, give = _pad_groups(groups, self.row_multiple)
        x = rows if take is None else rows.index_select(0, take)
        gate_up = torch.empty(len(x), weights[0].gate_up.shape[1], dtype=x.dtype)
        for (begin, end), w in zip(bounds, weights, strict=True):
            _multiply(x, gate_up, begin, end, w.gate_up, w.gate_up_bias)
        inner = self.module._apply_gate(gate_up)  # type: ignore[operator]
        y = torch.empty_like(x)
        for (begin, end), w in zip(bounds, weights, strict=True):
            _multiply(inner, y, begin, end, w.down, w.down_bias)
        return y if give is None else y.index_select(0, give)

    def _stream(self, expert: int, routing: RoutingTable) -> ExpertWeights:
        if routing.streamed.get((self.layer, expert)) == self.rank:
            return self.slots.stream(self.layer, expert)
        raise WrongExpertError(
            f"rank {self.rank} was sent tokens for expert {expert} of MoE layer {self.layer} in epoch {routing.epoch}; no slot holds it"
        )


def _multiply(x: torch.Tensor, out: torch.Tensor, begin: int, end: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if bias is None:
        torch.mm(x[begin:end], weight, out=out[begin:end])
    else:
        torch.addmm(bias, x[begin:end], weight, out=out[begin:end])


def _pad_groups(groups: Groups, multiple: int) -> tuple[list[tuple[int, int]], torch.Tensor | None, torch.Tensor | None]:
    """Give each group at least MIN_ROWS rows, and the whole a multiple of `multiple`.

    Returns the new bounds of each group, the row to put in each place and the place of each row (None: as they are). Padding
    repeats a group's first row; its results are dropped.
    """
    if multiple == 0:
        return [(begin, end) for _, begin, end in groups], None, None
    take: list[int] = []
    give: list[int] = []
    bounds = []
    for _, begin, end in groups:
        place = len(take)
        give.extend(range(place, place + end - begin))
        take.extend(range(begin, end))
        take.extend([begin] * (MIN_ROWS - (end - begin)))
        bounds.append((place, len(take)))
    short = padded_rows(len(take), multiple) - len(take)
    if short:
        take.extend([groups[-1][1]] * short)
        bounds[-1] = (bounds[-1][0], len(take))
    if len(take) == groups[-1][2]:
        return bounds, None, None
    return bounds, torch.tensor(take), torch.tensor(give)


def _forward(module: torch.nn.Module, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    experts: LayerExperts = module.elastic_experts  # type: ignore[assignment]
    return experts.forward(hidden, topk_ids, topk_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
