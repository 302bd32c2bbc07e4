"""Having a rank's slots hold what an epoch's order says: what is there stays, what was staged is adopted, the rest is read, several at a
time. The main thread keeps the records; the readers' threads only read."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from elastic_ep.brain.messages import LoadedSlot, LoadOrder
from elastic_ep.core.errors import CheckpointError
from elastic_ep.core.links import SourceKind
from elastic_ep.runtime.engine import SlotLoad, Slots
from elastic_ep.runtime.faults import FaultPlan
from elastic_ep.runtime.weights.base import Loaded
from elastic_ep.runtime.weights.sources import Sources

Held = MutableMapping[tuple[int, int], tuple[int, int]]
"""(layer, physical slot) -> (expert, digest)"""


@dataclass
class Filled:
    """What came of an order.

    Attributes:
        slots: what hold their expert now.
        by_source: bytes read.
        errors: of sources that were passed over.
        failure: an expert that no source has, in words; then, or when the order was interrupted, not all of it was done.
    """

    slots: list[LoadedSlot] = field(default_factory=list)
    by_source: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    failure: str = ""
    is_interrupted: bool = False


class Filler:
    """Fills the slots of one rank. `fill` is for its main thread.

    Args:
        first_slot: physical id of this rank's slot 0.
        held: what the slots hold; an entry is taken out before its slot is overwritten.
    """

    def __init__(self, slots: Slots, first_slot: int, sources: Sources, held: Held, faults: FaultPlan) -> None:
        self._slots = slots
        self._first_slot = first_slot
        self._sources = sources
        self._held = held
        self._faults = faults
        self._pool = ThreadPoolExecutor(slots.readers, thread_name_prefix="reader") if slots.readers > 1 else None  # starts no thread yet

    def fill(self, loads: Sequence[LoadOrder], is_interrupted: Callable[[], bool]) -> Filled:
        """See the module. Copies inside the rank come before what is read into slots that they may be copied from."""
        out = Filled()
        reads: list[LoadOrder] = []
        try:
            for load in loads:
                if is_interrupted():
                    out.is_interrupted = True
                    return out
                self._faults.reach("load_expert")
                if not self._has(load, out):
                    if load.source == SourceKind.LOCAL.value:
                        self._held.pop((load.layer, load.slot), None)
                        self._note(load, self._read(load), out)
                    else:
                        reads.append(load)
        except CheckpointError as error:
            out.failure = str(error)
            return out
        self._read_all(reads, is_interrupted, out)
        return out

    def _has(self, load: LoadOrder, out: Filled) -> bool:
        """Whether the slot holds the expert already, or does once it has what was staged."""
        key = (load.layer, load.slot)
        held = self._held.get(key)
        if held is None or held[0] != load.expert:
            self._held.pop(key, None)
            digest = self._slots.adopt(self._place(load))
            if digest is None:
                if held is not None:
                    self._held[key] = held  # until it is overwritten
                return False
            held = self._held[key] = (load.expert, digest)
        out.slots.append(LoadedSlot(load.layer, load.slot, *held))
        self._faults.reach("expert_loaded")
        return True

    def _read_all(self, reads: Sequence[LoadOrder], is_interrupted: Callable[[], bool], out: Filled) -> None:
        """Leaves no read under way, but when something else than a source fails, which ends the process."""
        pending: deque[tuple[LoadOrder, Future[Loaded]]] = deque()
        for load in reads:
            out.is_interrupted = out.is_interrupted or is_interrupted()
            if out.is_interrupted or out.failure:
                break
            self._held.pop((load.layer, load.slot), None)
            pending.append((load, self._submit(load)))
            if len(pending) > self._slots.readers:
                self._finish(*pending.popleft(), out)
        if out.is_interrupted or out.failure:
            pending = deque((load, future) for load, future in pending if not future.cancel())
        for load, future in pending:
            self._finish(load, future, out)

    def _submit(self, load: LoadOrder) -> Future[Loaded]:
        if self._pool is not None:
            return self._pool.submit(self._read, load)
        future: Future[Loaded] = Future()
        try:
            future.set_result(self._read(load))
        except CheckpointError as error:
            future.set_exception(error)
        return future

    def _finish(self, load: LoadOrder, future: Future[Loaded], out: Filled) -> None:
        try:
            self._note(load, future.result(), out)
        except CheckpointError as error:
            out.failure = out.failure or str(error)

    def _read(self, load: LoadOrder) -> Loaded:
        return self._slots.load(self._place(load), self._sources.chain(load, {}), load.digest)

    def _note(self, load: LoadOrder, loaded: Loaded, out: Filled) -> None:
        held = self._held[load.layer, load.slot] = (load.expert, loaded.digest)
        out.slots.append(LoadedSlot(load.layer, load.slot, *held))
        out.by_source[loaded.kind] += loaded.num_bytes
        out.errors += loaded.errors
        self._faults.reach("expert_loaded")

    def _place(self, load: LoadOrder) -> SlotLoad:
        return SlotLoad(load.layer, load.slot - self._first_slot, load.expert)
