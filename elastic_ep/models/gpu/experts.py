"""Routed experts on a GPU: all experts of a layer in one product over the slots, where each expert's rows lie being read on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from elastic_ep.core.errors import WrongExpertError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.models.experts import StepVoid
from elastic_ep.models.gpu.arithmetic import Groups, Part, multiply_groups, swiglu
from elastic_ep.models.gpu.slots import ELSEWHERE, DeviceSlots
from elastic_ep.runtime.dispatch.base import Dispatcher, DispatchHandle, StepPoint
from elastic_ep.runtime.dispatch.cuda.dispatcher import CudaDispatcher

WATCHED_LAYERS = 8
"""A step that is launched kernel by kernel looks at its peers after so many layers: the driver takes about a thousand launches ahead."""


class HostBatch(NamedTuple):
    """What a backend brought whose groups are numbers on the host; the like of `DeviceBatch`."""

    rows: torch.Tensor
    outputs: torch.Tensor
    offsets: torch.Tensor

    @staticmethod
    def of(handle: DispatchHandle, num_experts: int) -> HostBatch:
        counts = torch.zeros(num_experts + 1, dtype=torch.int32)
        for expert, begin, end in handle.groups:
            counts[expert + 1] = end - begin
        offsets = counts.cumsum(0, dtype=torch.int32).to(handle.rows.device)
        return HostBatch(handle.rows, torch.empty_like(handle.rows), offsets)


@dataclass(frozen=True)
class DeviceStep:
    """The step in progress, shared by the layers of one engine.

    Attributes:
        enqueue: the dispatcher, if it can be called without waiting for the device; its outcome is then asked for after the last layer.
        tables: `DeviceSlots.tables()`.
        counts: int64 [L, E] on the device, pairs of this rank's tokens, or None.
        is_real: int64 [T], what each token counts; None: one.
        cut: while a step is captured: called in place of the exchange.
        wrong: int32 [1] on the device; set when rows came for an expert that no slot holds.
    """

    routing: RoutingTable
    dispatcher: Dispatcher
    enqueue: CudaDispatcher | None
    step: int
    tables: torch.Tensor
    counts: torch.Tensor | None
    wrong: torch.Tensor
    is_real: torch.Tensor | None = None
    cut: Callable[[DeviceExperts, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None


@dataclass
class DeviceExperts:
    """One MoE layer's experts on this rank. The `Experts` of its module.

    Attributes:
        layer: index among the MoE layers.
        matrices: `DeviceSlots.matrices`.
        gate: intermediate activations [rows, 2 I] -> [rows, I]; None for `swiglu`.
    """

    layer: int
    rank: int
    slots: DeviceSlots
    matrices: dict[str, Part]
    gate: Callable[[torch.Tensor], torch.Tensor] | None
    state: DeviceStep | None = None

    def forward(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """See `Experts.forward`."""
        state = self.state
        assert state is not None, "experts outside of a step"
        ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
        if state.counts is not None and len(ids):
            one = torch.ones_like(ids) if state.is_real is None else state.is_real[:, None].expand_as(ids)
            state.counts[self.layer].index_add_(0, ids.view(-1), one.reshape(-1))
        x = hidden.contiguous()
        return self.exchange(x, ids, weights, state) if state.cut is None else state.cut(self, x, ids, weights)

    def exchange(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, state: DeviceStep) -> torch.Tensor:
        """Dispatch, expert compute and combine. Raises StepVoid."""
        if state.enqueue is not None:
            batch = state.enqueue.enqueue_dispatch(x, ids, weights, self.layer)
            self._compute(batch, batch.state, state)
            out = state.enqueue.enqueue_combine(batch)
            if state.is_real is None and self.layer % WATCHED_LAYERS == WATCHED_LAYERS - 1:
                self._look(state)
            return out
        handle = state.dispatcher.dispatch(x, ids, weights, state.routing, StepPoint(state.routing.epoch, state.step, self.layer))
        if not isinstance(handle, DispatchHandle):
            raise StepVoid(handle)
        brought: Any = handle.state if hasattr(handle.state, "offsets") else HostBatch.of(handle, len(state.tables[self.layer]))
        self._compute(handle, brought, state)
        combined = state.dispatcher.combine(brought.outputs[: len(handle.rows)], handle)
        if not isinstance(combined, torch.Tensor):
            raise StepVoid(combined)
        return combined

    def _compute(self, handle: DispatchHandle, batch: Any, state: DeviceStep) -> None:
        """Run the rows of the batch (a DeviceBatch, or like one) through their experts, into its `outputs`; not weighted."""
        rows, outputs, offsets = batch.rows, batch.outputs, batch.offsets
        if not len(rows):
            return
        table = state.tables[self.layer, : len(offsets) - 1]
        streamed = [expert for (layer, expert), rank in state.routing.streamed.items() if layer == self.layer and rank == self.rank]
        if streamed:
            table = table.index_fill(0, torch.tensor(streamed, device=table.device), ELSEWHERE)
        self._run(rows, Groups(offsets, table, state.wrong), self.slots.memory[self.layer], outputs)
        if not streamed:
            return
        if state.enqueue is not None:
            self._look(state)
        present = {expert for expert, _, _ in handle.groups}
        for expert in sorted(present.intersection(streamed)):
            index = self.slots.stream(self.layer, expert)
            only = torch.full_like(table, ELSEWHERE)
            only[expert] = index
            self._run(rows, Groups(offsets, only, state.wrong), self.slots.spare_memory, outputs)

    def _look(self, state: DeviceStep) -> None:
        """Wait for what is enqueued, watching the peers' channels: a dead one must not be waited for inside a launch. Raises StepVoid."""
        assert state.enqueue is not None
        outcome = state.enqueue.wait()
        if outcome is not None:
            raise StepVoid(outcome)

    def _run(self, rows: torch.Tensor, groups: Groups, memory: torch.Tensor, out: torch.Tensor) -> None:
        part = self.matrices["gate_up_proj"]
        gate_up = torch.empty(len(rows), part.num_out, dtype=rows.dtype, device=rows.device)
        multiply_groups(rows, memory, part, groups, gate_up)
        inner = swiglu(gate_up, groups.offsets) if self.gate is None else self.gate(gate_up)
        multiply_groups(inner.contiguous(), memory, self.matrices["down_proj"], groups, out)


def check_right(rank: int, wrong: int, epoch: int) -> None:
    """Raises WrongExpertError if the device saw rows for an expert that no slot holds: `wrong` is `DeviceStep.wrong` on the host."""
    if wrong:
        raise WrongExpertError(f"rank {rank} was sent tokens for expert {wrong - 1} in epoch {epoch}; no slot of that layer holds it")
