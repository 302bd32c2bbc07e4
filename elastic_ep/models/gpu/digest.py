"""The digest of a slot's bytes, computed where they are."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from elastic_ep.core.errors import ElasticEPError
from elastic_ep.runtime.dispatch.cuda.build import build_kernels, find_nvcc

_SOURCE = Path(__file__).with_name("digest.cu")
_BYTES_PER_SUM = 128
"""a block of 1024 bytes has 8 sums of 8 bytes"""
SMALLEST_SLOT = 256
"""shorter inputs have other rules, which no expert needs"""


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """One that waits for no other."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@cache
def _library(capability: tuple[int, int], folder: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build_kernels(capability, folder, _SOURCE, ())))
    library.eep_digest_error.restype = ctypes.c_char_p
    return library


class DeviceDigest:
    """xxh3_64 of slots of `num_bytes` bytes on one device, one after the other. Not thread-safe.

    Raises InvalidInputError where the kernels cannot be compiled; see `is_possible`.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._num_bytes = num_bytes
        self._library = _library(torch.cuda.get_device_capability(device), Path.home() / ".cache" / "elastic-ep")
        self._sums = torch.empty(num_bytes // _BYTES_PER_SUM + 1, dtype=torch.int64, device=device)
        self._result = torch.empty(1, dtype=torch.int64, pin_memory=True)

    @staticmethod
    def is_possible(num_bytes: int) -> bool:
        """Whether there is a compiler, and slots are long enough."""
        return find_nvcc() is not None and num_bytes >= SMALLEST_SLOT and num_bytes % 8 == 0

    def of(self, slot: torch.Tensor, stream: torch.cuda.Stream) -> int:
        """After everything on the stream; waits for it. slot: uint8 [num_bytes] on the device."""
        at, words, result, on = map(ctypes.c_void_p, (slot.data_ptr(), self._sums.data_ptr(), self._result.data_ptr(), stream.cuda_stream))
        error = self._library.eep_digest(at, ctypes.c_longlong(self._num_bytes), words, result, on)
        if error:
            raise ElasticEPError(f"computing a digest on the GPU: {self._library.eep_digest_error(error).decode()}")
        stream.synchronize()
        return int(self._result.item()) & 0xFFFFFFFFFFFFFFFF
