"""`ElasticEngine`: a Hugging Face MoE model as one rank runs it (the `Engine` protocol of runtime/engine.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers.activations import SiLUActivation

from elastic_ep.brain.messages import SampledToken, SequenceWork
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.models.attention import Attention, AttentionState
from elastic_ep.models.build import build_model, experts_module, load_dense, use_router_weights, use_row_kernels
from elastic_ep.models.experts import LayerExperts, StepState, StepVoid
from elastic_ep.models.kv import PagedKV
from elastic_ep.models.linear import FastLinear, RowLinear, multiply_groups, multiply_groups_fast, swiglu
from elastic_ep.models.rows import padded_rows, row_multiple
from elastic_ep.models.sampling import sample
from elastic_ep.models.slots import ExpertSlots
from elastic_ep.models.spec import ModelSpec, inspect_checkpoint
from elastic_ep.runtime.dispatch.base import Dispatcher, Interrupted, PeerFailed
from elastic_ep.runtime.engine import StepOutput
from elastic_ep.runtime.weights.base import Piece, SlotLayout
from elastic_ep.runtime.weights.checkpoint import CheckpointSource, TensorReader

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float32}


class ElasticEngine:
    """One rank's model. Nothing is read before `make_slots`.

    Args:
        checkpoint_dir: a folder that `save_pretrained` wrote.
        rank: this rank's id, as routing tables name it.
        local_slots: slots per MoE layer.
        kv_tokens: tokens of KV cache, rounded up to whole pages.
        dtype: "float32" or "bfloat16"; None takes the checkpoint's.
        fast_math: compute exactly the rows of a step, as fast as the libraries can: tokens may then depend on the batch.
        num_spare: buffers for experts that are streamed because no slot holds them.
        num_threads: of the process; a row's bits are promised for 1.
        count_experts: record how many pairs each expert got.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        rank: int,
        local_slots: int,
        kv_tokens: int,
        dtype: str | None = None,
        fast_math: bool = False,
        num_spare: int = 4,
        num_threads: int = 1,
        count_experts: bool = True,
    ):
        if dtype is not None and dtype not in ("float32", "bfloat16"):
            raise InvalidInputError(f"dtype is {dtype!r}; give float32 or bfloat16")
        if kv_tokens < 1 or local_slots < 0 or num_spare < 1 or num_threads < 1:
            raise InvalidInputError(
                f"kv_tokens {kv_tokens}, local_slots {local_slots}, num_spare {num_spare}, num_threads {num_threads}: "
                f"only local_slots may be 0, none negative"
            )
        if num_threads > 1 and not fast_math:
            raise InvalidInputError(f"num_threads is {num_threads}: more than 1 needs fast math, since threads cut rows differently")
        self.directory = Path(checkpoint_dir)
        self.rank = rank
        self.fast_math = fast_math
        self._local_slots = local_slots
        self._kv_tokens = kv_tokens
        self._dtype_name = dtype
        self._num_spare = num_spare
        self._num_threads = num_threads
        self._count_experts = count_experts
        self._layers: list[LayerExperts] = []

    def make_slots(self) -> None:
        """See `Engine`. Raises CheckpointError, InvalidInputError."""
        torch.set_num_threads(self._num_threads)
        self.spec: ModelSpec = inspect_checkpoint(self.directory)
        spec = self.spec
        self.dtype = _DTYPES[self._dtype_name or spec.dtype]
        self._reader = TensorReader(spec.tensors)
        self._model = build_model(spec, self.dtype)
        layout = SlotLayout(spec.family.parts(spec.expert_shape), self.dtype)
        is_transposed = bool(experts_module(self._model, spec.moe_layers[0]).is_transposed)
        self.slots = self._new_slots(layout, CheckpointSource(self._reader, layout, self._pieces), is_transposed)

    def load_dense(self) -> int:
        """See `Engine`. Raises CheckpointError, InvalidInputError."""
        digest = load_dense(self._model, self.spec, self._reader, self.dtype)
        attention = self._place()
        for i, layer in enumerate(self.spec.moe_layers):
            module = experts_module(self._model, layer)
            experts = self._layer_experts(i, module)
            module.elastic_experts = experts  # type: ignore[assignment]
            self._layers.append(experts)
        for decoder_layer in self._model.model.layers:
            decoder_layer.self_attn.elastic_attention = attention
        self._load_kernels()
        return digest

    def prepare(self, dispatcher: Dispatcher) -> None:
        """See `Engine`. On a processor that is the memory of the slots."""
        self.slots.touch()

    def _new_slots(self, layout: SlotLayout, checkpoint: CheckpointSource, is_transposed: bool) -> ExpertSlots:
        spec = self.spec
        return ExpertSlots(spec.num_layers, self._local_slots, spec.num_experts, layout, checkpoint, is_transposed, self._num_spare)

    def _place(self) -> Attention:
        """Make the KV cache, and have the model's modules compute row by row. Returns the attention."""
        spec, family = self.spec, self.spec.family
        self.kv = PagedKV(spec.config["num_hidden_layers"], family.kv_shape(spec.config), self._kv_tokens)
        use_row_kernels(self._model, FastLinear if self.fast_math else RowLinear)
        if not self.fast_math:
            use_router_weights(self._model)
        self._row_multiple = row_multiple(family.elementwise_lengths(spec.config))
        self._attention = AttentionState(self.kv)
        return self._attention

    def _load_kernels(self) -> None:
        """Nothing to do: those for the processor came with the package."""

    def run_step(
        self, work: Sequence[SequenceWork], release: Sequence[int], routing: RoutingTable, dispatcher: Dispatcher, step: int
    ) -> StepOutput | PeerFailed | Interrupted:
        """One forward over `work` (possibly empty); see `Engine`. Raises InvalidInputError for impossible work: tokens or KV."""
        num_tokens = self._make_room(work, release)
        state = StepState(routing, dispatcher, step, num_tokens, [] if self._count_experts else None)
        for layer in self._layers:
            layer.state = state
        try:
            with torch.inference_mode():
                logits = self._forward(work, state) if work else self._serve_only(state)
        except StepVoid as void:
            return void.outcome
        counts = None if state.counts is None else np.stack(state.counts)
        return StepOutput(self._sample(work, logits), counts)

    def _make_room(self, work: Sequence[SequenceWork], release: Sequence[int]) -> int:
        """KV for the step's tokens; returns how many they are."""
        for seq_id in release:
            self.kv.release(seq_id)
        for item in work:
            self._check_tokens(item)
            self.kv.extend(item.seq_id, item.start, len(item.tokens))
        return sum(len(item.tokens) for item in work)

    def _check_tokens(self, item: SequenceWork) -> None:
        if not item.tokens:
            raise InvalidInputError(f"sequence {item.seq_id} has no tokens in its work; leave it out of the step")
        worst = min(item.tokens) if min(item.tokens) < 0 else max(item.tokens)
        if not 0 <= worst < self.spec.vocab_size:
            raise InvalidInputError(f"sequence {item.seq_id} has token {worst}; the vocabulary has ids 0 to {self.spec.vocab_size - 1}")

    def close(self) -> None:
        """Free everything. A second call does nothing."""
        if hasattr(self, "slots"):
            self.slots.close()
        self._layers = []
        for name in ("_model", "_reader", "slots", "kv", "_attention"):
            self.__dict__.pop(name, None)

    def _layer_experts(self, layer: int, module: torch.nn.Module) -> LayerExperts:
        plain_silu = module.is_concatenated and isinstance(getattr(module, "act_fn", None), SiLUActivation)
        gate = swiglu if plain_silu else module._apply_gate
        multiple = 1 if plain_silu or self.fast_math else row_multiple([self.spec.intermediate_size])
        multiply = multiply_groups_fast if self.fast_math else multiply_groups
        return LayerExperts(layer, self.rank, self.slots, gate, multiple, multiply)  # type: ignore[arg-type]

    def _pieces(self, layer: int, expert: int) -> list[Piece]:
        spec = self.spec
        return [
            Piece(
                tensor.name.format(layer=spec.moe_layers[layer], expert=expert),
                None if "{expert}" in tensor.name else expert,
                tensor.shape,
                tensor.part,
                tensor.first,
            )
            for tensor in spec.family.expert_tensors(spec.expert_shape)
        ]

    def _forward(self, work: Sequence[SequenceWork], state: StepState) -> torch.Tensor:
        """Logits float32 [sampled sequences, vocab]."""
        self._attention.runs = self.kv.runs([(item.seq_id, item.start, len(item.tokens)) for item in work])
        self._attention.num_tokens = state.num_tokens
        rows = state.num_tokens if self.fast_math else padded_rows(state.num_tokens, self._row_multiple)
        ids = np.zeros((2, rows), dtype=np.int64)
        sampled, end = [], 0
        for item in work:
            begin, end = end, end + len(item.tokens)
            ids[0, begin:end] = item.tokens
            ids[1, begin:end] = range(item.start, item.start + len(item.tokens))
            if item.sample is not None:
                sampled.append(end - 1)
        both = torch.from_numpy(ids)
        hidden = self._model.model(input_ids=both[:1], position_ids=both[1:], use_cache=False).last_hidden_state[0]
        if not sampled:
            return torch.empty(0, 0)
        logits: torch.Tensor = self._model.lm_head(hidden[sampled])
        return logits.float()

    def _serve_only(self, state: StepState) -> torch.Tensor:
        """This rank has no tokens: it still serves its experts, layer by layer."""
        spec = self.spec
        x = torch.empty(0, spec.hidden_size, dtype=self.dtype)
        ids = torch.empty(0, spec.num_experts_per_tok, dtype=torch.int64)
        weights = torch.empty(0, spec.num_experts_per_tok, dtype=torch.float32)
        for layer in self._layers:
            layer.forward(x, ids, weights)
        return torch.empty(0, 0)

    def _sample(self, work: Sequence[SequenceWork], logits: torch.Tensor) -> list[SampledToken]:
        out = []
        rows = iter(logits.numpy())
        for item in work:
            if item.sample is not None:
                token, logprob, top = sample(next(rows), item.sample, item.start + len(item.tokens))
                out.append(SampledToken(item.seq_id, token, logprob, top))
        return out
