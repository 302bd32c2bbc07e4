"""The cuda backend: ranks on the GPUs of one node (several per GPU allowed), rows moved by kernels, no host in the loop.

Two ways to call it. `dispatch` and `combine` are the protocol's: they return once the kernels have ended, with what came of them. The hot
path is `begin_step`, then `enqueue_dispatch` and `enqueue_combine` for each layer: they never wait for the device and may be captured in
a CUDA graph (all but `begin_step`, which goes before each replay); after the step's last kernel `wait` or `outcome` says whether it holds.
A failed peer makes the remaining kernels of a step do nothing, and stays failed until the next `connect`.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.routing import RoutingTable, sequence_phases
from elastic_ep.runtime.dispatch.base import DispatchHandle, Interrupted, PeerFailed, StepPoint
from elastic_ep.runtime.dispatch.checks import DTYPES, check_combine, checked_ids
from elastic_ep.runtime.dispatch.cuda.bindings import MOVE, PUBLISH, WAIT, Args, Library, load_library
from elastic_ep.runtime.dispatch.cuda.handle import CudaHandle, DeviceBatch
from elastic_ep.runtime.dispatch.cuda.peers import HostWords, Peers, Watch
from elastic_ep.runtime.dispatch.cuda.region import Capacity, Hello, Layout, as_tensor
from elastic_ep.runtime.dispatch.cuda.tables import DeviceTables
from elastic_ep.runtime.dispatch.grouping import plan_departure
from elastic_ep.runtime.dispatch.mesh import Mesh

_WARPS = 8
_BLOCKS_PER_SM = 4
"""so many of a dispatch run at once (launch bounds in dispatch.cuh)"""
_SHARED_BLOCKS_PER_SM = 1
"""of one rank among several: each block plans anew, so fewer, longer ones; measured beside 2 and 4 with four ranks"""
_MAX_EPOCH = 1 << 20
_MAX_STEP = 1 << 32


class _Memory(NamedTuple):
    """What the kernels of one rank use on its device."""

    region: int
    x: torch.Tensor
    rows: torch.Tensor
    outputs: torch.Tensor
    words: torch.Tensor
    """int64: epoch, step, voided, ticket"""
    base: torch.Tensor
    active: torch.Tensor
    offsets: torch.Tensor
    origin: torch.Tensor


def _allocate(library: Library, capacity: Capacity, layout: Layout, device: torch.device) -> _Memory:
    size, seats = capacity.rows * capacity.row_bytes, capacity.num_seats
    region = library.alloc(layout.num_bytes)

    def ints(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(count, dtype=dtype, device=device)

    return _Memory(
        region=region,
        x=as_tensor(region + layout.x_at, capacity.max_tokens * capacity.row_bytes, device),
        rows=torch.empty(size, dtype=torch.uint8, device=device),
        outputs=as_tensor(region + layout.y_at, size, device),
        words=ints(4, torch.int64),
        base=ints(seats, torch.int64),
        active=ints(seats),
        offsets=ints(capacity.num_experts + 1),
        origin=ints(seats * capacity.num_experts),
    )


class CudaDispatcher:
    """One rank's end. Not thread-safe. Kernels run on the caller's current device and stream, which must not change in a step.

    Args:
        rank: this rank's seat; listen_address, token, interrupt, deadline_s, grace_s: as for `SocketDispatcher`. The deadline also holds
            inside the kernels, by the GPU's clock.
        capacity: the largest batch; alike on all ranks.
        device: the GPU; several ranks may share one.
        cache: folder for the compiled kernels; None: `.cache/elastic-ep` in the home folder.
        split: move rows in a kernel of its own, after one of which a single block waits; None: once ranks share the GPU. Large batches
            always run so.
        shares: whether ranks are taken to share the GPU before the first `connect` tells.
    """

    def __init__(
        self,
        rank: int,
        listen_address: str,
        capacity: Capacity,
        *,
        token: str,
        device: int = 0,
        interrupt: socket.socket | int | None = None,
        deadline_s: float = 10.0,
        grace_s: float = 0.005,
        cache: Path | None = None,
        split: bool | None = None,
        shares: bool = False,
    ):
        if not 0 <= rank < capacity.num_seats:
            raise InvalidInputError(f"rank {rank} has no seat among {capacity.num_seats}; give Capacity a larger num_seats")
        self.rank = rank
        self.capacity = capacity
        self.device = torch.device("cuda", device)
        self._interrupt_fd = interrupt.fileno() if isinstance(interrupt, socket.socket) else interrupt
        self._mesh = Mesh(rank, listen_address, token, self._interrupt_fd, 1, 0)
        self._limits_ns = int(deadline_s * 1e9), int(grace_s * 1e9)
        self._cache = cache
        self._forced_split = split
        self._split = shares if split is None else split
        self._active: list[int] = []
        self._routing: RoutingTable | None = None
        self._last = StepPoint(-1, -1, -1)
        self._started = False

    # ---- membership

    @property
    def address(self) -> str:
        """What peers dial; final once `listen` was called."""
        return self._mesh.address

    def listen(self) -> str:
        """Start listening (once) and return the address to announce. Raises InvalidInputError."""
        return self._mesh.listen()

    def start(self) -> None:
        """Compile or load the kernels and allocate all device memory, once. Raises InvalidInputError, CudaCallError."""
        if self._started:
            return
        if not torch.cuda.is_available():
            raise InvalidInputError("the cuda dispatch backend needs a GPU and torch sees none; use the socket backend")
        capacity = self.capacity
        with torch.cuda.device(self.device):
            cache = self._cache if self._cache is not None else Path.home() / ".cache" / "elastic-ep"
            self._library: Library = load_library(torch.cuda.get_device_capability(self.device), cache)
            self._layout = Layout.of(capacity)
            self._memory = _allocate(self._library, capacity, self._layout, self.device)
            self._tables = DeviceTables(capacity, self.device)
            self._words = HostWords(self._library, capacity.num_seats)
            hello = Hello.of(self._library, capacity, self._memory.region, self.device)
            self._peers = Peers(self._library, self._mesh, hello, self._interrupt_fd)
            self._watch = Watch(self._mesh, self._words, self._interrupt_fd)
            self._num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
            self._args = self._constant_args()
            self._library.prepare(self._args, self._stream())
            torch.cuda.synchronize(self.device)
        self._started = True

    def _constant_args(self) -> Args:
        memory, words, layout = self._memory, self._memory.words.data_ptr(), self._layout
        stride, _, source_phase = sequence_phases(self.rank, 0)
        return Args(
            region=memory.region,
            base=memory.base.data_ptr(),
            active=memory.active.data_ptr(),
            cut=self._words.cut_at,
            failed=self._words.failed_at,
            clock=words,
            voided=words + 16,
            ticket=words + 24,
            rows=memory.rows.data_ptr(),
            offsets=memory.offsets.data_ptr(),
            origin=memory.origin.data_ptr(),
            stride=stride,
            step_phase=sequence_phases(0, 1)[1],
            source_phase=source_phase,
            pairs_at=layout.pairs_at,
            counts_at=layout.counts_at,
            x_at=layout.x_at,
            y_at=layout.y_at,
            deadline_ns=self._limits_ns[0],
            grace_ns=self._limits_ns[1],
            ranks=self.capacity.num_seats,
            me=self.rank,
            experts=self.capacity.num_experts,
            replicas=self.capacity.max_replicas,
            max_tokens=self.capacity.max_tokens,
            tokens=self.capacity.max_tokens,
            top_k=self.capacity.top_k,
        )

    def connect(self, peers: Mapping[int, str], deadline_s: float, *, epoch: int = 0) -> PeerFailed | Interrupted | None:
        """See `Dispatcher.connect`. No step may be under way here. The mask that kernels read is this set of ranks."""
        if max(peers, default=0) >= self.capacity.num_seats:
            raise InvalidInputError(f"rank {max(peers)} has no seat among {self.capacity.num_seats}; give Capacity a larger num_seats")
        self.start()
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().synchronize()
            outcome = self._mesh.connect(peers, deadline_s)
            if outcome is None:
                outcome = self._peers.introduce(deadline_s)
            if outcome is None:
                self._install(self._peers.regions)
        return outcome

    def _install(self, regions: dict[int, int]) -> None:
        """Tell the kernels who is there, and forget the failures of the last epoch."""
        self._active = sorted({self.rank, *regions})
        base = np.zeros(self.capacity.num_seats, dtype=np.int64)
        active = np.zeros(self.capacity.num_seats, dtype=np.int32)
        for rank in self._active:
            base[rank] = regions.get(rank, self._memory.region)
            active[rank] = 1
        self._memory.base.copy_(torch.from_numpy(base))
        self._memory.active.copy_(torch.from_numpy(active))
        if self._forced_split is None:
            self._split = self._split or self._peers.ranks_on_this_gpu > 1  # and stays so: graphs were captured for it
        self._reset()

    def _reset(self) -> None:
        self._words.clear()
        self._memory.words[2:].zero_()

    def close(self) -> None:
        """Unmap, free, close every channel and the listener."""
        self._mesh.close()
        if self._started:
            self._started = False
            with torch.cuda.device(self.device):
                torch.cuda.synchronize(self.device)
                self._peers.close()
                self._words.close()
                self._library.free(self._memory.region)
                del self._memory, self._tables, self._args

    # ---- the hot path: nothing here waits for the device

    @property
    def is_split(self) -> bool:
        """Whether rows always move in a kernel of its own; a graph captured so replays in every epoch that is so, too."""
        return self._split

    def token_buffer(self, num_tokens: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        """[num_tokens, hidden] in this rank's region: an x that begins here is not copied. Free to write once a combine is enqueued."""
        return self._memory.x[: num_tokens * hidden * dtype.itemsize].view(dtype).view(num_tokens, hidden)

    def begin_step(self, routing: RoutingTable, epoch: int, step: int) -> None:
        """Set the point that kernels stamp their flags with; copy the epoch's table to the device if it is a new one.

        Points must grow. Raises InvalidInputError.
        """
        if epoch != routing.epoch:
            raise InvalidInputError(f"the step is of epoch {epoch}, its routing table of epoch {routing.epoch}; install the epoch first")
        if not 0 <= epoch < _MAX_EPOCH or not 0 <= step < _MAX_STEP or (epoch, step) < self._last[:2]:
            raise InvalidInputError(
                f"epoch {epoch}, step {step} does not come after epoch {self._last.epoch}, step {self._last.step}, "
                f"or is beyond epoch {_MAX_EPOCH}, step {_MAX_STEP}"
            )
        if routing is not self._routing:
            self._tables.install(routing)
            self._routing = routing
        if (epoch, step) != self._last[:2]:
            self._library.set_clock(self._args.clock, epoch, step, self._stream())
            self._last = StepPoint(epoch, step, -1)

    def enqueue_dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer: int) -> CudaHandle:
        """As `dispatch`, at the step begun last. `handle.state` has the rows and where each expert's begin, on the device."""
        (tokens, hidden), top_k = x.shape, topk_ids.shape[1]
        weights = topk_weights.to(torch.float32).contiguous()
        ids = topk_ids.contiguous()
        if x.data_ptr() % 16:
            x = x.clone()
        args = self._args
        args.replica_rank, args.quota = self._tables.layer(layer)
        args.experts = self._tables.num_experts
        args.layer, args.tokens, args.top_k = layer, tokens, top_k
        args.row_bytes = hidden * x.element_size()
        args.capacity = self.capacity.rows
        args.x, args.ids = x.data_ptr(), ids.data_ptr()
        args.copy_x = int(x.data_ptr() != self._memory.x.data_ptr())
        per_sm = _SHARED_BLOCKS_PER_SM if self._split else _BLOCKS_PER_SM
        moving = max(1, min(per_sm * self._num_sms, self._num_active * max(tokens, 32)))
        publishing = max(1, min(self._num_sms, max(-(-args.experts // _WARPS), tokens * args.copy_x)))
        stream = self._stream()
        if self._waits_apart(tokens):
            self._library.dispatch(args, PUBLISH | WAIT, publishing, stream)
            self._library.dispatch(args, MOVE, moving, stream)
        else:
            self._library.dispatch(args, PUBLISH | WAIT | MOVE, moving, stream)
        return CudaHandle(
            DeviceBatch(
                rows=self._view(self._memory.rows, hidden, x.dtype),
                outputs=self._view(self._memory.outputs, hidden, x.dtype),
                offsets=self._memory.offsets[: args.experts + 1],
                layer=layer,
                x=x,
                topk_ids=ids,
                topk_weights=weights,
            )
        )

    def enqueue_combine(self, handle: CudaHandle) -> torch.Tensor:
        """As `combine`, of what the experts wrote to `handle.state.outputs`. Returns [T, H]; its bits hold once `outcome` says so."""
        batch = handle.state
        tokens, hidden = batch.x.shape
        out = torch.empty_like(batch.x)
        args = self._args
        args.layer, args.tokens, args.top_k = batch.layer, tokens, batch.topk_ids.shape[1]
        args.row_bytes = hidden * out.element_size()
        args.is_bf16 = int(out.dtype == torch.bfloat16)
        args.weights, args.out = batch.topk_weights.data_ptr(), out.data_ptr()
        vectors = args.row_bytes // 16 if args.row_bytes % 16 == 0 else hidden
        moving = max(1, min(_BLOCKS_PER_SM * self._num_sms, -(-tokens * -(-vectors // 32) // _WARPS)))
        stream = self._stream()
        if self._waits_apart(tokens):
            self._library.combine(args, PUBLISH | WAIT, 1, stream)
            if tokens:
                self._library.combine(args, MOVE, moving, stream)
        else:
            self._library.combine(args, PUBLISH | WAIT | MOVE, moving, stream)
        return out

    def outcome(self) -> PeerFailed | None:
        """What the kernels have recorded so far, read from pinned memory without waiting. Raises InvalidInputError for a bad batch."""
        return self._words.outcome()

    def cut(self, rank: int) -> None:
        """Tell running kernels that a peer is dead. Safe from any thread; for who hears of it otherwise than by its channel."""
        self._words.cut(rank)

    def wait(self) -> PeerFailed | Interrupted | None:
        """Wait for all that was enqueued on the current stream, then `outcome`; a channel that closes meanwhile ends the kernels' waits."""
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))
        if self._watch.wait(done):
            self._reset()
            return Interrupted()
        return self._words.outcome()

    def _waits_apart(self, tokens: int) -> bool:
        """Whether a single block waits, and rows move in a kernel of its own. More than one waiting block per multiprocessor was measured
        to be slow: 2.1 ms instead of 0.09 ms for 512 tokens of a rank alone."""
        return self._split or self._num_active * max(tokens, 32) > self._num_sms

    @property
    def _num_active(self) -> int:
        """Before the first `connect`: as if half the seats were taken."""
        return len(self._active) or -(-self.capacity.num_seats // 2)

    def _stream(self) -> int:
        stream: int = torch.cuda.current_stream(self.device).cuda_stream
        return stream

    def _view(self, memory: torch.Tensor, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        return memory[: self.capacity.rows * hidden * dtype.itemsize].view(dtype).view(self.capacity.rows, hidden)

    # ---- the protocol: the same, waited for

    def dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint
    ) -> DispatchHandle | PeerFailed | Interrupted:
        """See `Dispatcher.dispatch`; all tensors on this rank's GPU. Checks ids on the host and waits for the kernels."""
        self._check(x, topk_ids, topk_weights, routing, at)
        failed = self._words.outcome()
        if failed is not None:
            return failed
        self.begin_step(routing, at.epoch, at.step)
        self._last = at
        handle = self.enqueue_dispatch(x, topk_ids, topk_weights, at.layer)
        return self.wait() or handle

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> torch.Tensor | PeerFailed | Interrupted:
        """See `Dispatcher.combine`. `y` is copied unless it is `handle.state.outputs[:N]`."""
        assert isinstance(handle, CudaHandle)
        y = check_combine(y, handle)
        outputs = handle.state.outputs
        if y.data_ptr() != outputs.data_ptr():
            outputs[: len(y)].copy_(y)
        out = self.enqueue_combine(handle)
        outcome = self.wait()
        return out if outcome is None else outcome

    def _check(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint) -> None:
        """Everything that can be wrong with a batch, before a peer hears of it. Raises InvalidInputError."""
        limit = self.capacity
        shape = tuple(x.shape)
        if len(shape) != 2 or not shape[1] or x.dtype not in DTYPES or x.device != self.device or not x.is_contiguous():
            raise InvalidInputError(
                f"x is {x.dtype} {list(shape)} on {x.device}; give a contiguous [T, H] float32 or bfloat16 tensor on {self.device}"
            )
        if len(topk_ids.shape) != 2 or len(topk_ids) != shape[0] or topk_ids.shape != topk_weights.shape or not topk_ids.shape[1]:
            raise InvalidInputError(
                f"topk_ids {list(topk_ids.shape)} and topk_weights {list(topk_weights.shape)} must be [T, K], T = {shape[0]}, K at least 1"
            )
        if shape[0] > limit.max_tokens or topk_ids.shape[1] > limit.top_k or shape[1] * x.element_size() > limit.row_bytes:
            raise InvalidInputError(
                f"{shape[0]} tokens, top-{topk_ids.shape[1]}, rows of {shape[1] * x.element_size()} bytes exceed the buffers for "
                f"{limit.max_tokens}, {limit.top_k} and {limit.row_bytes}; give the cuda dispatch backend a larger Capacity"
            )
        if at.epoch != routing.epoch:
            raise InvalidInputError(f"the step is of epoch {at.epoch}, its routing table of epoch {routing.epoch}; install the epoch first")
        if not 0 <= at.layer < len(routing.replica_rank):
            raise InvalidInputError(
                f"MoE layer {at.layer} is not in the routing table, which has layers 0 to {len(routing.replica_rank) - 1}"
            )
        if at <= self._last:
            raise InvalidInputError(f"{at} does not come after {self._last}; points must grow from call to call")
        ids = checked_ids(topk_ids.cpu(), routing.replica_rank.shape[1])
        destination = routing.destination_ranks(at.layer, ids, self.rank, at.step)
        seats = max(self._active) + 1
        plan_departure(ids, np.where(np.isin(destination, self._active) | (destination >= seats), destination, -1), seats)
