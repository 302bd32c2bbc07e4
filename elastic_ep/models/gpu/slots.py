"""Expert slots in GPU memory: all allocated at the start, never moved. What an epoch changes is the table of which slot serves whom."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from elastic_ep.core.errors import CheckpointError
from elastic_ep.models.gpu.arithmetic import Part
from elastic_ep.models.gpu.backup import MappedBackup
from elastic_ep.models.gpu.digest import new_stream
from elastic_ep.runtime.engine import SlotLoad
from elastic_ep.runtime.weights.base import ExpertSource, Loaded, LocalSource, SlotLayout, read_verified
from elastic_ep.runtime.weights.host import HostBackup

NOT_HERE = -1
ELSEWHERE = -2
"""in a table of slots: the expert's rows are computed by another call"""
_MOST_READERS = 4
_PINNED = 2 * _MOST_READERS + 2
"""of memory for one slot each: for those who load, those who stage, who looks at slots and who sends one to a peer"""
_PLACES = {
    HostBackup.kind: ("the host backup", "a bit of this host's memory has changed"),
    LocalSource.kind: ("another slot", "it was overwritten meanwhile, or the device's memory fails"),
}


class _Staged(NamedTuple):
    expert: int
    memory: torch.Tensor
    digest: int
    is_in_slot: bool


class DeviceSlots:
    """`num_layers` x `num_slots` slots of one layout on a device; the `Slots` of a rank whose model is there.

    What is staged for a slot that holds something lies beside it, in one of `num_staged` buffers. They and the pinned memory are there from
    the start: asked for memory while it tidies up a process that has ended, the driver takes half a second.

    Every read goes through pinned memory and a stream of the reading thread, except with a host backup that is mapped for the device
    (`MappedBackup`): what it has, and what another slot has, is copied and verified by the device itself.

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
        num_staged: int = 1,
    ):
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.readers = min(_MOST_READERS, len(os.sched_getaffinity(0)))
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
        self._tables_lock = threading.Lock()
        self._digests: dict[tuple[int, int], int] = {}
        self._staged: dict[tuple[int, int], _Staged] = {}
        self._free: deque[torch.Tensor] = deque(torch.zeros(num_staged, elements, dtype=layout.dtype, device=device))
        self._in_slots = threading.Lock()
        """who has it fills slots that hold nothing, or sees to it that nobody else does"""
        self._loading: set[tuple[int, int]] = set()
        self._spare: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._local = threading.local()
        size = layout.num_bytes
        self._free_pinned: deque[torch.Tensor] = deque(torch.empty(_PINNED, size, dtype=torch.uint8, pin_memory=True))
        self._adopted: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        """after the last copy of an adoption: who reads slots or fills buffers on another stream waits for it"""
        self._free_spare = list(range(num_spare - 1, -1, -1))

    @property
    def backup(self) -> ExpertSource | None:
        """See `Slots`. A host's backup is mapped for the device in the background, layer by layer."""
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

    def _hold(self, layer: int, slot: int, expert: int | None) -> None:
        """Note what a slot holds now."""
        with self._tables_lock:
            held, row = self._held[layer], self._slot_of[layer]
            held.pop(slot, None)
            if expert is not None:
                held[slot] = expert
            row[:] = NOT_HERE
            for at in sorted(held, reverse=True):
                row[held[at]] = at
            self._is_stale = True

    # ---- loading

    def load(self, load: SlotLoad, sources: Sequence[ExpertSource] = (), digest: int | None = None) -> Loaded:
        """Fill a slot; see `Slots.load`. Without sources, from the checkpoint. Raises CheckpointError."""
        load.check(len(self.memory), self.num_slots, self.num_experts)
        layer, slot, expert = load
        with self._in_slots:
            self._loading.add((layer, slot))
            self._hold(layer, slot, None)
            self._unstage((layer, slot))
        try:
            loaded = self._read(layer, expert, self.memory[layer][slot], sources, digest)
            self._hold(layer, slot, expert)
        finally:
            self._loading.discard((layer, slot))
        return loaded

    def stage(self, load: SlotLoad, sources: Sequence[ExpertSource] = (), digest: int | None = None) -> Loaded:
        """Read and verify one expert for `adopt`: beside the live slots, or in a slot that holds nothing. Raises CheckpointError."""
        load.check(len(self.memory), self.num_slots, self.num_experts)
        layer, slot, expert = load
        self._unstage((layer, slot))
        errors: tuple[str, ...] = ()
        with self._in_slots:  # not while a slow source is read: who fills a slot at once would wait for it
            is_at_hand = bool(sources) and self._at_hand(sources[0], layer, expert) is not None
            if is_at_hand and slot not in self._held[layer] and (layer, slot) not in self._loading:
                memory = self.memory[layer][slot]
                try:
                    loaded = self._read(layer, expert, memory, sources[:1], digest)
                except CheckpointError as error:
                    if len(sources) == 1:
                        raise
                    sources, errors = sources[1:], (f"{sources[0].kind}: {error}",)
                else:
                    self._staged[layer, slot] = _Staged(expert, memory, loaded.digest, is_in_slot=True)
                    return loaded
        memory = self._buffer()
        try:
            loaded = self._read(layer, expert, memory, sources, digest)
        except BaseException:
            self._free.append(memory)
            raise
        self._staged[layer, slot] = _Staged(expert, memory, loaded.digest, is_in_slot=False)
        return loaded._replace(errors=(*errors, *loaded.errors))

    def adopt(self, load: SlotLoad) -> int | None:
        """Have the slot hold what was staged for it; what lies beside it is copied, on the device. Returns its digest, None if this expert
        was not staged for it."""
        layer, slot, expert = load
        staged = self._staged.pop((layer, slot), None)  # one step: the stager may be dropping everything just now
        if staged is None:
            return None
        if staged.expert == expert and not staged.is_in_slot:
            self.memory[layer][slot].copy_(staged.memory)
            self._adopted.record(torch.cuda.current_stream(self.device))
        if not staged.is_in_slot:
            self._free.append(staged.memory)
        if staged.expert != expert:
            return None
        self._hold(layer, slot, expert)
        return staged.digest

    def drop_staged(self) -> None:
        """Have whatever is staged give its memory to the next staging."""
        for key in list(self._staged):
            self._unstage(key)

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
        stream = self._stream()
        with self._pinned() as scratch:
            with torch.cuda.stream(stream):
                stream.wait_event(self._adopted)
                scratch.copy_(self.memory[layer][slot].view(torch.uint8), non_blocking=True)
                stream.synchronize()
            return scratch.clone()

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

    def _unstage(self, key: tuple[int, int]) -> None:
        staged = self._staged.pop(key, None)
        if staged is not None and not staged.is_in_slot:
            self._free.append(staged.memory)

    def _buffer(self) -> torch.Tensor:
        """Memory to stage in; more than there was at the start only if more is staged than a change may."""
        try:
            return self._free.popleft()
        except IndexError:
            with torch.cuda.stream(self._stream()):  # whose work is always waited for, so this memory is nobody's
                return torch.empty_like(self.spare_memory[0])

    def _at_hand(self, source: ExpertSource, layer: int, expert: int) -> torch.Tensor | None:
        """uint8 [slot bytes]: an expert that the device can copy and verify by itself: in the host's backup, or in a slot here."""
        mapped = self._mapped
        if mapped is None or not mapped.can_copy:
            return None
        if source is mapped.backup:
            return mapped.view(layer, expert)
        slot = int(self._slot_of[layer, expert])
        if source.kind != LocalSource.kind or slot < 0:
            return None
        held: torch.Tensor = self.memory[layer][slot].view(torch.uint8)
        return held

    def _read(self, layer: int, expert: int, memory: torch.Tensor, sources: Sequence[ExpertSource], digest: int | None) -> Loaded:
        stream = self._stream()  # first of all: it tells a new thread which device is its own
        known = self._digests.get((layer, expert)) if digest is None else digest
        target, left = memory.view(torch.uint8), list(sources) or [self.checkpoint]
        errors: list[str] = []
        while (at_hand := self._at_hand(left[0], layer, expert)) is not None:
            assert self._mapped is not None
            found = self._mapped.copy(at_hand, target, self._adopted)
            expected = left[0].known_digest(layer, expert) if known is None else known
            if expected is None or found == expected:
                self._digests[layer, expert] = found
                return Loaded(found, left[0].kind, len(target), tuple(errors))
            place, why = _PLACES[left[0].kind]
            error = f"expert {expert} of MoE layer {layer} has digest {found:016x} in {place}, it should have {expected:016x}: {why}"
            if len(left) == 1:
                raise CheckpointError(error)
            errors.append(f"{left.pop(0).kind}: {error}")
        with self._pinned() as scratch:
            loaded = read_verified(left, layer, expert, scratch, known)
            with torch.cuda.stream(stream):
                stream.wait_event(self._adopted)
                target.copy_(scratch, non_blocking=True)
                stream.synchronize()
        self._digests[layer, expert] = loaded.digest
        return loaded._replace(errors=(*errors, *loaded.errors))

    @contextmanager
    def _pinned(self) -> Iterator[torch.Tensor]:
        """Pinned memory for one slot, for as long as the context lasts."""
        try:
            memory = self._free_pinned.popleft()
        except IndexError:
            torch.cuda.set_device(self.device)  # each thread has its own
            memory = torch.empty(self._layout.num_bytes, dtype=torch.uint8, pin_memory=True)
        try:
            yield memory
        finally:
            self._free_pinned.append(memory)

    def _stream(self) -> torch.cuda.Stream:
        """This thread's."""
        if not hasattr(self._local, "stream"):
            torch.cuda.set_device(self.device)
            self._local.stream = new_stream(self.device)
        stream: torch.cuda.Stream = self._local.stream
        return stream
