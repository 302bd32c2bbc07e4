"""Routed experts as transformers' modules call them: dispatch to the ranks that hold them, compute those that came here, combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from elastic_ep.core.errors import WrongExpertError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.models.build import IMPLEMENTATION
from elastic_ep.models.linear import Weight
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
        gate: intermediate activations [rows, 2 I] -> [rows, I].
        row_multiple: rows of intermediate activations that fill whole vectors; 1 where bits do not matter.
        multiply: `multiply_groups`, or its fast sister.
    """

    layer: int
    rank: int
    slots: ExpertSlots
    gate: Callable[[torch.Tensor], torch.Tensor]
    row_multiple: int
    multiply: Callable[[torch.Tensor, Sequence[tuple[int, int]], Sequence[Weight], torch.Tensor], None]
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
        bounds = [(begin, end) for _, begin, end in groups]
        count, padded = len(rows), -(-len(rows) // self.row_multiple) * self.row_multiple
        gate_up = torch.empty(padded, weights[0].gate_up.num_out, dtype=rows.dtype)
        gate_up[count:] = 0
        self.multiply(rows, bounds, [w.gate_up for w in weights], gate_up)
        inner = self.gate(gate_up)
        out = torch.empty_like(rows)
        self.multiply(inner, bounds, [w.down for w in weights], out)
        return out

    def _stream(self, expert: int, routing: RoutingTable) -> ExpertWeights:
        if routing.streamed.get((self.layer, expert)) == self.rank:
            return self.slots.stream(self.layer, expert)
        raise WrongExpertError(
            f"rank {self.rank} was sent tokens for expert {expert} of MoE layer {self.layer} in epoch {routing.epoch}; no slot holds it"
        )


class Experts(Protocol):
    """What each experts module of transformers has as `elastic_experts`."""

    def forward(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """hidden [rows, H], topk [rows, K] -> [rows, H]. Raises StepVoid."""
        ...


def _forward(module: torch.nn.Module, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    experts: Experts = module.elastic_experts  # type: ignore[assignment]
    return experts.forward(hidden, topk_ids, topk_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
