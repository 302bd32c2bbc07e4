"""Expert slots in GPU memory: all allocated at the start, never moved. What an epoch changes is the table of which slot serves whom."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from elastic_ep.core.errors import CheckpointError
from elastic_ep.models.gpu.arithmetic import Part
from elastic_ep.models.gpu.backup import MappedBackup
from elastic_ep.models.gpu.digest import new_stream
from elastic_ep.runtime.engine import SlotLoad
from elastic_ep.runtime.weights.base import ExpertSource, Loaded, SlotLayout, read_verified
from elastic_ep.runtime.weights.host import HostBackup

NOT_HERE = -1
ELSEWHERE = -2
"""in a table of slots: the expert's rows are computed by another call"""


class DeviceSlots:
    """`num_layers` x `num_slots` slots of one layout on a device; the `Slots` of a rank whose model is there.

    Every read goes through pinned memory of the reading thread and a stream of its own, except from a host backup that is mapped for the
    device (`MappedBackup`): that is copied and verified by the device itself.

    Attributes:
        memory: per layer [num_slots, elements of a slot], in the layout's dtype. Fixed addresses.
        spare_memory: [num_spare, elements of a slot], for streamed experts.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_experts: int,
        layout: SlotLayout,
        source: ExpertSource,
        num_spare: int,
        device: torch.device,
    ):
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.readers = 1  # each reader would have pinned memory of its own
        self.shape = (num_layers, num_experts, layout.num_bytes)
        self.checkpoint = source
        self.device = device
        self._mapped: MappedBackup | None = None
        self._layout = layout
        elements = layout.num_bytes // layout.dtype.itemsize
        self.memory = [torch.zeros(num_slots, elements, dtype=layout.dtype, device=device) for _ in range(num_layers)]
        self.spare_memory = torch.zeros(num_spare, elements, dtype=layout.dtype, device=device)
        self._held: list[dict[int, int]] = [{} for _ in range(num_layers)]
        padded = -(-num_experts // 4) * 4  # each layer's row begins at 16 bytes
        self._slot_of = np.full((num_layers, padded), NOT_HERE, dtype=np.int32)
        self._table = torch.full((num_layers, padded), NOT_HERE, dtype=torch.int32, device=device)
        self._is_stale = False
        self._digests: dict[tuple[int, int], int] = {}
        self._staged: dict[tuple[int, int], tuple[int, torch.Tensor, int]] = {}
        self._spare: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._local = threading.local()
        self._adopted: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        """after the last copy of an adoption: who reads slots on another stream waits for it"""
        self._free_spare = list(range(num_spare - 1, -1, -1))

    @property
    def backup(self) -> ExpertSource | None:
        """See `Slots`. A host's backup is mapped for the device in the background, once it is full."""
        return None if self._mapped is None else self._mapped.backup

    @backup.setter
    def backup(self, source: ExpertSource | None) -> None:
        if self._mapped is not None:
            self._mapped.close()
        self._mapped = MappedBackup(source, self._layout.num_bytes, self.device) if isinstance(source, HostBackup) else None

    def matrices(self, is_transposed: bool) -> dict[str, Part]:
        """Where the parts of a slot lie, by name, in elements."""
        size = self._layout.dtype.itemsize
        shapes, offsets = dict(self._layout.parts), self._layout.offsets
        out = {}
        for name in ("gate_up_proj", "down_proj"):
            num_out, depth = reversed(shapes[name]) if is_transposed else shapes[name]
            bias = offsets.get(f"{name}_bias")
            out[name] = Part(offsets[name] // size, -1 if bias is None else bias // size, num_out, depth, is_transposed)
        return out

    # ---- tables

    def tables(self) -> torch.Tensor:
        """int32 [L, E padded]: the lowest slot that holds each expert, NOT_HERE without one. Always the same tensor; brought up to date on
        the current stream when something was loaded since."""
        if self._is_stale:
            self._is_stale = False
            self._table.copy_(torch.from_numpy(self._slot_of))
        return self._table

    def holds(self, layer: int, expert: int) -> bool:
        return bool(self._slot_of[layer, expert] >= 0)

    def _index(self, layer: int) -> None:
        row = self._slot_of[layer]
        row[:] = NOT_HERE
        for slot in sorted(self._held[layer], reverse=True):
            row[self._held[layer][slot]] = slot
        self._is_stale = True

    # ---- loading

    def load(self, load: SlotLoad, sources: Sequence[ExpertSource] = (), digest: int | None = None) -> Loaded:
        """Fill a slot; see `Slots.load`. Without sources, from the checkpoint. Raises CheckpointError."""
        load.check(len(self.memory), self.num_slots, self.num_experts)
        layer, slot, expert = load
        self._held[layer].pop(slot, None)
        self._index(layer)
        loaded = self._read(layer, expert, self.memory[layer][slot], sources, digest)
        self._held[layer][slot] = expert
        self._index(layer)
        return loaded

    def stage(self, load: SlotLoad, sources: Sequence[ExpertSource] = (), digest: int | None = None) -> Loaded:
        """Read and verify one expert beside the live slots, for `adopt`. Raises CheckpointError."""
        load.check(len(self.memory), self.num_slots, self.num_experts)
        with torch.cuda.stream(self._stream()):  # so that its memory is given to others when that stream is done with it
            memory = torch.empty(self.spare_memory.shape[1], dtype=self._layout.dtype, device=self.device)
        loaded = self._read(load.layer, load.expert, memory, sources, digest)
        self._staged[load.layer, load.local_slot] = (load.expert, memory, loaded.digest)
        return loaded

    def adopt(self, load: SlotLoad) -> int | None:
        """Copy what was staged for the slot into it, on the device. Returns its digest, None if this expert was not staged for it."""
        layer, slot, expert = load
        staged = self._staged.pop((layer, slot), None)  # one step: the stager may be dropping everything just now
        if staged is None or staged[0] != expert:
            return None
        _, memory, digest = staged
        self.memory[layer][slot].copy_(memory)
        memory.record_stream(torch.cuda.current_stream(self.device))
        self._adopted.record(torch.cuda.current_stream(self.device))
        self._held[layer][slot] = expert
        self._index(layer)
        return digest

    def drop_staged(self) -> None:
        """Free whatever is staged."""
        self._staged.clear()

    def expect(self, layer: int, expert: int, digest: int) -> None:
        """An expert that may be streamed must have the bytes of this digest."""
        self._digests.setdefault((layer, expert), digest)

    def stream(self, layer: int, expert: int) -> int:
        """Have an expert that has no slot in a spare buffer; the least recently used one gives way, once the device is done with it.
        Returns its index in `spare_memory`."""
        key = (layer, expert)
        if key in self._spare:
            self._spare.move_to_end(key)
            return self._spare[key]
        torch.cuda.current_stream(self.device).synchronize()
        if not self._free_spare:
            self._free_spare.append(self._spare.popitem(last=False)[1])
        index = self._free_spare[-1]
        sources = (self.checkpoint,) if self.backup is None else (self.backup, self.checkpoint)
        self._read(layer, expert, self.spare_memory[index], sources, None)
        self._free_spare.pop()
        self._spare[key] = index
        return index

    # ---- bytes, for others

    def slot_bytes(self, layer: int, slot: int) -> torch.Tensor:
        """uint8 [SlotLayout.num_bytes]: a copy of a slot's memory on the host, whatever it holds."""
        target = torch.empty(self._layout.num_bytes, dtype=torch.uint8)
        stream = self._stream()
        with torch.cuda.stream(stream):
            stream.wait_event(self._adopted)
            scratch = self._scratch().copy_(self.memory[layer][slot].view(torch.uint8), non_blocking=True)
            stream.synchronize()
        return target.copy_(scratch)

    def bytes_of(self, layer: int, expert: int) -> torch.Tensor | None:
        """The same of a slot that holds the expert; None if none does."""
        for slot, held in list(self._held[layer].items()):
            if held == expert:
                return self.slot_bytes(layer, slot)
        return None

    def addresses(self) -> None:
        """None: what others can read of a process is its memory on the host."""

    def close(self) -> None:
        self.backup = None
        self.checkpoint.close()

    # ---- inside

    def _read(self, layer: int, expert: int, memory: torch.Tensor, sources: Sequence[ExpertSource], digest: int | None) -> Loaded:
        known = self._digests.get((layer, expert)) if digest is None else digest
        target, errors = memory.view(torch.uint8), []
        left = list(sources) or [self.checkpoint]
        mapped = self._mapped
        while mapped is not None and left[0] is mapped.backup and mapped.has(layer, expert):
            try:
                return mapped.load(layer, expert, target, known)
            except CheckpointError as error:
                if len(left) == 1:
                    raise
                errors.append(f"host: {error}")
                left.pop(0)
        scratch = self._scratch()
        loaded = read_verified(left, layer, expert, scratch, known)
        stream = self._stream()
        with torch.cuda.stream(stream):
            target.copy_(scratch, non_blocking=True)
            stream.synchronize()
        self._digests[layer, expert] = loaded.digest
        return loaded._replace(errors=(*errors, *loaded.errors))

    def _scratch(self) -> torch.Tensor:
        """This thread's pinned memory for one slot."""
        if not hasattr(self._local, "scratch"):
            torch.cuda.set_device(self.device)  # each thread has its own
            self._local.scratch = torch.empty(self._layout.num_bytes, dtype=torch.uint8, pin_memory=True)
        scratch: torch.Tensor = self._local.scratch
        return scratch

    def _stream(self) -> torch.cuda.Stream:
        """This thread's."""
        if not hasattr(self._local, "stream"):
            torch.cuda.set_device(self.device)
            self._local.stream = new_stream(self.device)
        stream: torch.cuda.Stream = self._local.stream
        return stream
