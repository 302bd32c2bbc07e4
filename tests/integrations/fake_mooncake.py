"""Mooncake as the adapter loads it: its process group with fixed seats and a coordinator, and EP's `Buffer` (0.3.14), for threads."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from tests.integrations.fake_fabric import Fabric, Kernels, Memory, Shape, Stream, check_batch, check_combine, garbage, require

MAX_TOP_K = 11
COLLECTIVE_S = 10.0


class Cluster:
    """The coordinator and the wires. A collective needs every active member, and fails for all when one does not come."""

    def __init__(self, num_ranks: int, seed: int = 0):
        self.num_ranks = num_ranks
        self.fabric = Fabric(seed)
        self.changed = threading.Condition()
        self.active: set[int] = set()
        self.ready: set[int] = set()
        self.epoch = 0
        self.memories: dict[int, Memory] = {}
        self.collective_s = COLLECTIVE_S
        self._arrived: dict[tuple[str, int], set[int]] = {}

    def gather(self, what: str, rank: int, members: set[int]) -> None:
        """Until all members are here."""
        with self.changed:
            key = (what, self.epoch)
            self._arrived.setdefault(key, set()).add(rank)
            self.changed.notify_all()
            deadline = time.monotonic() + self.collective_s
            while not self._arrived[key] >= members:
                if not self.changed.wait(deadline - time.monotonic()):
                    raise RuntimeError(f"{what}: only {sorted(self._arrived[key])} of {sorted(members)} came")


class Options:
    def __init__(self, max_group_size: int, is_extension: bool = False):
        self.max_group_size, self.is_extension = max_group_size, is_extension


class Group:
    """What `torch.distributed.group.WORLD` is in one process."""

    def __init__(self, cluster: Cluster, rank: int, joining: bool):
        self.cluster, self.number, self.joining = cluster, rank, joining

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.cluster.num_ranks


class Pg:
    """The functions of `mooncake.pg`."""

    MooncakeBackendOptions = Options

    def __init__(self, library: FakeMooncake):
        self._library = library
        self.device_filter: list[str] | None = None

    def set_device_filter(self, names: list[str]) -> None:
        require(self._library.group is None, "set_device_filter comes before init_process_group")
        self.device_filter = names

    def join_group(self, group: Group) -> None:
        cluster = group.cluster
        with cluster.changed:
            require(group.joining, "join_group is for a process that joins")
            cluster.ready.add(group.number)
            cluster.changed.notify_all()
            while group.number not in cluster.active:
                require(cluster.changed.wait(COLLECTIVE_S), "nobody activated the joining rank")
            group.joining = False

    def get_peer_state(self, group: Group, ranks: list[int]) -> list[bool]:
        with group.cluster.changed:
            return [rank in group.cluster.ready for rank in ranks]

    def recover_ranks(self, group: Group, ranks: list[int]) -> None:
        cluster = group.cluster
        with cluster.changed:
            require(group.number in cluster.active, "recover_ranks is proposed by an online rank")
            require(cluster.ready >= set(ranks), f"ranks {ranks} are not ready")
            if not cluster.active >= set(ranks):
                cluster.active |= set(ranks)
                cluster.epoch += 1
                cluster.changed.notify_all()

    def deactivate_ranks(self, group: Group, ranks: list[int]) -> None:
        cluster = group.cluster
        with cluster.changed:
            require(group.number in cluster.active - set(ranks), "deactivate_ranks is proposed by an online rank, for others")
            if cluster.active & set(ranks):
                cluster.active -= set(ranks)
                cluster.ready -= set(ranks)
                cluster.epoch += 1


class FakeMooncake:
    """One process's library."""

    def __init__(self, cluster: Cluster, stream: Stream, fallback: bool = False):
        self.cluster, self.stream, self.fallback = cluster, stream, fallback
        self.group: Group | None = None
        self.pg = Pg(self)
        self.buffers: list[FakeBuffer] = []

        def make_buffer(group: Group, num_ep_buffer_bytes: int = 0) -> FakeBuffer:
            self.buffers.append(FakeBuffer(self, group, num_ep_buffer_bytes))
            return self.buffers[-1]

        make_buffer.get_ep_buffer_size_hint = size_hint  # type: ignore[attr-defined]
        self.Buffer = make_buffer

    def world(self) -> Group | None:
        return self.group

    def init_process_group(self, *, backend: str, store: Any, rank: int, world_size: int, pg_options: Options | None = None) -> None:
        require(self.group is None, "one process group per process")
        require(backend == "mooncake" or world_size == 1, f"{backend} is no group for several ranks")
        pg_options = pg_options or Options(1)
        require(world_size == self.cluster.num_ranks <= pg_options.max_group_size, f"{world_size} of {pg_options.max_group_size} seats")
        if not pg_options.is_extension:
            with self.cluster.changed:
                self.cluster.active.add(rank)
            self.cluster.gather("init", rank, set(range(world_size)))
        self.group = Group(self.cluster, rank, pg_options.is_extension)

    def destroy_process_group(self) -> None:
        require(self.group is not None, "there is no process group")
        self.group = None


def size_hint(messages: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Four times signals and data, as the two halves need for sending and receiving."""
    require(num_experts % num_ranks == 0, f"{num_experts} experts over {num_ranks} ranks")
    return 4 * num_experts * (4 + messages * (32 + 2 * hidden))


class FakeBuffer:
    def __init__(self, library: FakeMooncake, group: Group, num_bytes: int):
        require(group.size() <= 256, f"{group.size()} ranks for 256 queue pairs")
        self._cluster, self._group, self._stream, self.num_bytes = group.cluster, group, library.stream, num_bytes
        self._use_fallback = library.fallback
        self._memory: Memory | None = None
        self._peers: dict[int, Memory] = {}
        self._epoch = -1
        self._open: tuple[Any, ...] | None = None
        if not group.joining:
            self._join_peers("Buffer")

    def update_ep_member(self) -> None:
        require(not self._group.joining, "update_ep_member comes after join_group")
        require(self._epoch != self._cluster.epoch, "no change of members since the last update_ep_member")
        self._join_peers("update_ep_member")

    def _join_peers(self, what: str) -> None:
        cluster, me = self._cluster, self._group.number
        if self._memory is None:
            self._memory = Memory(me, 4096)
        else:
            # connections of before do not reach it any more; what lies there stays
            moved = Memory(me, 4096)
            moved.halves, moved.index = self._memory.halves, self._memory.index
            self._memory.halves = [type(h)(h.signals.copy()) for h in moved.halves]
            self._memory = moved
        with cluster.changed:
            cluster.memories[me] = self._memory
            members = set(cluster.active)
        cluster.gather(what, me, members)
        self._peers = {r: cluster.memories[r] for r in members if r != me}
        self._epoch = cluster.epoch

    def _kernels(self, active_ranks: torch.Tensor, timeout_us: int) -> Kernels:
        require(active_ranks.dtype == torch.int32 and tuple(active_ranks.shape) == (self._group.size(),), f"active_ranks {active_ranks}")
        require(active_ranks[self._group.number] == 1, "a rank does not mask itself")
        require(0 < timeout_us < 2**31, f"timeout_us {timeout_us} never ends, or overflows")
        require(self._epoch == self._cluster.epoch, "members changed: update_ep_member comes before the next call")
        require(self._memory is not None, "join_group comes before the first call")
        assert self._memory is not None

        def drop(rank: int) -> None:
            active_ranks[rank] = 0

        return Kernels(self._cluster.fabric, self._memory, self._peers, lambda r: bool(active_ranks[r]), drop, timeout_us / 1e6, heeds=True)

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        active_ranks: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        timeout_us: int,
        use_fp8: bool = True,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...], None, None]:
        require(not use_fp8 and not async_finish and not return_recv_hook, "the fake has bfloat16 in stream order only")
        require(self._open is None, "the combine of the last dispatch is missing: the halves are out of step")
        check_batch(x, topk_idx, torch.int64, num_max_dispatch_tokens_per_rank, num_experts, MAX_TOP_K)
        shape = Shape(num_max_dispatch_tokens_per_rank, x.size(1), num_experts, self._group.size())
        require(size_hint(shape.messages, shape.hidden, shape.num_ranks, num_experts) <= self.num_bytes, "the buffer is too small")
        self._cluster.fabric.agree(shape)
        kernels = self._kernels(active_ranks, timeout_us)
        named = topk_idx[topk_idx >= 0] // shape.per_rank
        members = {self._group.number, *self._peers}
        require(set(named.tolist()) <= members, f"experts of ranks {sorted(set(named.tolist()))}, members {members}")
        rows, sent_as, layout, count = garbage(shape)
        self._open = (sent_as, layout, shape.messages, shape.hidden, num_experts)
        self._stream.enqueue(lambda: kernels.dispatch(shape, x, topk_idx, rows, sent_as, layout, count))
        return rows, count, self._open, None, None

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        active_ranks: torch.Tensor,
        timeout_us: int,
        handle: tuple[Any, ...],
    ) -> tuple[torch.Tensor, None, None]:
        require(handle is self._open, "combine takes the handle of the last dispatch")
        self._open = None
        shape = self._cluster.fabric.shape
        assert shape is not None
        check_combine(x, topk_idx, topk_weights, shape)
        kernels = self._kernels(active_ranks, timeout_us)
        out = torch.full((len(topk_weights), shape.hidden), float("nan"), dtype=torch.bfloat16)
        self._stream.enqueue(lambda: kernels.combine(shape, x, topk_idx, topk_weights, handle, out))
        return out, None, None
