"""Memory and kernels as Mooncake EP and NIXL EP have them, for ranks that are threads: written from what the libraries document.

What matters is kept: one-sided writes into the half of a peer's buffer that the *writer's* call uses, counts that are added to what lies
there, halves cleared one call ahead, sources and tokens in any order, garbage wherever nothing was written, no epochs. A caller that
breaks the contract gets a `ContractError`.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

GARBAGE = -7.0e33
HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)


class ContractError(AssertionError):
    """The library's documented contract was broken."""


def require(condition: Any, what: str) -> None:
    if not condition:
        raise ContractError(what)


@dataclass
class Half:
    signals: np.ndarray
    rows: dict[int, tuple[int, torch.Tensor]] = field(default_factory=dict)


class Memory:
    """What one process registered: two halves, and which one its next call uses."""

    def __init__(self, rank: int, num_experts: int):
        self.rank = rank
        self.halves = [Half(np.zeros(num_experts, dtype=np.int64)) for _ in range(2)]
        self.index = 0


@dataclass(frozen=True)
class Shape:
    """What all ranks must give alike."""

    messages: int
    hidden: int
    num_experts: int
    num_ranks: int

    @property
    def per_rank(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def width(self) -> int:
        return self.num_ranks * self.messages


class Fabric:
    """Everything that threads share. A rank of `busy` is at work for certain, however slow this machine is: no kernel drops it."""

    def __init__(self, seed: int):
        self.changed = threading.Condition()
        self.rng = random.Random(seed)
        self.shape: Shape | None = None
        self.busy: set[int] = set()

    def agree(self, shape: Shape) -> None:
        with self.changed:
            require(self.shape in (None, shape), f"{shape} on one rank, {self.shape} on another")
            self.shape = shape


class Stream:
    """Kernels of one rank, one after the other, on a thread."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def enqueue(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def query(self) -> bool:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._jobs.unfinished_tasks == 0

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(10)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:
                self._error = error
            finally:
                self._jobs.task_done()


@dataclass
class Kernels:
    """The calls of one rank. `peers` are the memories it may write to, `alive` and `drop` read and write its mask; `heeds` says whether a
    waiting kernel looks at that."""

    fabric: Fabric
    memory: Memory
    peers: dict[int, Memory]
    alive: Callable[[int], bool]
    drop: Callable[[int], None]
    timeout_s: float
    heeds: bool

    def _begin(self) -> tuple[int, Half]:
        index = self.memory.index
        self.memory.index ^= 1
        self.memory.halves[index ^ 1].signals[:] = 0
        return index, self.memory.halves[index]

    def _write(self, rank: int, index: int) -> Half | None:
        """Where a one-sided write to a rank ends up; None if nowhere."""
        if rank == self.memory.rank:
            return self.memory.halves[index]
        target = self.peers.get(rank)
        return None if target is None else target.halves[index]

    def _await(self, half: Half, at: int, rank: int, began: float) -> bool:
        """Wait for a signal. False if there is none, the rank being masked then."""
        with self.fabric.changed:
            while self.alive(rank) or not self.heeds:
                if half.signals[at]:
                    return True
                if time.monotonic() - began > self.timeout_s and rank not in self.fabric.busy:
                    self.drop(rank)
                    return False
                self.fabric.changed.wait(0.01)
        return False

    def dispatch(
        self,
        shape: Shape,
        x: torch.Tensor,
        ids: torch.Tensor,
        rows: torch.Tensor,
        sent_as: torch.Tensor,
        layout: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        per_rank, me = shape.per_rank, self.memory.rank
        sent = np.zeros(shape.num_experts, dtype=np.int64)
        with self.fabric.changed:
            index, half = self._begin()
            tokens = list(range(len(x)))
            self.fabric.rng.shuffle(tokens)
            for t in tokens:
                for e in ids[t].tolist():
                    if e < 0:
                        continue
                    target = self._write(e // per_rank, index) if self.alive(e // per_rank) else None
                    require(sent[e] < shape.messages, f"more than {shape.messages} messages for expert {e}: they would overwrite others")
                    if target is not None:
                        target.rows[(e % per_rank * shape.num_ranks + me) * shape.messages + int(sent[e])] = (t, x[t].clone())
                    sent[e] += 1
            for e in range(shape.num_experts):
                target = self._write(e // per_rank, index) if self.alive(e // per_rank) else None
                if target is not None:
                    target.signals[e % per_rank * shape.num_ranks + me] += -sent[e] - 1
            self.fabric.changed.notify_all()
        count.zero_()
        began = time.monotonic()
        pairs = [(n, source) for n in range(per_rank) for source in range(shape.num_ranks)]
        self.fabric.rng.shuffle(pairs)
        for n, source in pairs:
            at = n * shape.num_ranks + source
            came = self.alive(source) and self._await(half, at, source, began)
            with self.fabric.changed:
                got = int(-half.signals[at] - 1) if came else 0
                first = int(count[n])
                count[n] += got
                layout[n, source] = first << 32 | got
                for i in range(max(0, min(got, shape.width - first))):
                    token, row = half.rows.get(
                        at * shape.messages + i, (self.fabric.rng.randrange(-9, 9), torch.full((shape.hidden,), GARBAGE))
                    )
                    rows[n, first + i] = row
                    sent_as[n, first + i] = token

    def combine(
        self, shape: Shape, outputs: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, handle: tuple[Any, ...], out: torch.Tensor
    ) -> None:
        sent_as, layout = handle[0], handle[1]
        per_rank, me = shape.per_rank, self.memory.rank
        with self.fabric.changed:
            index, half = self._begin()
            for n in range(per_rank):
                expert = me * per_rank + n
                for rank in range(shape.num_ranks):
                    target = self._write(rank, index) if self.alive(rank) else None
                    if target is None:
                        continue
                    first, count = int(layout[n, rank]) >> 32, int(layout[n, rank]) & 0xFFFFFFFF
                    for i in range(first, min(first + count, shape.width)):
                        target.rows[expert * shape.messages + int(sent_as[n, i])] = (0, outputs[n, i].clone())
                    target.signals[expert] += 1
            self.fabric.changed.notify_all()
        began = time.monotonic()
        for expert in range(shape.num_experts):
            if self.alive(expert // per_rank):
                self._await(half, expert, expert // per_rank, began)
        for t in range(len(ids)):
            total = np.zeros(shape.hidden, dtype=np.float32)
            for k, e in enumerate(ids[t].tolist()):
                if e >= 0 and self.alive(e // per_rank):
                    with self.fabric.changed:
                        row = half.rows.get(e * shape.messages + t, (0, torch.full((shape.hidden,), GARBAGE)))[1]
                    total = multiply_add(total, row, float(weights[t, k]))
            out[t] = torch.from_numpy(total).to(torch.bfloat16)


def multiply_add(total: np.ndarray, row: torch.Tensor, weight: float) -> np.ndarray:
    """float32 fused multiply-add: a product of bfloat16 and float32 is exact in float64."""
    return (total.astype(np.float64) + row.double().numpy() * np.float64(weight)).astype(np.float32)


def garbage(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows, sent_as, layout and counts before a dispatch fills them in."""
    rows = torch.full((shape.per_rank, shape.width, shape.hidden), GARBAGE, dtype=torch.bfloat16)
    sent_as = torch.full((shape.per_rank, shape.width), -(2**31) + 5, dtype=torch.int32)
    layout = torch.full((shape.per_rank, shape.num_ranks), -(2**63) + 3, dtype=torch.int64)
    return rows, sent_as, layout, torch.zeros(shape.per_rank, dtype=torch.int32)


def check_batch(x: torch.Tensor, ids: torch.Tensor, ids_dtype: torch.dtype, messages: int, num_experts: int, max_top_k: int) -> None:
    """What both libraries assert of a dispatch."""
    require(x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16, f"x is {x.dtype} {tuple(x.shape)}")
    require(x.size(1) in HIDDEN, f"no kernel for hidden {x.size(1)}")
    require(ids.dim() == 2 and ids.is_contiguous() and ids.dtype == ids_dtype, f"topk_idx is {ids.dtype} {tuple(ids.shape)}")
    require(x.size(0) == ids.size(0) <= messages < 1024, f"{x.size(0)} tokens, {ids.size(0)} ids, room for {messages}")
    require(0 < ids.size(1) <= max_top_k, f"top-{ids.size(1)}")
    require(not ids.numel() or (int(ids.min()) >= -1 and int(ids.max()) < num_experts), "an expert that does not exist")


def check_combine(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, shape: Shape) -> None:
    """What both libraries assert of a combine."""
    require(x.dtype == torch.bfloat16 and x.is_contiguous(), f"x is {x.dtype}")
    require(tuple(x.shape) == (shape.per_rank, shape.width, shape.hidden), f"x is {tuple(x.shape)}")
    require(weights.dtype == torch.float32 and weights.is_contiguous() and weights.shape == ids.shape, f"topk_weights is {weights.dtype}")
