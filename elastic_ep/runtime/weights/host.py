"""One copy of all experts in a host's memory, in pages that every rank of the host maps and that outlive any of them.

The memory is a memfd: POSIX shared memory without a name. Whoever starts the host's ranks makes it and hands it down; the kernel frees
it with the last process that has it, so nothing is left to clean up, also after `kill -9`, and no limit of /dev/shm applies.

Layout: digest uint64 [L, E], ready uint8 [L, E], padding to a huge page, then the slots' bytes [L, E, slot_bytes], in huge pages where the
system gives them. A slot's bytes are written first, its digest next, its ready flag last; two ranks that write the same expert write the
same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.errors import CheckpointError, InvalidInputError
from elastic_ep.runtime.faults import FaultPlan
from elastic_ep.runtime.weights.digest import Read, copy
from elastic_ep.runtime.weights.pages import HUGE_PAGE, SharedPages, file_bytes

if TYPE_CHECKING:
    import torch

_PAGE = mmap.PAGESIZE


class HostBackup:
    """The `ExpertSource` of a host's memory, mapped into this process. Needs no tensor library, as the controller has none.

    Args:
        fd: from `create`. It stays the caller's.
        faults: for tests.
    """

    kind = "host"

    def __init__(self, fd: int, num_layers: int, num_experts: int, slot_bytes: int, faults: FaultPlan | None = None) -> None:
        self._faults = faults or FaultPlan()
        self._fd = fd
        self._slot_bytes = slot_bytes
        count = num_layers * num_experts
        self.num_bytes, start = _sizes(count, slot_bytes)
        if os.fstat(fd).st_size != self.num_bytes:
            raise InvalidInputError(
                f"the host backup has {os.fstat(fd).st_size} bytes, {num_layers} layers x {num_experts} experts of {slot_bytes} bytes "
                f"need {self.num_bytes}; it belongs to another model"
            )
        self._start = start
        self._pages = SharedPages(fd, start + count * slot_bytes)
        memory = self._pages.memory
        self._digests: NDArray[np.uint64] = memory[: count * 8].view(np.uint64).reshape(num_layers, num_experts)
        self._ready: NDArray[np.uint8] = memory[count * 8 : count * 9].reshape(num_layers, num_experts)
        self._slots: NDArray[np.uint8] = memory[start:].reshape(num_layers, num_experts, slot_bytes)

    @staticmethod
    def create(num_layers: int, num_experts: int, slot_bytes: int, *, beside: int = 0) -> int:
        """The file descriptor of an empty backup. Memory is taken as it fills.

        Raises InvalidInputError when the host has too little for it and for the `beside` bytes that its ranks' slots will take.
        """
        num_bytes, _ = _sizes(num_layers * num_experts, slot_bytes)
        free = _available_bytes()
        if num_bytes + beside > free:
            slots = f", beside {beside} of the slots of this host's ranks" if beside else ""
            raise InvalidInputError(
                f"--host-backup experts needs {num_bytes} bytes{slots}, this host has {free} available; "
                f"give --host-backup off, or free memory"
            )
        fd = os.memfd_create("elastic-ep-experts", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except OSError as error:
            os.close(fd)
            raise InvalidInputError(
                f"--host-backup experts needs a file of memory of {num_bytes} bytes, which the system refuses ({error.strerror}); "
                f"raise the limit (ulimit -f), or give --host-backup off"
            ) from None
        return fd

    @property
    def experts(self) -> NDArray[np.bool_]:
        """bool [L, E]: what it holds now."""
        return self._ready.astype(bool)

    def read(self, layer: int, expert: int, slot: torch.Tensor) -> Read:
        """See `ExpertSource.read`."""
        if not self._ready[layer, expert]:
            raise CheckpointError(f"expert {expert} of MoE layer {layer} is not in the host backup yet")
        return copy(slot.numpy(), self._slots[layer, expert])

    def view(self, layer: int, expert: int) -> NDArray[np.uint8]:
        """uint8 [slot_bytes]: the expert's bytes in place, whether they are ready or not."""
        view: NDArray[np.uint8] = self._slots[layer, expert]
        return view

    def touch(self, layer: int, expert: int) -> None:
        """Have this process map an expert's pages, which would else cost the first read of them half as much time again."""
        self._slots[layer, expert, ::_PAGE].max()

    def write(self, layer: int, expert: int, slot: torch.Tensor, digest: int) -> None:
        """Take a copy of verified bytes (uint8 [slot_bytes])."""
        self._faults.reach("backup_begin", layer=layer, expert=expert)
        begin = self._start + (layer * self._ready.shape[1] + expert) * self._slot_bytes
        self._pages.make_huge(begin, begin + self._slot_bytes)
        self._slots[layer, expert] = slot.numpy()
        self._digests[layer, expert] = digest
        self._faults.reach("backup_bytes", layer=layer, expert=expert)
        self._ready[layer, expert] = 1
        self._faults.reach("backup_end", layer=layer, expert=expert)

    def known_digest(self, layer: int, expert: int) -> int | None:
        """What `write` was told; None while it is not there."""
        return int(self._digests[layer, expert]) if self._ready[layer, expert] else None

    def take_turn(self) -> bool:
        """Whether this process may now do what one process of the host does at a time. Until `end_turn`, or its death."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # either says that another process has it
            return False
        return True

    def end_turn(self) -> None:
        """Let another process have it."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """The mapping goes with the process: views of it may still be in use."""


def _sizes(count: int, slot_bytes: int) -> tuple[int, int]:
    """(bytes of the file, where the slots begin)."""
    start = -(-count * 9 // HUGE_PAGE) * HUGE_PAGE
    return file_bytes(start + count * slot_bytes), start


def _available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """What this process could still get of the host's memory, or of its control group's (version 2), as in a container."""
    meminfo = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
    free = int(meminfo["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in meminfo else 1 << 62
    with contextlib.suppress(OSError):  # a kernel without groups
        for line in (proc / "self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                inner = groups / line.removeprefix("0::/")
                free = min(free, *(_room(group) for group in (inner, *inner.parents) if group.is_relative_to(groups)))
    return free


def _room(group: Path) -> int:
    """Bytes that a control group may still take, its cache of files given back."""
    try:
        most, used = (int((group / file).read_text()) for file in ("memory.max", "memory.current"))
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit, or none that can be seen
        return 1 << 62
    return most - used + int(cache.get("inactive_file", 0)) + int(cache.get("active_file", 0))
