"""The experts that this rank holds: slots, what is in each, and a few spare buffers for experts that have no slot."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.models.linear import Weight
from elastic_ep.runtime.engine import SlotLoad
from elastic_ep.runtime.weights.base import ExpertSource, Loaded, SlotLayout, read_verified, zeroed


class ExpertWeights(NamedTuple):
    """Views of one slot as the matrices that rows are multiplied with: hidden to gate and up, intermediate to hidden."""

    gate_up: Weight
    down: Weight


class ExpertSlots:
    """`num_layers` x `num_slots` slots of one layout.

    Args:
        is_transposed: the layout stores [in, out] matrices (GPT-OSS) instead of [out, in].
        num_spare: buffers for streamed experts, over all layers.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_experts: int,
        layout: SlotLayout,
        source: ExpertSource,
        is_transposed: bool,
        num_spare: int,
    ):
        self.num_experts = num_experts
        self.num_slots = num_slots
        self._layout = layout
        self.shape = (num_layers, num_experts, layout.num_bytes)
        self.checkpoint = source
        self.backup: ExpertSource | None = None
        self._is_transposed = is_transposed
        self._num_spare = num_spare
        self._memory: list[list[torch.Tensor]] = [
            list(zeroed(num_slots * layout.num_bytes).view(num_slots, layout.num_bytes)) for _ in range(num_layers)
        ]
        self._weights = [[self._as_weights(memory[slot]) for slot in range(num_slots)] for memory in self._memory]
        self._held: list[dict[int, int]] = [{} for _ in range(num_layers)]
        self._resident: list[dict[int, ExpertWeights]] = [{} for _ in range(num_layers)]
        self._digests: dict[tuple[int, int], int] = {}
        self._staged: dict[tuple[int, int], tuple[int, torch.Tensor, int]] = {}
        self._spare: OrderedDict[tuple[int, int], tuple[torch.Tensor, ExpertWeights]] = OrderedDict()

    def find(self, layer: int, expert: int) -> ExpertWeights | None:
        """The expert's weights in the lowest slot that holds it."""
        return self._resident[layer].get(expert)

    def load(self, load: SlotLoad, sources: Sequence[ExpertSource] = (), digest: int | None = None) -> Loaded:
        """Fill a slot; see `Slots.load`. Without sources, from the checkpoint. Raises CheckpointError."""
        self._check(load)
        layer, slot, expert = load
        self._held[layer].pop(slot, None)
        self._index(layer)
        loaded = self._read(layer, expert, self._memory[layer][slot], sources, digest)
        self._held[layer][slot] = expert
        self._index(layer)
        return loaded

    def stage(self, load: SlotLoad, sources: Sequence[ExpertSource] = (), digest: int | None = None) -> Loaded:
        """Read and verify one expert beside the live slots, for `adopt`. Raises CheckpointError."""
        self._check(load)
        memory = zeroed(self._layout.num_bytes)
        loaded = self._read(load.layer, load.expert, memory, sources, digest)
        self._staged[load.layer, load.local_slot] = (load.expert, memory, loaded.digest)
        return loaded

    def adopt(self, load: SlotLoad) -> int | None:
        """Put what was staged for the slot into it, without copying. Returns its digest, None if this expert was not staged for it."""
        layer, slot, expert = load
        staged = self._staged.pop((layer, slot), None)  # one step: the stager may be dropping everything just now
        if staged is None or staged[0] != expert:
            return None
        _, memory, digest = staged
        self._memory[layer][slot] = memory
        self._weights[layer][slot] = self._as_weights(memory)
        self._held[layer][slot] = expert
        self._index(layer)
        return digest

    def drop_staged(self) -> None:
        """Free whatever is staged."""
        self._staged.clear()

    def expect(self, layer: int, expert: int, digest: int) -> None:
        """An expert that may be streamed must have the bytes of this digest."""
        self._digests.setdefault((layer, expert), digest)

    def stream(self, layer: int, expert: int) -> ExpertWeights:
        """The weights of an expert that has no slot, read into a spare buffer; the least recently used one gives way."""
        key = (layer, expert)
        if key in self._spare:
            self._spare.move_to_end(key)
            return self._spare[key][1]
        if len(self._spare) >= self._num_spare:
            memory, weights = self._spare.popitem(last=False)[1]
        else:
            memory = zeroed(self._layout.num_bytes)
            weights = self._as_weights(memory)
        self._read(layer, expert, memory, () if self.backup is None else (self.backup, self.checkpoint), None)
        self._spare[key] = (memory, weights)
        return weights

    def slot_bytes(self, layer: int, slot: int) -> torch.Tensor:
        """uint8 [SlotLayout.num_bytes]: a slot's memory, whatever it holds."""
        return self._memory[layer][slot]

    def bytes_of(self, layer: int, expert: int) -> torch.Tensor | None:
        """uint8 [SlotLayout.num_bytes]: the memory of a slot that holds the expert, for whoever sends it to a peer or backs it up."""
        for slot, held in list(self._held[layer].items()):
            if held == expert:
                return self._memory[layer][slot]
        return None

    def close(self) -> None:
        self.checkpoint.close()

    def _check(self, load: SlotLoad) -> None:
        layer, slot, expert = load
        if not (0 <= layer < len(self._memory) and 0 <= slot < self.num_slots and 0 <= expert < self.num_experts):
            raise InvalidInputError(
                f"{load} is outside {len(self._memory)} MoE layers, {self.num_slots} local slots, {self.num_experts} experts"
            )

    def _read(self, layer: int, expert: int, memory: torch.Tensor, sources: Sequence[ExpertSource], digest: int | None) -> Loaded:
        known = self._digests.get((layer, expert)) if digest is None else digest
        loaded = read_verified(sources or (self.checkpoint,), layer, expert, memory, known)
        self._digests[layer, expert] = loaded.digest
        return loaded

    def _index(self, layer: int) -> None:
        held = self._held[layer]
        self._resident[layer] = {held[slot]: self._weights[layer][slot] for slot in sorted(held, reverse=True)}

    def _as_weights(self, memory: torch.Tensor) -> ExpertWeights:
        parts = self._layout.views(memory)
        return ExpertWeights(
            Weight(parts["gate_up_proj"], parts.get("gate_up_proj_bias"), self._is_transposed),
            Weight(parts["down_proj"], parts.get("down_proj_bias"), self._is_transposed),
        )
