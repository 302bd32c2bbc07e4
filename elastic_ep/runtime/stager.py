"""Background loading on a rank: a thread that fills staging memory while steps go on, and says so when all of an order lies ready."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from elastic_ep.brain.messages import Stage, Staged, StageFailed
from elastic_ep.core.errors import CheckpointError
from elastic_ep.runtime.engine import SlotLoad, Slots
from elastic_ep.runtime.faults import FaultPlan

_PATIENCE_S = 0.05


class Stager:
    """One thread, one order at a time; a newer order ends an older one. `send` must be safe to call from it.

    Args:
        first_slot: physical id of this rank's slot 0.
    """

    def __init__(self, slots: Slots, first_slot: int, send: Callable[[Staged | StageFailed], None], faults: FaultPlan) -> None:
        self._slots = slots
        self._first_slot = first_slot
        self._send = send
        self._faults = faults
        self._orders: queue.Queue[Stage] = queue.Queue()
        self._latest = -1
        threading.Thread(target=self._run, name="stager", daemon=True).start()

    def order(self, stage: Stage) -> None:
        """Begin with this order as soon as the expert in hand is read; what was staged before is dropped."""
        self._latest = stage.change
        self._orders.put(stage)

    def cancel(self) -> None:
        """End the order in hand, without an answer."""
        self._latest = -1

    def _run(self) -> None:
        while True:
            stage = self._orders.get()
            answer: Staged | StageFailed | None
            try:
                answer = self._stage(stage)
            except CheckpointError as error:
                answer = StageFailed(stage.change, str(error))
            if answer is not None:
                try:
                    self._send(answer)
                except OSError:
                    return  # the controller is gone; the process is ending

    def _wait_until(self, when: float, stage: Stage) -> None:
        """Keep to the budget, but not past the end of the order."""
        while (left := when - time.monotonic()) > 0 and self._latest == stage.change:
            time.sleep(min(left, _PATIENCE_S))

    def _stage(self, stage: Stage) -> Staged | None:
        self._slots.drop_staged()
        started, num_bytes = time.monotonic(), 0
        for load in stage.loads:
            if self._latest != stage.change:
                return None
            self._faults.reach("stage_expert")
            num_bytes += self._slots.stage(SlotLoad(load.layer, load.slot - self._first_slot, load.expert))
            if stage.bytes_per_s > 0:
                self._wait_until(started + num_bytes / stage.bytes_per_s, stage)
        return Staged(stage.change, num_bytes)
