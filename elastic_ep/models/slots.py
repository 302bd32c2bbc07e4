"""The experts that this rank holds: slots, what is in each, and a few spare buffers for experts that have no slot."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.models.linear import Weight
from elastic_ep.runtime.engine import SlotLoad
from elastic_ep.runtime.weights.base import ExpertSource, Loaded, SlotLayout, read_verified, zeroed

_ARENA_BYTES, _ARENA_BUFFERS = 16 << 20, 64
_MOST_READERS = 4
_PAGE_BYTES = 4096


class ExpertWeights(NamedTuple):
    """Views of one slot as the matrices that rows are multiplied with: hidden to gate and up, intermediate to hidden."""

    gate_up: Weight
    down: Weight


class Buffer(NamedTuple):
    """Memory for one expert (uint8 [SlotLayout.num_bytes]) and its views."""

    memory: torch.Tensor
    weights: ExpertWeights


class _Staged(NamedTuple):
    expert: int
    buffer: Buffer
    digest: int


class ExpertSlots:
    """`num_layers` x `num_slots` slots of one layout, and as many buffers beside them as were ever staged at a time, in whole arenas.

    What is staged for a slot that holds nothing is read into the slot's own buffer. For another it is read beside it, and the slot that
    adopts it gives its own buffer to the next staging. So memory neither grows nor has to be asked for again.

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
        self.readers = min(_MOST_READERS, len(os.sched_getaffinity(0)))
        self._is_transposed = is_transposed
        self._num_spare = num_spare
        self._slots = [self._buffers(num_slots) for _ in range(num_layers)]
        self._held: list[dict[int, int]] = [{} for _ in range(num_layers)]
        self._resident: list[dict[int, ExpertWeights]] = [{} for _ in range(num_layers)]
        self._digests: dict[tuple[int, int], int] = {}
        self._staged: dict[tuple[int, int], _Staged] = {}
        self._free: deque[Buffer] = deque()
        self._lent: set[tuple[int, int]] = set()
        """slots that hold nothing and whose buffer somebody fills, or has filled for `adopt`"""
        self._spare: OrderedDict[tuple[int, int], Buffer] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, layer: int, expert: int) -> ExpertWeights | None:
        """The expert's weights in the lowest slot that holds it."""
        return self._resident[layer].get(expert)

    def load(self, load: SlotLoad, sources: Sequence[ExpertSource] = (), digest: int | None = None) -> Loaded:
        """Fill a slot; see `Slots.load`. Without sources, from the checkpoint. Raises CheckpointError."""
        load.check(len(self._slots), self.num_slots, self.num_experts)
        layer, slot, expert = load
        self._hold(layer, slot, None)
        buffer = self._own_buffer(layer, slot)
        try:
            loaded = self._read(layer, expert, buffer.memory, sources, digest)
            self._hold(layer, slot, expert)
        finally:
            self._lent.discard((layer, slot))
        return loaded

    def stage(self, load: SlotLoad, sources: Sequence[ExpertSource] = (), digest: int | None = None) -> Loaded:
        """Read and verify one expert beside what the slots hold, for `adopt`. Raises CheckpointError."""
        load.check(len(self._slots), self.num_slots, self.num_experts)
        buffer = self._borrow(load.layer, load.local_slot)
        try:
            loaded = self._read(load.layer, load.expert, buffer.memory, sources, digest)
        except BaseException:
            self._give_back((load.layer, load.local_slot), buffer)
            raise
        self._unstage((load.layer, load.local_slot))
        self._staged[load.layer, load.local_slot] = _Staged(load.expert, buffer, loaded.digest)
        return loaded

    def adopt(self, load: SlotLoad) -> int | None:
        """Put what was staged for the slot into it, without copying. Returns its digest, None if this expert was not staged for it."""
        layer, slot, expert = load
        staged = self._staged.pop((layer, slot), None)  # one step: the stager may be dropping everything just now
        if staged is None:
            return None
        if staged.expert != expert:
            self._give_back((layer, slot), staged.buffer)
            return None
        self._hold(layer, slot, None)  # so that no peer is sent the new bytes as the old expert's
        with self._lock:
            before, self._slots[layer][slot] = self._slots[layer][slot], staged.buffer
            if before is not staged.buffer and (layer, slot) not in self._lent:
                self._free.append(before)
            self._lent.discard((layer, slot))
        self._hold(layer, slot, expert)
        return staged.digest

    def drop_staged(self) -> None:
        """Have whatever is staged give its memory to the next staging."""
        for key in list(self._staged):
            self._unstage(key)

    def expect(self, layer: int, expert: int, digest: int) -> None:
        """An expert that may be streamed must have the bytes of this digest."""
        self._digests.setdefault((layer, expert), digest)

    def stream(self, layer: int, expert: int) -> ExpertWeights:
        """The weights of an expert that has no slot, read into a spare buffer; the least recently used one gives way."""
        key = (layer, expert)
        if key in self._spare:
            self._spare.move_to_end(key)
            return self._spare[key].weights
        if len(self._spare) >= self._num_spare:
            buffer = self._spare.popitem(last=False)[1]
        else:
            (buffer,) = self._buffers(1)
        self._read(layer, expert, buffer.memory, () if self.backup is None else (self.backup, self.checkpoint), None)
        self._spare[key] = buffer
        return buffer.weights

    def slot_bytes(self, layer: int, slot: int) -> torch.Tensor:
        """uint8 [SlotLayout.num_bytes]: a slot's memory, whatever it holds."""
        return self._slots[layer][slot].memory

    def bytes_of(self, layer: int, expert: int) -> torch.Tensor | None:
        """uint8 [SlotLayout.num_bytes]: the memory of a slot that holds the expert, for whoever sends it to a peer or backs it up."""
        for slot, held in list(self._held[layer].items()):
            if held == expert:
                return self._slots[layer][slot].memory
        return None

    def addresses(self) -> NDArray[np.uint64]:
        """uint64 [L, E]: see `Slots.addresses`."""
        found = np.zeros(self.shape[:2], np.uint64)
        for layer, held in enumerate(self._held):
            for slot, expert in list(held.items()):
                found[layer, expert] = self._slots[layer][slot].memory.data_ptr()
        return found

    def touch(self) -> None:
        """Have the system give the memory of all slots now: later it would do so page by page, while somebody waits for an expert."""
        for layer in self._slots:
            for buffer in layer:
                buffer.memory[::_PAGE_BYTES].zero_()

    def close(self) -> None:
        self.checkpoint.close()

    def _read(self, layer: int, expert: int, memory: torch.Tensor, sources: Sequence[ExpertSource], digest: int | None) -> Loaded:
        known = self._digests.get((layer, expert)) if digest is None else digest
        loaded = read_verified(sources or (self.checkpoint,), layer, expert, memory, known)
        self._digests[layer, expert] = loaded.digest
        return loaded

    def _hold(self, layer: int, slot: int, expert: int | None) -> None:
        """Note what a slot holds now, and which slot serves the experts that this concerns."""
        held, resident = self._held[layer], self._resident[layer]
        with self._lock:
            before = held.pop(slot, None)
            if expert is not None:
                held[slot] = expert
            for changed in {before, expert}:
                if changed is None:
                    continue
                lowest = min((at for at, holds in held.items() if holds == changed), default=None)
                if lowest is None:
                    resident.pop(changed, None)
                else:
                    resident[changed] = self._slots[layer][lowest].weights

    def _own_buffer(self, layer: int, slot: int) -> Buffer:
        """The slot's buffer to fill, another one if somebody still fills that for `adopt`."""
        with self._lock:
            if (layer, slot) in self._lent:
                self._slots[layer][slot] = self._take()  # who has the other gives it to the next staging
            self._lent.add((layer, slot))
            return self._slots[layer][slot]

    def _borrow(self, layer: int, slot: int) -> Buffer:
        """Memory to stage in: the slot's own, if nobody needs what is there."""
        with self._lock:
            if slot not in self._held[layer] and (layer, slot) not in self._lent:
                self._lent.add((layer, slot))
                return self._slots[layer][slot]
            return self._take()

    def _give_back(self, key: tuple[int, int], buffer: Buffer) -> None:
        with self._lock:
            if buffer is self._slots[key[0]][key[1]]:
                self._lent.discard(key)
            else:
                self._free.append(buffer)

    def _take(self) -> Buffer:
        """Memory to stage in. In whole arenas: the system gives small pieces of memory slowly."""
        try:
            return self._free.popleft()
        except IndexError:
            first, *others = self._buffers(min(max(1, _ARENA_BYTES // self._layout.num_bytes), _ARENA_BUFFERS))
            self._free.extend(others)
            return first

    def _unstage(self, key: tuple[int, int]) -> None:
        staged = self._staged.pop(key, None)
        if staged is not None:
            self._give_back(key, staged.buffer)

    def _buffers(self, count: int) -> list[Buffer]:
        memories = zeroed(count * self._layout.num_bytes).view(count, self._layout.num_bytes)
        return [Buffer(memory, self._as_weights(memory)) for memory in memories]

    def _as_weights(self, memory: torch.Tensor) -> ExpertWeights:
        parts = self._layout.views(memory)
        return ExpertWeights(
            Weight(parts["gate_up_proj"], parts.get("gate_up_proj_bias"), self._is_transposed),
            Weight(parts["down_proj"], parts.get("down_proj_bias"), self._is_transposed),
        )
