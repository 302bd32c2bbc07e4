"""Background loading on a rank: a thread that has experts staged while steps go on, several at a time, and says so when all of an order lie
ready. Between orders the same thread does the rank's upkeep.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from elastic_ep.brain.messages import Install, LoadOrder, RankFatal, Stage, Staged, StageFailed
from elastic_ep.core.errors import CheckpointError, ElasticEPError, WrongExpertError
from elastic_ep.runtime.engine import SlotLoad, Slots
from elastic_ep.runtime.faults import FaultPlan
from elastic_ep.runtime.upkeep import Upkeep
from elastic_ep.runtime.weights.base import Loaded, LocalSource
from elastic_ep.runtime.weights.sources import Sources

log = logging.getLogger(__name__)

_PATIENCE_S = 0.05
_RETRY_S = 1.0
_READS_AHEAD = 8
"""for each reader: on a busy machine this thread gets a core too late to keep them busy one by one"""
EXIT_WRONG_EXPERT = 6


class Stager:
    """One thread, one order at a time; a newer order ends an older one. `send` must be safe to call from it.

    Args:
        first_slot: physical id of this rank's slot 0.
        make_sources: for each thread that reads.
        prepare: build the tables of an Install that will come.
    """

    def __init__(
        self,
        slots: Slots,
        first_slot: int,
        make_sources: Callable[[], Sources],
        upkeep: Upkeep,
        send: Callable[[Staged | StageFailed | RankFatal], None],
        faults: FaultPlan,
        prepare: Callable[[Install], None],
    ) -> None:
        self._slots = slots
        self._first_slot = first_slot
        self._make_sources = make_sources
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(slots.readers, thread_name_prefix="stage") if slots.readers > 1 else None  # starts no thread yet
        self._upkeep = upkeep
        self._send = send
        self._faults = faults
        self._prepare = prepare
        self._orders: queue.Queue[Stage] = queue.Queue()
        self._latest = -1
        threading.Thread(target=self._run, name="stager", daemon=True).start()

    def order(self, stage: Stage) -> None:
        """Begin with this order as soon as the experts in hand are read; what was staged before is dropped."""
        self._latest = stage.change
        self._orders.put(stage)

    def cancel(self) -> None:
        """End the order in hand, without an answer."""
        self._latest = -1

    def _run(self) -> None:
        while True:
            stage = self._next_order()
            answer: Staged | StageFailed | None
            try:
                answer = self._stage(stage)
            except CheckpointError as error:
                answer = StageFailed(stage.change, str(error))
            except (OSError, MemoryError, RuntimeError, ElasticEPError) as error:  # no memory to stage in, above all
                answer = StageFailed(stage.change, f"{type(error).__name__}: {error}")
            if answer is not None:
                try:
                    self._send(answer)
                except OSError:
                    return  # the controller is gone; the process is ending
                self._faults.reach("stage_told")

    def _next_order(self) -> Stage:
        """The next order; upkeep until it comes. A slot with wrong bytes ends the process here and now: no step may use it again."""
        wait_s = 0.0
        while True:
            try:
                return self._orders.get(timeout=wait_s)
            except queue.Empty:
                pass
            try:
                wait_s = self._upkeep.step()
            except WrongExpertError as error:
                try:
                    self._send(RankFatal(str(error)))
                finally:
                    os._exit(EXIT_WRONG_EXPERT)
            except (OSError, MemoryError, RuntimeError, ElasticEPError) as error:
                log.warning("upkeep: %s: %s; tried again in %g s", type(error).__name__, error, _RETRY_S)
                wait_s = _RETRY_S

    def _wait_until(self, when: float, stage: Stage) -> None:
        """Keep to the budget, but not past the end of the order."""
        while (left := when - time.monotonic()) > 0 and self._latest == stage.change:
            time.sleep(min(left, _PATIENCE_S))

    def _stage(self, stage: Stage) -> Staged | None:
        """Leaves no read under way."""
        self._faults.reach("stage_begin")
        self._slots.drop_staged()
        started, done, pending = time.monotonic(), _Done(), deque[Future[Loaded | None]]()
        try:
            for number, load in enumerate(stage.loads, 1):
                if self._latest != stage.change:
                    return None
                self._faults.reach("stage_expert")
                if self._pool is None:
                    done.add(self._read(stage, load))
                else:
                    pending.append(self._pool.submit(self._read, stage, load))
                if len(pending) > _READS_AHEAD * self._slots.readers:
                    done.add(pending.popleft().result())
                if stage.bytes_per_s > 0:
                    self._wait_until(started + number * self._slots.shape[2] / stage.bytes_per_s, stage)
            while pending:
                done.add(pending.popleft().result())
        finally:
            wait([future for future in pending if not future.cancel()])
        if self._latest != stage.change:
            return None
        if stage.ahead is not None:
            self._prepare(stage.ahead)
        self._faults.reach("stage_end")
        return Staged(stage.change, moved_bytes(done.by_source), tuple(done.errors))

    def _read(self, stage: Stage, load: LoadOrder) -> Loaded | None:
        """In a reader's thread, or in this one where only one is to read. None if the order has been given up."""
        if self._latest != stage.change:
            return None
        if not hasattr(self._own, "sources"):
            self._own.sources = self._make_sources()
        self._own.sources.begin_order(stage.change)
        place = SlotLoad(load.layer, load.slot - self._first_slot, load.expert)
        return self._slots.stage(place, self._own.sources.chain(load, stage.weights), load.digest)


@dataclass
class _Done:
    """What has been staged of an order."""

    by_source: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def add(self, loaded: Loaded | None) -> None:
        if loaded is None:
            return
        self.by_source[loaded.kind] += loaded.num_bytes
        self.errors += loaded.errors


def moved_bytes(by_source: Counter[str]) -> dict[str, int]:
    """Without what never left the rank."""
    return {kind: num_bytes for kind, num_bytes in by_source.items() if kind != LocalSource.kind}
