"""The pure part of the kernel-masked adapters: numbering experts, ordering what arrived, capacities; and their stores and options."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np
import pytest
from torch.distributed import HashStore, TCPStore

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.integrations.mooncake import MooncakeDispatcher, parse_ib_devices
from elastic_ep.integrations.nixl import NixlDispatcher
from elastic_ep.integrations.packed import BrokenSourceError, PackedCapacity, Sums, number_experts, unpack
from elastic_ep.integrations.rendezvous import PeerStore, Rendezvous, open_store
from tests.dispatch.dispatch_world import run_ranks
from tests.integrations.fake_fabric import ContractError, Stream
from tests.integrations.fake_mooncake import Cluster, FakeMooncake
from tests.integrations.test_kernel_masked import connect, start
from tests.integrations.test_kernel_masked_faults import run_steps

CAPACITY = PackedCapacity(2, 4, 8, 4, 2048)


def test_experts_are_numbered_rank_by_rank() -> None:
    replica_rank = np.array([[0, -1], [1, -1], [0, 1], [1, 1]], dtype=np.int32)
    assert number_experts(replica_rank, 3).tolist() == [[0, -1, 1, -1], [-1, 0, 1, 2], [-1, -1, -1, -1]]


def test_rows_are_ordered_by_expert_source_and_token() -> None:
    # two experts, two sources, room for 4 messages from each; expert 0 has rank 1's tokens 5 and 2 before rank 0's token 3
    layout = np.array([[2 << 32 | 1, 0 << 32 | 2], [0, 0 << 32 | 1]], dtype=np.int64)
    sent_as = np.full((2, 16), -99, dtype=np.int32)
    sent_as[0, :3], sent_as[1, 0] = (5, 2, 3), 7
    found = unpack(layout, sent_as, np.array([4, 9]), 8)
    assert found.order.tolist() == [2, 1, 0, 16]
    assert found.groups == ((4, 0, 3), (9, 3, 4))
    assert unpack(np.zeros((2, 2), dtype=np.int64), sent_as, np.array([4, 9]), 8).groups == ()


@pytest.mark.parametrize(
    ("layout", "token"),
    [([[0, 9]], 1), ([[0, 15 << 32 | 2]], 1), ([[0, 1]], 8), ([[0, 1]], -1), ([[0, 0], [0, 1]], 1), ([[0, -1 << 32 | 1]], 1)],
    ids=["more than a batch", "past the end", "token too high", "negative token", "an expert not served", "before the beginning"],
)
def test_what_no_batch_has_names_its_source(layout: list[list[int]], token: int) -> None:
    with pytest.raises(BrokenSourceError) as error:
        unpack(np.array(layout, dtype=np.int64), np.full((len(layout), 16), token, dtype=np.int32), np.array([3]), 8)
    assert error.value.rank == 1


def test_capacities_that_kernels_cannot_serve_are_refused() -> None:
    assert PackedCapacity(2, 4, 127, 8, 2048, Sums.OWN).messages == 1016
    assert PackedCapacity(2, 4, 1017, 8, 2048).messages == 1020
    with pytest.raises(InvalidInputError, match="max_tokens up to 127"):
        PackedCapacity(2, 4, 128, 8, 2048, Sums.OWN)
    with pytest.raises(InvalidInputError, match="top_k is 0"):
        PackedCapacity(2, 4, 8, 0, 2048)
    with pytest.raises(InvalidInputError, match="rows of 64, only of 2048"):
        MooncakeDispatcher(0, PackedCapacity(2, 4, 8, 4, 64), HashStore())
    with pytest.raises(InvalidInputError, match="11 experts at most, not 12"):
        MooncakeDispatcher(0, PackedCapacity(2, 4, 8, 12, 2048), HashStore())
    with pytest.raises(InvalidInputError, match="rank 2 has no seat among 2"):
        NixlDispatcher(2, CAPACITY, HashStore())
    with pytest.raises(InvalidInputError, match="ep_size is 9"):
        NixlDispatcher(0, PackedCapacity(9, 4, 8, 4, 2048), HashStore())
    with pytest.raises(InvalidInputError, match="timeout_us is 0"):
        NixlDispatcher(0, CAPACITY, HashStore(), timeout_us=0)


@pytest.mark.parametrize("kind", [MooncakeDispatcher, NixlDispatcher])
def test_a_missing_library_is_one_clear_error(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mooncake", "mooncake.ep", "nixl_ep"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidInputError, match=rf"cannot load .*; pip install 'elastic-ep\[{kind.kind}\]'"):
        kind(0, CAPACITY, HashStore()).listen()


def test_device_names() -> None:
    assert parse_ib_devices("mlx5_1, mlx5_2") == ("mlx5_1", "mlx5_2")
    assert parse_ib_devices('{"0": "mlx5_1", "1": "mlx5_2,mlx5_3"}', gpu=1) == ("mlx5_2", "mlx5_3")
    for text, words in (("mlx5_1,,mlx5_2", "empty name"), ("", "empty name"), ('{"0": "a"}', "no device for GPU 3"), ("{", "no JSON")):
        with pytest.raises(InvalidInputError, match=words):
            parse_ib_devices(text, gpu=3)


def lone_mooncake(request: pytest.FixtureRequest, fallback: bool = False) -> tuple[MooncakeDispatcher, FakeMooncake]:
    stream = Stream()
    request.addfinalizer(stream.close)
    library = FakeMooncake(Cluster(1), stream, fallback)
    capacity = PackedCapacity(1, 4, 8, 4, 2048)
    return MooncakeDispatcher(0, capacity, HashStore(), library=library, device="cpu", stream=lambda: stream), library


def test_device_names_reach_both_halves_of_mooncake(make_kernel_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_EP_DEVICE_FILTER", "")
    world = make_kernel_world("mooncake", 2)
    for rank in range(2):
        world.start(rank, ib_devices=("mlx5_1", "mlx5_2"))
    assert connect(world, 0, 1) == {0: None, 1: None}
    assert [world.libraries[r].pg.device_filter for r in range(2)] == [["mlx5_1", "mlx5_2"]] * 2
    assert os.environ["MOONCAKE_EP_DEVICE_FILTER"] == "mlx5_1,mlx5_2"
    assert world.ranks[0].active_ranks.tolist() == [1, 1]


def test_mooncakes_collective_fallback_is_refused(request: pytest.FixtureRequest) -> None:
    dispatcher, _ = lone_mooncake(request, fallback=True)
    with pytest.raises(InvalidInputError, match="neither NVLink nor RDMA"):
        dispatcher.connect({}, 1.0)


def test_mooncake_is_founded_by_all(make_kernel_world: Any) -> None:
    world = make_kernel_world("mooncake", 2)
    world.start(0)
    with pytest.raises(InvalidInputError, match=r"with all 2 ranks, got \[0\]"):
        world.ranks[0].connect(world.peers(0), 1.0)


@pytest.mark.parametrize("backend", ["mooncake", "nixl"])
def test_the_store_may_be_a_server(make_kernel_world: Any, backend: str) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = make_kernel_world(backend, 2)
    world.store = f"tcp:127.0.0.1:{server.port}"
    start(world, 0, 1)
    run_steps(world, [0, 1], 1, count=1)
    assert connect(world, 0, 1) == dict.fromkeys((0, 1))
    run_steps(world, [0, 1], 2, count=1)


def test_a_store_that_is_none() -> None:
    with pytest.raises(InvalidInputError, match="give tcp:HOST:PORT"):
        open_store("127.0.0.1:80")
    with pytest.raises(InvalidInputError, match=r"no store answers at tcp:127\.0\.0\.1:1"):
        open_store("tcp:127.0.0.1:1", timeout_s=0.2)


def test_ranks_that_were_given_other_sizes_are_told() -> None:
    store = HashStore()
    ranks = [Rendezvous(store, "kind", r, f"size {r}") for r in range(2)]
    deadline = time.monotonic() + 5
    with pytest.raises(InvalidInputError, match=r"rank \d has size \d, this rank size \d"):
        run_ranks({r: lambda r=r: ranks[r].meet("a", {1 - r: ranks[1 - r].address}, deadline, lambda: False) for r in range(2)})


def test_what_an_earlier_meeting_left_does_not_count() -> None:
    store = HashStore()
    ranks = [Rendezvous(store, "kind", r, "same") for r in range(2)]

    def meet(rank: int, wait_s: float) -> Any:
        return ranks[rank].meet("a", {1 - rank: ranks[1 - rank].address}, time.monotonic() + wait_s, lambda: False)

    assert run_ranks({r: lambda r=r: meet(r, 5) for r in range(2)}) == {0: set(), 1: set()}
    assert meet(0, 0.1) == {1}
    assert run_ranks({r: lambda r=r: meet(r, 5) for r in range(2)}) == {0: set(), 1: set()}
    assert ranks[0].meet("a", {1: ranks[1].address}, time.monotonic() + 5, lambda: True) is None


def test_descriptions_of_a_dead_process_are_not_read() -> None:
    store = HashStore()
    old, new, reader = PeerStore(store, 1, "old"), PeerStore(store, 1, "new"), PeerStore(store, 0, "reader")
    old.set("NIXL_EP/1", b"stale")
    reader.expect({1: "new"}, time.monotonic() + 0.05)
    with pytest.raises(TimeoutError):
        reader.wait(["NIXL_EP/1"])
    new.set("NIXL_EP/1", b"fresh")
    reader.wait(["NIXL_EP/1"])
    assert reader.multi_get(["NIXL_EP/1"]) == [b"fresh"]


def test_the_fakes_hold_callers_to_the_contract(request: pytest.FixtureRequest) -> None:
    dispatcher, library = lone_mooncake(request)
    dispatcher.connect({}, 1.0)
    (buffer,) = library.buffers
    with pytest.raises(ContractError, match="no change of members"):
        buffer.update_ep_member()
    with pytest.raises(ContractError, match="never ends"):
        buffer._kernels(dispatcher.active_ranks, -1)
    with pytest.raises(ContractError, match="active_ranks"):
        buffer._kernels(dispatcher.active_ranks.long(), 1)
    library.cluster.epoch += 1
    with pytest.raises(ContractError, match="update_ep_member comes before"):
        buffer._kernels(dispatcher.active_ranks, 1)
