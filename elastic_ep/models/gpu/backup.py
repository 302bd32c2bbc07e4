"""A host's backup as a GPU reads it: its pages registered with the driver, so that an expert is one copy at the speed of the link, and
verified by the device. A layer is registered when it is full and those before it are; until then, and for what cannot be registered, slots
are read as everywhere else."""

from __future__ import annotations

import logging
import mmap
import threading
import time
from typing import Any

import numpy as np
import torch

from elastic_ep.core.errors import CheckpointError, ElasticEPError
from elastic_ep.models.gpu.digest import DeviceDigest, new_stream
from elastic_ep.runtime.weights.base import Loaded
from elastic_ep.runtime.weights.host import HostBackup

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 26
"""registered at once: the driver's lock is held for about 3 ms"""
_REST = 4.0
"""Times as long as a registration took the lock is left to others. Under the multi-process service it is all ranks', and a thread that came
back for it at once had them wait for up to 0.9 s."""
_POLL_S = 0.5
_PORTABLE = 0x01


class MappedBackup:
    """`backup`, and which of its layers this process's device can copy from."""

    def __init__(self, backup: HostBackup, slot_bytes: int, device: torch.device) -> None:
        self.backup = backup
        self._slot_bytes = slot_bytes
        self._device = device
        self._is_mapped = np.zeros(backup.experts.shape[0], dtype=bool)
        self._lock = threading.Lock()
        self._digest: DeviceDigest | None = None
        self._stream: torch.cuda.Stream | None = None
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
        """Take the pages back from the driver, before their memory is; no `load` may be under way."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self._is_mapped[:] = False
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        while self._registered:
            runtime.cudaHostUnregister(self._registered.pop())

    def has(self, layer: int, expert: int) -> bool:
        """Whether `load` can be asked for it."""
        return bool(self._is_mapped[layer]) and self.backup.known_digest(layer, expert) is not None

    def wait_mapped(self, timeout_s: float) -> bool:
        """Wait until all of it is mapped; False when it is not by then."""
        return self._done.wait(timeout_s)

    def load(self, layer: int, expert: int, target: torch.Tensor, digest: int | None) -> Loaded:
        """Copy an expert to the device (target: uint8 [slot bytes]) and verify it there. Raises CheckpointError for other bytes than those
        of `digest` (None: those that were put there)."""
        expected = self.backup.known_digest(layer, expert) if digest is None else digest
        with self._lock:
            assert self._digest is not None
            assert self._stream is not None
            with torch.cuda.stream(self._stream):
                target.copy_(torch.from_numpy(self.backup.view(layer, expert)), non_blocking=True)
                found = self._digest.of(target, self._stream)
        if found != expected:
            raise CheckpointError(
                f"expert {expert} of MoE layer {layer} has digest {found:016x} in the host backup, it should have {expected:016x}: "
                f"a bit of this host's memory has changed"
            )
        return Loaded(found, "host", self._slot_bytes)

    def _map_all(self) -> None:
        """Compile, then layer by layer, as they fill."""
        try:
            self._map_layers()
        except (ElasticEPError, OSError, RuntimeError) as error:
            log.warning("the host backup is not mapped for the GPU: %s; it is read by way of a copy", error)

    def _map_layers(self) -> None:
        torch.cuda.set_device(self._device)  # each thread has its own
        self._digest, self._stream = DeviceDigest(self._slot_bytes, self._device), new_stream(self._device)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        slots = max(1, _CHUNK_BYTES // self._slot_bytes)
        for layer in range(len(self._is_mapped)):
            while not self.backup.experts[layer].all():
                if self._closing.wait(_POLL_S):
                    return
            experts = self.backup.experts.shape[1]
            for first in range(0, experts, slots):
                at = self.backup.view(layer, first).__array_interface__["data"][0]
                began = time.monotonic()
                error = int(runtime.cudaHostRegister(at, (min(first + slots, experts) - first) * self._slot_bytes, _PORTABLE))
                if error:
                    raise ElasticEPError(f"registering layer {layer} gave CUDA error {error}")
                self._registered.append(at)
                if self._closing.wait(_REST * (time.monotonic() - began)):
                    return
            self._is_mapped[layer] = True
        self._done.set()
        log.info("the host backup is mapped for the GPU")
