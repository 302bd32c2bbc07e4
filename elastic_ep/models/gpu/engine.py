"""`DeviceEngine`: the model of a rank on a GPU. What differs from `ElasticEngine` is where things lie and which kernels compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.activations import SiLUActivation

from elastic_ep.brain.messages import SampledToken, SamplingParams, SequenceWork
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.placement import EMPTY, ExpertPlacement
from elastic_ep.core.routing import RoutingTable
from elastic_ep.core.topology import Topology
from elastic_ep.models.attention import Attention
from elastic_ep.models.engine import ElasticEngine
from elastic_ep.models.experts import StepVoid
from elastic_ep.models.gpu.arithmetic import DeviceNorm, use_device_kernels
from elastic_ep.models.gpu.experts import DeviceExperts, DeviceStep, check_right
from elastic_ep.models.gpu.graphs import SIZES, Marks, StepGraphs, graph_size
from elastic_ep.models.gpu.kv import DeviceKV, StepTables
from elastic_ep.models.gpu.slots import DeviceSlots
from elastic_ep.models.kernels import kernels
from elastic_ep.models.sampling import sample
from elastic_ep.runtime.dispatch.base import Dispatcher, DispatchHandle, Interrupted, PeerFailed, StepPoint
from elastic_ep.runtime.dispatch.cuda.dispatcher import CudaDispatcher
from elastic_ep.runtime.dispatch.staged import StagedBatch
from elastic_ep.runtime.engine import StepOutput
from elastic_ep.runtime.weights.base import SlotLayout
from elastic_ep.runtime.weights.checkpoint import CheckpointSource


def _kind_of(enqueue: CudaDispatcher | None) -> str:
    """Which graphs to replay: in pieces, or whole and with the kernels that the backend launches now."""
    return "pieces" if enqueue is None else f"whole, split {enqueue.is_split}"


class DeviceEngine(ElasticEngine):
    """One rank's model on a GPU.

    Args:
        device: index of the GPU; ranks may share one.
        graph_tokens: graphs of steps of up to so many tokens are captured by `prepare`; larger ones when they are first needed.
        max_sequences: of one step that is a graph.
        staging_bytes: of device memory to stage experts in while the slots that they are for hold others.
        options: of `ElasticEngine`; fast_math leaves dense products and norms to the library.
    """

    def __init__(
        self, *args: Any, device: int = 0, graph_tokens: int = 0, max_sequences: int = 64, staging_bytes: int = 0, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._staging_bytes = staging_bytes
        self.device = torch.device("cuda", device)
        self._max_sequences = max_sequences
        self._graph_tokens = graph_tokens
        self._graphs: StepGraphs | None = None
        self._captured_state: DeviceStep | None = None
        self._enqueue: CudaDispatcher | None = None

    def make_slots(self) -> None:
        """See `Engine`."""
        if not torch.cuda.is_available():
            raise InvalidInputError("--device cuda needs a GPU and torch sees none; serve with --device cpu, or mend the driver")
        torch.cuda.set_device(self.device)
        super().make_slots()

    def _new_slots(self, layout: SlotLayout, checkpoint: CheckpointSource, is_transposed: bool) -> Any:
        spec = self.spec
        num_staged = min(max(1, self._staging_bytes // layout.num_bytes), spec.num_layers * self._local_slots)
        sizes = (spec.num_layers, self._local_slots, spec.num_experts)
        slots = DeviceSlots(*sizes, layout, checkpoint, self._num_spare, self.device, num_staged)
        self._matrices = slots.matrices(is_transposed)
        return slots

    def _place(self) -> Attention:
        """See `ElasticEngine`."""
        spec = self.spec
        self._model.to(self.device)  # type: ignore[arg-type]
        if not self.fast_math:
            use_device_kernels(self._model)
        shape, page = spec.family.kv_shape(spec.config), int(kernels().TILE)
        self.kv = DeviceKV(spec.config["num_hidden_layers"], shape, self._kv_tokens, page, self.dtype, self.device)  # type: ignore[assignment]
        self._wrong = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._counts = torch.zeros(spec.num_layers, spec.num_experts, dtype=torch.int64, device=self.device)
        return self._device_kv

    @property
    def _device_slots(self) -> DeviceSlots:
        slots: Any = self.slots
        return slots  # type: ignore[no-any-return]

    @property
    def _device_kv(self) -> DeviceKV:
        kv: Any = self.kv
        return kv  # type: ignore[no-any-return]

    def _layer_experts(self, layer: int, module: torch.nn.Module) -> Any:
        norm: Any = self._model.model.layers[self.spec.moe_layers[layer]].post_attention_layernorm
        if isinstance(norm, DeviceNorm):
            norm.place = self._token_rows
        plain_silu = module.is_concatenated and isinstance(getattr(module, "act_fn", None), SiLUActivation)
        gate: Any = None if plain_silu else module._apply_gate
        return DeviceExperts(layer, self.rank, self._device_slots, self._matrices, gate)

    def _load_kernels(self) -> None:
        """Compile and load every kernel, by a step of two tokens that go nowhere."""
        work = [SequenceWork(-1, 0, (0, 0), SamplingParams(temperature=0))]
        self._make_room(work, ())
        state = self._new_state(self._no_routing(), _Nowhere(), 0)
        with torch.inference_mode():
            self._finish(work, self._run_eagerly(work, state), state.counts, 0)
        self.kv.release(-1)

    def _no_routing(self) -> RoutingTable:
        placement = ExpertPlacement(np.full((self.spec.num_layers, 1), EMPTY), self.spec.num_experts)
        return RoutingTable.build(0, placement, Topology((1,)), streamed=dict.fromkeys(placement.missing_experts(), -1))

    def prepare(self, dispatcher: Dispatcher) -> None:
        """See `Engine`: have the backend make its buffers, and capture the graphs."""
        state = self._captured_state = self._new_state(self._no_routing(), dispatcher, 0)
        if state.enqueue is not None:
            state.enqueue.start()
        with torch.inference_mode():
            for size in SIZES:
                if size <= graph_size(self._graph_tokens) and (size or state.enqueue is not None):
                    self._step_graphs.captured(size, _kind_of(state.enqueue), state.enqueue is None)

    def run_step(
        self, work: Sequence[SequenceWork], release: Sequence[int], routing: RoutingTable, dispatcher: Dispatcher, step: int
    ) -> StepOutput | PeerFailed | Interrupted:
        """See `ElasticEngine.run_step`. Over the cuda dispatch backend a graph waits for the device at its end only."""
        self._make_room(work, release)
        state = self._new_state(routing, dispatcher, step)
        enqueue = state.enqueue
        if enqueue is not None:
            enqueue.begin_step(routing, routing.epoch, step)
        try:
            with torch.inference_mode():
                logits = self._run(work, state)
        except StepVoid as void:
            return void.outcome
        if enqueue is not None and (outcome := enqueue.wait()) is not None:
            return outcome
        return self._finish(work, logits, state.counts, routing.epoch)

    def _new_state(self, routing: RoutingTable, dispatcher: Dispatcher, step: int) -> DeviceStep:
        enqueue = dispatcher if isinstance(dispatcher, CudaDispatcher) else None
        counts = self._counts.zero_() if self._count_experts else None
        self._wrong.zero_()  # a void step may have left its mark
        return DeviceStep(routing, dispatcher, enqueue, step, self._device_slots.tables(), counts, self._wrong)

    def _run(self, work: Sequence[SequenceWork], state: DeviceStep) -> torch.Tensor:
        """Logits float32 [sampled sequences, vocab], on the device. A graph is replayed if there is one so large, and no exchange inside it
        has to wait for an expert that is streamed."""
        enqueue = state.enqueue
        size = self._step_graphs.size_for(work, SIZES[-1] if enqueue is None else enqueue.capacity.max_tokens)
        is_one_graph = enqueue is not None and self.rank not in state.routing.streamed.values()
        if size is not None and (is_one_graph or (enqueue is None and size > 0)):
            self._captured_state = state
            graph = self._step_graphs.prepare(work, size, _kind_of(enqueue), enqueue is None)
            return graph.replay(state, sum(len(item.tokens) for item in work), sum(item.sample is not None for item in work))
        return self._run_eagerly(work, state)

    def _run_eagerly(self, work: Sequence[SequenceWork], state: DeviceStep) -> torch.Tensor:
        """The same, kernel by kernel."""
        self._set_state(state)
        if not work:
            return self._device_serve_only()
        ends = np.cumsum([len(item.tokens) for item in work])
        rows = torch.tensor([int(end) - 1 for item, end in zip(work, ends, strict=True) if item.sample is not None])
        sampled = rows.pin_memory().to(self.device, non_blocking=True) if len(rows) else None
        return self._device_forward(self._device_kv.tables(work), sampled)

    @property
    def _step_graphs(self) -> StepGraphs:
        if self._graphs is None:
            width = min(self._device_kv.num_pages, -(-self.spec.max_positions // self._device_kv.page_tokens))
            self._graphs = StepGraphs(self._device_kv, width, self._max_sequences, self.device, self._capture_forward)
        return self._graphs

    def _capture_forward(self, tables: StepTables, marks: Marks, cut: Any) -> torch.Tensor:
        """What a graph captures. Of the state only tensors at fixed addresses stay in it."""
        assert self._captured_state is not None
        self._set_state(replace(self._captured_state, is_real=marks.is_real, cut=cut))
        if not len(marks.is_real):
            return self._device_serve_only()
        return self._device_forward(tables, marks.sampled)

    def _token_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Where the rows that an MoE layer dispatches belong: in the memory that peers read, if the backend has such; saves their copy."""
        if self._enqueue is None:
            return torch.empty_like(x)
        return self._enqueue.token_buffer(x.numel() // x.shape[-1], x.shape[-1], x.dtype).view_as(x)

    def _set_state(self, state: DeviceStep) -> None:
        self._enqueue = state.enqueue
        for layer in self._layers:
            layer.state = state  # type: ignore[assignment]

    def _device_forward(self, tables: StepTables, sampled: torch.Tensor | None) -> torch.Tensor:
        """Logits of the tokens in these rows (int64, on the device)."""
        self._device_kv.step = tables
        out = self._model.model(input_ids=tables.ids[None], position_ids=tables.positions[None], use_cache=False)
        hidden: torch.Tensor = out.last_hidden_state[0]
        if sampled is None:
            return hidden.new_empty(0, 0)
        logits: torch.Tensor = self._model.lm_head(hidden.index_select(0, sampled)).float()
        return logits

    def _device_serve_only(self) -> torch.Tensor:
        """This rank has no tokens: it still serves its experts, layer by layer."""
        spec = self.spec
        x = torch.empty(0, spec.hidden_size, dtype=self.dtype, device=self.device)
        ids = torch.empty(0, spec.num_experts_per_tok, dtype=torch.int64, device=self.device)
        weights = torch.empty(0, spec.num_experts_per_tok, dtype=torch.float32, device=self.device)
        for layer in self._layers:
            layer.forward(x, ids, weights)
        return x

    def _finish(self, work: Sequence[SequenceWork], logits: torch.Tensor, counts: torch.Tensor | None, epoch: int) -> StepOutput:
        """Tokens and counts on the host; the largest logits are found on the device. Waits for it."""
        asked = [item for item in work if item.sample is not None]
        best = logits.argmax(dim=1) if asked else logits.new_empty(0, dtype=torch.int64)
        parts = [best, self._wrong.long(), *(() if counts is None else (counts.view(-1),))]
        host = torch.cat(parts).cpu().numpy()
        check_right(self.rank, int(host[len(asked)]), epoch)
        tokens = [self._token(item, int(host[i]), logits[i]) for i, item in enumerate(asked)]
        if counts is None:
            return StepOutput(tokens, None)
        return StepOutput(tokens, host[len(asked) + 1 :].reshape(counts.shape))

    def _token(self, item: SequenceWork, best: int, logits: torch.Tensor) -> SampledToken:
        params = item.sample
        assert params is not None
        if params.temperature == 0 and params.top_logprobs is None:
            return SampledToken(item.seq_id, best, None, ())
        token, logprob, top = sample(logits.cpu().numpy(), params, item.start + len(item.tokens))
        return SampledToken(item.seq_id, token, logprob, top)


class _Nowhere:
    """A dispatcher without ranks: nothing arrives, and zeros come back."""

    def connect(self, peers: Mapping[int, str], deadline_s: float, *, epoch: int = 0) -> None:
        """Nobody to connect."""

    def dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint
    ) -> DispatchHandle:
        offsets = torch.zeros(routing.replica_rank.shape[1] + 1, dtype=torch.int32, device=x.device)
        return DispatchHandle(x, (), StagedBatch(x, torch.empty_like(x), offsets, DispatchHandle(x, (), None)))

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> torch.Tensor:
        return torch.zeros_like(handle.rows)

    def close(self) -> None:
        """Nothing to do."""
