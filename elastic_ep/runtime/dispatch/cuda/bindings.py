"""The compiled kernels as Python calls them."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from elastic_ep.core.errors import ElasticEPError
from elastic_ep.runtime.dispatch.cuda.build import build_kernels

IPC_HANDLE_BYTES = 64
PUBLISH, WAIT, MOVE = 1, 2, 4

_POINTERS = (
    "region",
    "base",
    "active",
    "cut",
    "failed",
    "voided",
    "ticket",
    "clock",
    "replica_rank",
    "quota",
    "x",
    "ids",
    "weights",
    "rows",
    "offsets",
    "origin",
    "out",
)
_INTS = ("ranks", "me", "experts", "replicas", "layer", "tokens", "top_k", "max_tokens", "is_bf16", "copy_x", "parts")


class Args(ctypes.Structure):
    """`Args` of kernels.cu, member by member; `Library` compares the sizes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_double) for name in ("stride", "step_phase", "source_phase")),
        *((name, ctypes.c_longlong) for name in ("pairs_at", "counts_at", "x_at", "y_at", "row_bytes", "capacity")),
        *((name, ctypes.c_ulonglong) for name in ("deadline_ns", "grace_ns")),
        *((name, ctypes.c_int) for name in _INTS),
    )


class CudaCallError(ElasticEPError):
    """The GPU's or the driver's fault: a CUDA call failed."""


class Library:
    """Calls into the shared library; all take effect on the calling thread's current device. Raises CudaCallError."""

    def __init__(self, path: Path):
        self._lib = ctypes.CDLL(str(path))
        self._lib.eep_error.restype = ctypes.c_char_p
        if self._lib.eep_args_bytes() != ctypes.sizeof(Args):
            raise CudaCallError(
                f"{path} has an Args of {self._lib.eep_args_bytes()} bytes, Python one of {ctypes.sizeof(Args)}; rebuild it"
            )

    def _check(self, what: str, error: int) -> None:
        if error:
            raise CudaCallError(f"{what}: CUDA error {error}, {self._lib.eep_error(error).decode()}")

    def alloc(self, num_bytes: int) -> int:
        """Zeroed device memory that can be exported."""
        pointer = ctypes.c_void_p()
        self._check(f"allocating {num_bytes} bytes on the GPU", self._lib.eep_alloc(ctypes.c_size_t(num_bytes), ctypes.byref(pointer)))
        return pointer.value or 0

    def free(self, pointer: int) -> None:
        self._check("freeing GPU memory", self._lib.eep_free(ctypes.c_void_p(pointer)))

    def host_alloc(self, num_bytes: int) -> int:
        """Pinned host memory that kernels reach under the same address."""
        pointer = ctypes.c_void_p()
        self._check(f"pinning {num_bytes} bytes", self._lib.eep_host_alloc(ctypes.c_size_t(num_bytes), ctypes.byref(pointer)))
        return pointer.value or 0

    def host_free(self, pointer: int) -> None:
        self._check("freeing pinned memory", self._lib.eep_host_free(ctypes.c_void_p(pointer)))

    def export(self, pointer: int) -> bytes:
        """A handle with which another process can `open` this memory."""
        handle = ctypes.create_string_buffer(IPC_HANDLE_BYTES)
        self._check("exporting GPU memory", self._lib.eep_export(ctypes.c_void_p(pointer), handle))
        return handle.raw

    def open(self, handle: bytes) -> int:
        """Map another process's memory. It stays valid after that process's death."""
        pointer = ctypes.c_void_p()
        self._check("mapping a peer's GPU memory", self._lib.eep_open(handle, ctypes.byref(pointer)))
        return pointer.value or 0

    def close(self, pointer: int) -> None:
        self._check("unmapping a peer's GPU memory", self._lib.eep_close(ctypes.c_void_p(pointer)))

    def prepare(self, args: Args, stream: int) -> None:
        """Load all kernels; `args` has the largest sizes."""
        self._check("loading the kernels", self._lib.eep_prepare(ctypes.byref(args), ctypes.c_void_p(stream)))

    def set_clock(self, clock: int, epoch: int, step: int, stream: int) -> None:
        error = self._lib.eep_set_clock(
            ctypes.c_void_p(clock), ctypes.c_ulonglong(epoch), ctypes.c_ulonglong(step), ctypes.c_void_p(stream)
        )
        self._check("setting the step", error)

    def dispatch(self, args: Args, parts: int, blocks: int, stream: int) -> None:
        """Enqueue these parts of a dispatch."""
        args.parts = parts
        self._check("dispatch", self._lib.eep_dispatch(ctypes.byref(args), blocks, ctypes.c_void_p(stream)))

    def combine(self, args: Args, parts: int, blocks: int, stream: int) -> None:
        """Enqueue these parts of a combine."""
        args.parts = parts
        self._check("combine", self._lib.eep_combine(ctypes.byref(args), blocks, ctypes.c_void_p(stream)))


@cache
def load_library(capability: tuple[int, int], folder: Path) -> Any:
    """Build if need be, and load once per process."""
    return Library(build_kernels(capability, folder))
