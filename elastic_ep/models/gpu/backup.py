"""A host's backup as a GPU reads it: its pages registered with the driver, so that an expert is one copy at the speed of the link, and
verified by the device. A layer is registered when it is full and those before it are; until then, and for what cannot be registered, slots
are read as everywhere else."""

from __future__ import annotations

import logging
import mmap
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from elastic_ep.core.errors import ElasticEPError
from elastic_ep.models.gpu.digest import DeviceDigest, new_stream
from elastic_ep.runtime.weights.host import HostBackup

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 26
"""registered at once: the driver's lock is held for about 3 ms"""
_REST = 1.0
"""Times as long as a registration took the lock is left to others. Under the multi-process service it is all ranks', and a thread that came
back for it at once had them wait for up to 0.9 s. Several ranks at once are too many: four made steps 2.3 times as long."""
_POLL_S = 0.5
_COPIERS = 2
"""experts on their way at a time: one is copied while the digest of the other is computed"""
_PORTABLE = 0x01


class MappedBackup:
    """`backup`, and which of its layers this process's device can copy from."""

    def __init__(self, backup: HostBackup, slot_bytes: int, device: torch.device) -> None:
        self.backup = backup
        self._slot_bytes = slot_bytes
        self._device = device
        self._is_mapped = np.zeros(backup.experts.shape[0], dtype=bool)
        self._copiers: queue.SimpleQueue[tuple[torch.cuda.Stream, DeviceDigest]] = queue.SimpleQueue()
        self.can_copy = False
        """whether what `copy` needs is compiled by now"""
        self._done = threading.Event()
        self._closing = threading.Event()
        self._registered: list[int] = []
        self._thread = threading.Thread(target=self._map_all, name="map-backup", daemon=True)
        if slot_bytes % mmap.PAGESIZE:
            log.info("slots of %d bytes are no whole pages: the host backup is not mapped for the GPU", slot_bytes)
        elif not DeviceDigest.is_possible(slot_bytes):
            log.info("without nvcc the GPU cannot verify what it copies: the host backup is not mapped for it")
        else:
            self._thread.start()

    def close(self) -> None:
        """Take the pages back from the driver, before their memory is; no `copy` may be under way."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self._is_mapped[:] = False
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        while self._registered:
            runtime.cudaHostUnregister(self._registered.pop())

    def view(self, layer: int, expert: int) -> torch.Tensor | None:
        """uint8 [slot bytes]: an expert where `copy` can take it from; None while it is not there, or not mapped."""
        if not self._is_mapped[layer] or self.backup.known_digest(layer, expert) is None:
            return None
        return torch.from_numpy(self.backup.view(layer, expert))

    def wait_mapped(self, timeout_s: float) -> bool:
        """Wait until all of it is mapped; False when it is not by then."""
        return self._done.wait(timeout_s)

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: torch.cuda.Event) -> int:
        """Copy an expert (uint8 [slot bytes], here or mapped) to the device (the same) once `after` has come. Returns the digest of what
        came, as the device finds it. May run in several threads."""
        stream, digest = copier = self._copiers.get()
        try:
            with torch.cuda.stream(stream):
                stream.wait_event(after)
                target.copy_(source, non_blocking=True)
                return digest.of(target, stream)
        finally:
            self._copiers.put(copier)

    def _map_all(self) -> None:
        """Compile, then layer by layer, as they fill; one process of the host at a time."""
        try:
            self._map_layers()
        except (ElasticEPError, OSError, RuntimeError) as error:
            log.warning("the host backup is not mapped for the GPU: %s; it is read by way of a copy", error)

    def _map_layers(self) -> None:
        torch.cuda.set_device(self._device)  # each thread has its own
        for _ in range(_COPIERS):
            stream = new_stream(self._device)
            with torch.cuda.stream(stream):
                self._copiers.put((stream, DeviceDigest(self._slot_bytes, self._device)))
        self.can_copy = True
        for layer in range(len(self._is_mapped)):
            if not self._wait_for(partial(self._is_full, layer)) or not self._wait_for(self.backup.take_turn):
                return
            try:
                if not self._map(layer):
                    return
            finally:
                self.backup.end_turn()
            self._is_mapped[layer] = True
        self._done.set()
        log.info("the host backup is mapped for the GPU")

    def _is_full(self, layer: int) -> bool:
        return bool(self.backup.experts[layer].all())

    def _wait_for(self, condition: Callable[[], bool]) -> bool:
        """False when this is closed before the condition holds."""
        while not condition():
            if self._closing.wait(_POLL_S):
                return False
        return True

    def _map(self, layer: int) -> bool:
        """False when this is closed meanwhile. Raises ElasticEPError when the driver refuses."""
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        experts, slots = self.backup.experts.shape[1], max(1, _CHUNK_BYTES // self._slot_bytes)
        for first in range(0, experts, slots):
            at = self.backup.view(layer, first).__array_interface__["data"][0]
            began = time.monotonic()
            error = int(runtime.cudaHostRegister(at, (min(first + slots, experts) - first) * self._slot_bytes, _PORTABLE))
            if error:
                raise ElasticEPError(f"registering layer {layer} gave CUDA error {error}")
            self._registered.append(at)
            if self._closing.wait(_REST * (time.monotonic() - began)):
                return False
        return True
