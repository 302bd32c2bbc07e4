"""What the adapters of kernel-masked libraries share: this project's dispatch and combine over a library that masks a late rank by itself.

The library's kernels wait for each rank up to a timeout, then drop it and go on with what they have. So after every call its mask is
compared with the epoch's; a rank that is newly dropped makes the call a `PeerFailed`, and nothing of the step is kept.

The library has no epochs and two buffers that alternate call by call, each cleared one call before it is used again. Three rules keep
what a void step left there from being taken for rows of a later one:

1. Every dispatch is followed by its combine. When the step is void, one that talks to nobody.
2. Before a new epoch all its ranks meet; whoever is there has no call under way.
3. Each rank then runs one pair with everybody else masked, which clears both its buffers, and they meet again before the first row is sent.

What a rank writes that is neither dead nor in the epoch (stopped, then awake again; cut off, then back) lands in buffers of today. Mooncake
EP makes new connections at each change, which ends that over RDMA; NIXL EP does not. Kill such a rank before the next epoch.

Each call waits for the device twice and copies counts to the host, as the protocol hands out `groups` as numbers.
"""

from __future__ import annotations

import abc
import select
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.integrations.packed import BrokenSourceError, PackedCapacity, Sums, number_experts, unpack
from elastic_ep.integrations.rendezvous import Rendezvous, open_store
from elastic_ep.runtime.dispatch.base import DispatchHandle, FailureKind, Interrupted, PeerFailed, StepPoint
from elastic_ep.runtime.dispatch.checks import check_combine, checked_ids

_SPIN_S = 0.002


class Packed(NamedTuple):
    """What a library's dispatch returned.

    Attributes:
        rows: bfloat16 [experts_per_rank, ep_size * messages, H].
        layout: int64 [experts_per_rank, ep_size]; sent_as: int32 [experts_per_rank, ep_size * messages]; see `unpack`.
        handle: for the library's combine.
    """

    rows: torch.Tensor
    layout: torch.Tensor
    sent_as: torch.Tensor
    handle: Any


@dataclass(frozen=True)
class _State:
    packed: Packed
    physical: torch.Tensor
    weights: torch.Tensor
    order: torch.Tensor


class KernelMaskedDispatcher(abc.ABC):
    """One rank's end; a `MeshDispatcher`. Not thread-safe, but for `cut`. All tensors on `device`, rows in bfloat16.

    Args:
        store: a `torch.distributed.Store` that outlives every rank, or "tcp:HOST:PORT" of one.
        timeout_us: how long a kernel waits for a rank. The only thing that ends the wait for a stopped one.
        interrupt: readable when a step is to be given up; see `Interrupted`.
        stream: for tests: what gives the stream that kernels run on.
    """

    kind: str
    HIDDEN: tuple[int, ...]
    MAX_TOP_K: int

    def __init__(
        self,
        rank: int,
        capacity: PackedCapacity,
        store: Any,
        *,
        device: torch.device | str = "cuda",
        timeout_us: int = 10_000_000,
        interrupt: socket.socket | int | None = None,
        stream: Callable[[], Any] | None = None,
    ):
        if not 0 <= rank < capacity.ep_size:
            raise InvalidInputError(f"rank {rank} has no seat among {capacity.ep_size}; give a larger ep_size")
        if capacity.hidden not in self.HIDDEN:
            raise InvalidInputError(
                f"{self.kind} has no kernels for rows of {capacity.hidden}, only of {', '.join(map(str, self.HIDDEN))}; use another backend"
            )
        if capacity.top_k > self.MAX_TOP_K:
            raise InvalidInputError(f"{self.kind} sends a token to {self.MAX_TOP_K} experts at most, not {capacity.top_k}; use another")
        if not 0 < timeout_us < 1 << 31:
            raise InvalidInputError(f"timeout_us is {timeout_us}; give 1 to {(1 << 31) - 1}")
        self.rank = rank
        self.capacity = capacity
        self.device = torch.device(device)
        self.timeout_us = timeout_us
        self.store = store
        self._interrupt = select.poll()
        if interrupt is not None:
            self._interrupt.register(interrupt, select.POLLIN)
        self._stream = stream or self._own_stream
        self._rendezvous: Rendezvous | None = None
        self._mask = np.zeros(capacity.ep_size, dtype=np.int32)
        self._cut: set[int] = set()
        self._void: PeerFailed | Interrupted | None = Interrupted()
        self._pending: _State | None = None
        self._last = StepPoint(-1, -1, -1)
        self._routing: RoutingTable | None = None
        self._numbers: dict[int, NDArray[np.int32]] = {}
        self._outputs: torch.Tensor | None = None

    # ---- what a library's file supplies

    @abc.abstractmethod
    def _load(self) -> None:
        """Import the library. Raises InvalidInputError with the cure."""

    @abc.abstractmethod
    def _enrol(self, others: Mapping[int, str], deadline: float) -> dict[int, FailureKind]:
        """Make the library's membership this rank and the others, all of whom are in this call now. Returns those who could not be had."""

    @abc.abstractmethod
    def _install(self, mask: NDArray[np.int32]) -> None:
        """Write the library's mask. int32 [ep_size], 1 = alive."""

    @abc.abstractmethod
    def _observed(self) -> NDArray[np.int32]:
        """The library's mask as its kernels left it. int32 [ep_size], 1 = alive."""

    @abc.abstractmethod
    def _release(self, ranks: Iterable[int]) -> None:
        """End the waits of running kernels for these ranks, if the library can. Called from any thread."""

    @abc.abstractmethod
    def _run_dispatch(self, x: torch.Tensor, physical: torch.Tensor) -> Packed:
        """Enqueue a dispatch. x bfloat16 [messages at most, H], physical int64 [*, K]."""

    @abc.abstractmethod
    def _run_combine(self, outputs: torch.Tensor, physical: torch.Tensor, weights: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Enqueue the combine of a dispatch. outputs as packed.rows, weights float32 [*, K]. Returns bfloat16 [*, H]."""

    @abc.abstractmethod
    def _destroy(self) -> None:
        """Free what the library holds."""

    # ---- membership

    @property
    def address(self) -> str:
        """What peers name; known once `listen` was called."""
        assert self._rendezvous is not None, "listen comes first"
        return self._rendezvous.address

    def listen(self) -> str:
        """Load the library, reach the store, and return the address to announce. Raises InvalidInputError."""
        if self._rendezvous is None:
            self._load()
            if isinstance(self.store, str):
                self.store = open_store(self.store)
            self._rendezvous = Rendezvous(self.store, self.kind, self.rank, repr(self.capacity))
        return self._rendezvous.address

    def connect(self, peers: Mapping[int, str], deadline_s: float, *, epoch: int = 0) -> PeerFailed | Interrupted | None:
        """See `Dispatcher.connect`. What the library itself waits for in between is bounded by its own timeouts."""
        deadline = time.monotonic() + deadline_s
        self.listen()
        others = {rank: address for rank, address in peers.items() if rank != self.rank}
        if strangers := sorted(r for r in others if not 0 <= r < self.capacity.ep_size):
            raise InvalidInputError(f"no seats for ranks {strangers} among {self.capacity.ep_size}; give a larger ep_size")
        if (named := peers.get(self.rank, self.address)) != self.address:
            raise InvalidInputError(f"rank {self.rank} is {self.address}, the peers name {named}; give each rank its own process")
        self._void = Interrupted()
        self._end_pair()
        if (outcome := self._meet("quiet", others, deadline)) is not None:
            return outcome
        failed = self._enrol(others, deadline)
        if failed:
            return PeerFailed(failed)
        self._clear_buffers()
        if (outcome := self._meet("clear", others, deadline)) is not None:
            return outcome
        self._mask[:] = 0
        self._mask[[self.rank, *others]] = 1
        self._cut.clear()
        self._install(self._mask)
        self._finish()
        self._void = None
        return None

    def _meet(self, place: str, others: Mapping[int, str], deadline: float) -> PeerFailed | Interrupted | None:
        assert self._rendezvous is not None
        missing = self._rendezvous.meet(place, others, deadline, self._is_interrupted)
        if missing is None:
            return Interrupted()
        return PeerFailed(dict.fromkeys(sorted(missing), FailureKind.DEADLINE)) if missing else None

    def cut(self, rank: int) -> None:
        """A rank is known to be dead: no call of this epoch waits for it any more, and the next to end names it. Safe from any thread."""
        self._cut.add(rank)
        self._release([rank])

    def close(self) -> None:
        """Free what the library holds. Peers notice at their timeout."""
        if self._rendezvous is not None:
            self._rendezvous = None
            self._destroy()

    def __enter__(self) -> Any:
        self.listen()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- the two exchanges

    def dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint
    ) -> DispatchHandle | PeerFailed | Interrupted:
        """See `Dispatcher.dispatch`. Raises InvalidInputError for input that cannot be served; `at` must grow from call to call."""
        if isinstance(self._void, PeerFailed):
            return self._void
        self._check(x, topk_ids, topk_weights, routing, at)
        numbers = self._numbers_of(routing, at.layer)
        physical = self._physical(topk_ids, routing, at, numbers)
        self._last = at
        if self.capacity.sums is Sums.OWN:
            x, physical = x.repeat_interleave(physical.shape[1], 0), physical.reshape(-1, 1)
        ids = torch.from_numpy(physical).to(self.device)
        packed = self._run_dispatch(x, ids)
        self._pending = _State(packed, ids, topk_weights, ids)
        if (outcome := self._settle()) is not None:
            return self._give_up(outcome)
        mine = np.flatnonzero(numbers[self.rank] >= 0)
        try:
            found = unpack(packed.layout.cpu().numpy(), packed.sent_as.cpu().numpy(), mine, self.capacity.messages)
        except BrokenSourceError as error:
            return self._give_up(PeerFailed({error.rank: FailureKind.PROTOCOL}))
        order = torch.from_numpy(found.order).to(self.device)
        rows = packed.rows.view(-1, self.capacity.hidden).index_select(0, order)
        self._pending = _State(packed, ids, topk_weights, order)
        return DispatchHandle(rows, found.groups, self._pending)

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> torch.Tensor | PeerFailed | Interrupted:
        """See `Dispatcher.combine`, and `Sums` for who adds up. A failure leaves no partial result."""
        state: _State = handle.state
        if state is not self._pending:
            raise InvalidInputError("combine takes the handle of the last dispatch, once")
        outputs = self._output_buffer()
        outputs.view(-1, self.capacity.hidden).index_copy_(0, state.order, check_combine(y, handle))
        self._pending = None
        weights = state.weights.to(torch.float32).contiguous()
        if self.capacity.sums is Sums.OWN:
            alone = torch.ones(weights.numel(), 1, dtype=torch.float32, device=self.device)
            brought = self._run_combine(outputs, state.physical, alone, state.packed)
        else:
            brought = self._run_combine(outputs, state.physical, weights, state.packed)
        if (outcome := self._settle()) is not None:
            return self._give_up(outcome)
        return _sum_in_order(brought, weights) if self.capacity.sums is Sums.OWN else brought

    def _check(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint) -> None:
        """Everything that can be wrong with a batch but its ids. Raises InvalidInputError."""
        limit, shape, ids_shape = self.capacity, tuple(x.shape), tuple(topk_ids.shape)
        if self._void is not None:
            raise InvalidInputError("the last step was void, or there was none; connect the epoch's peers first")
        if self._pending is not None:
            raise InvalidInputError("a dispatch follows the combine of the one before it, or a connect")
        if len(shape) != 2 or shape[1] != limit.hidden or x.dtype != torch.bfloat16 or x.device.type != self.device.type:
            raise InvalidInputError(f"x is {x.dtype} {list(shape)} on {x.device}; give bfloat16 [T, {limit.hidden}] on {self.device}")
        if not x.is_contiguous():
            raise InvalidInputError("x is not contiguous; give x.contiguous()")
        if len(ids_shape) != 2 or ids_shape[0] != shape[0] or ids_shape != tuple(topk_weights.shape) or not ids_shape[1]:
            raise InvalidInputError(
                f"topk_ids {list(ids_shape)} and topk_weights {list(topk_weights.shape)} must be [T, K], T = {shape[0]}, K at least 1"
            )
        if shape[0] > limit.max_tokens or ids_shape[1] > limit.top_k:
            raise InvalidInputError(
                f"{shape[0]} tokens, top-{ids_shape[1]} exceed the buffers for {limit.max_tokens} and {limit.top_k}; give a larger capacity"
            )
        if at.epoch != routing.epoch:
            raise InvalidInputError(f"the step is of epoch {at.epoch}, its routing table of epoch {routing.epoch}; install the epoch first")
        if not 0 <= at.layer < len(routing.replica_rank):
            raise InvalidInputError(f"MoE layer {at.layer} is not in the routing table, which has {len(routing.replica_rank)} layers")
        if at <= self._last:
            raise InvalidInputError(f"{tuple(at)} does not come after {tuple(self._last)}; points must grow from call to call")

    def _numbers_of(self, routing: RoutingTable, layer: int) -> NDArray[np.int32]:
        if routing is not self._routing:
            self._routing, self._numbers = routing, {}
        if layer not in self._numbers:
            numbers = number_experts(routing.replica_rank[layer], self.capacity.ep_size)
            most = int(numbers.max(initial=-1)) + 1
            if most > self.capacity.experts_per_rank:
                rank = int(numbers.max(axis=1).argmax())
                raise InvalidInputError(
                    f"rank {rank} serves {most} experts in MoE layer {layer}, the buffers were made for {self.capacity.experts_per_rank} "
                    f"per rank; give a larger experts_per_rank"
                )
            self._numbers[layer] = numbers
        return self._numbers[layer]

    def _physical(self, topk_ids: torch.Tensor, routing: RoutingTable, at: StepPoint, numbers: NDArray[np.int32]) -> NDArray[np.int64]:
        """int64 [T, K]: the library's number of the replica that serves each pair. Raises InvalidInputError."""
        ids = checked_ids(topk_ids.cpu(), routing.replica_rank.shape[1])
        served_by = routing.destination_ranks(at.layer, ids, self.rank, at.step)
        reachable = np.append(self._mask, 0)
        wrong = reachable[np.where((served_by < 0) | (served_by >= len(self._mask)), len(self._mask), served_by)] == 0
        if wrong.any():
            expert, rank = int(ids[wrong][0]), int(served_by[wrong][0])
            raise InvalidInputError(
                f"expert {expert} is served by rank {rank}, the mesh has ranks {np.flatnonzero(self._mask).tolist()}; "
                f"install a routing table in which every expert has a live replica"
            )
        physical: NDArray[np.int64] = served_by.astype(np.int64) * self.capacity.experts_per_rank + numbers[served_by, ids]
        if physical.size and np.bincount(physical.reshape(-1)).max() > self.capacity.messages:
            raise InvalidInputError(f"tokens name an expert twice: over {self.capacity.messages} rows for one; give distinct topk_ids")
        return physical

    # ---- waiting, and what is left of a void step

    def _settle(self) -> PeerFailed | Interrupted | None:
        """Wait for the kernels, and look whom they dropped."""
        if self._wait():
            return Interrupted()
        missing = self._observed() == 0
        missing[list(self._cut)] = True
        dropped = np.flatnonzero((self._mask == 1) & missing).tolist()
        if not dropped:
            return None
        return PeerFailed({rank: FailureKind.CLOSED if rank in self._cut else FailureKind.DEADLINE for rank in dropped})

    def _wait(self) -> bool:
        """Until all that was enqueued is done, which the kernels' timeout bounds. Returns True if the interrupt fired meanwhile."""
        stream, began, interrupted = self._stream(), time.monotonic(), False
        while not stream.query():
            if interrupted:
                time.sleep(1e-4)
            elif self._interrupt.poll(0 if time.monotonic() - began < _SPIN_S else 1):
                interrupted = True
                self._release(r for r in range(self.capacity.ep_size) if r != self.rank)
        return interrupted

    def _finish(self) -> None:
        """Wait for what needs nobody else."""
        stream = self._stream()
        while not stream.query():
            time.sleep(1e-4)

    def _is_interrupted(self) -> bool:
        return bool(self._interrupt.poll(0))

    def _own_stream(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def _give_up(self, outcome: PeerFailed | Interrupted) -> PeerFailed | Interrupted:
        self._void = outcome
        self._end_pair()
        left = self._mask.copy()
        if isinstance(outcome, PeerFailed):
            left[list(outcome.peers)] = 0
        self._install(left)
        self._finish()
        return outcome

    def _end_pair(self) -> None:
        """Rule 1: the combine of a dispatch that nobody will combine."""
        state, self._pending = self._pending, None
        if state is not None:
            self._mask_others()
            weights = torch.zeros(state.physical.shape, dtype=torch.float32, device=self.device)
            self._run_combine(self._output_buffer(), state.physical, weights, state.packed)
            self._finish()

    def _clear_buffers(self) -> None:
        """Rule 3: a pair with nobody else. As wide as the real ones, since Mooncake compiles its kernels when they are first asked for."""
        self._mask_others()
        none = torch.empty((0, self.capacity.hidden), dtype=torch.bfloat16, device=self.device)
        width = self.capacity.top_k // self.capacity.messages_per_token
        ids = torch.empty((0, width), dtype=torch.int64, device=self.device)
        weights = torch.empty((0, width), dtype=torch.float32, device=self.device)
        packed = self._run_dispatch(none, ids)
        self._run_combine(self._output_buffer(), ids, weights, packed)
        self._finish()

    def _mask_others(self) -> None:
        alone = np.zeros_like(self._mask)
        alone[self.rank] = 1
        self._install(alone)

    def _output_buffer(self) -> torch.Tensor:
        """bfloat16 [experts_per_rank, ep_size * messages, H]; rows that no expert wrote are never read by anyone."""
        if self._outputs is None:
            limit = self.capacity
            shape = (limit.experts_per_rank, limit.ep_size * limit.messages, limit.hidden)
            self._outputs = torch.zeros(shape, dtype=torch.bfloat16, device=self.device)
        return self._outputs


def _sum_in_order(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As `Dispatcher.combine` defines it; each product and each sum is rounded to float32. outputs [T * K, H], weights float32 [T, K]."""
    tokens, top_k = weights.shape
    parts = outputs.view(tokens, top_k, outputs.shape[1])
    total = weights[:, 0, None] * parts[:, 0].float()
    for k in range(1, top_k):
        total = total + weights[:, k, None] * parts[:, k].float()
    return total.to(outputs.dtype)
