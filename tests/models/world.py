"""One engine on its own: all experts here or streamed, sequences driven step by step, logits kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elastic_ep.brain.messages import SamplingParams, SequenceWork
from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.routing import RoutingTable
from elastic_ep.core.topology import Topology
from elastic_ep.models.engine import ElasticEngine
from elastic_ep.models.spec import inspect_checkpoint
from elastic_ep.runtime.dispatch.local import LocalDispatcher
from elastic_ep.runtime.engine import SlotLoad, StepOutput

GREEDY = SamplingParams(temperature=0)


class RecordingEngine(ElasticEngine):
    """Keeps the logits of the last step, by sequence."""

    logits: dict[int, torch.Tensor]

    def _sample(self, work: Sequence[SequenceWork], logits: torch.Tensor) -> Any:
        sampled = [item.seq_id for item in work if item.sample is not None]
        self.logits = {seq_id: logits[i].clone() for i, seq_id in enumerate(sampled)}
        return super()._sample(work, logits)


class World:
    """An engine whose slots hold `slots` (experts per layer; default all, in order); what no slot holds is streamed."""

    engine: Any

    def make_engine(self, *args: Any, **options: Any) -> Any:
        return RecordingEngine(*args, **options)

    def make_dispatcher(self) -> Any:
        return LocalDispatcher()

    def __init__(self, folder: Path, slots: Sequence[Sequence[int]] | None = None, **options: Any):
        spec = inspect_checkpoint(folder)
        held = np.tile(np.arange(spec.num_experts), (spec.num_layers, 1)) if slots is None else np.array(slots)
        self.engine = self.make_engine(folder, 0, held.shape[1], **({"kv_tokens": 16384} | options))
        self.engine.make_slots()
        self.engine.load_dense()
        self.digests = {}
        for layer, row in enumerate(held):
            for slot, expert in enumerate(row):
                if expert != EMPTY:
                    self.digests[layer, slot] = self.engine.slots.load(SlotLoad(layer, slot, int(expert))).digest
        placement = ExpertPlacement(held, spec.num_experts)
        streamed = dict.fromkeys(placement.missing_experts(), 0)
        self.routing = RoutingTable.build(1, placement, Topology((held.shape[1],)), streamed=streamed)
        self.dispatcher = self.make_dispatcher()
        self.steps = 0

    def step(self, work: Sequence[SequenceWork], release: Sequence[int] = ()) -> dict[int, int]:
        """Run one step; returns the sampled token of each sequence."""
        out = self.engine.run_step(work, release, self.routing, self.dispatcher, self.steps)
        assert isinstance(out, StepOutput), out
        self.steps += 1
        return {token.seq_id: token.token for token in out.tokens}

    def logits_at(self, seq_id: int, tokens: Sequence[int], cuts: Sequence[int]) -> dict[int, torch.Tensor]:
        """Prefill `tokens` in the chunks that `cuts` end, alone. Returns the logits after each chunk, by position of its last token."""
        out, start = {}, 0
        for end in cuts:
            self.step([SequenceWork(seq_id, start, tuple(tokens[start:end]), GREEDY)])
            out[end - 1] = self.engine.logits[seq_id]
            start = end
        self.step([], [seq_id])
        return out

    def generate(self, seq_id: int, prompt: Sequence[int], count: int, sampling: SamplingParams = GREEDY) -> list[int]:
        """Prefill at once, then decode one by one, alone."""
        out: list[int] = []
        work = SequenceWork(seq_id, 0, tuple(prompt), sampling)
        for i in range(count):
            out.append(self.step([work])[seq_id])
            work = SequenceWork(seq_id, len(prompt) + i, (out[-1],), sampling)
        self.step([], [seq_id])
        return out
