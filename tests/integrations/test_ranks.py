"""From the words of `elastic-ep serve` to a rank's dispatcher over a kernel-masked library."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.integrations.mooncake import MooncakeDispatcher
from elastic_ep.integrations.nixl import NixlDispatcher
from elastic_ep.integrations.ranks import make_dispatcher
from elastic_ep.integrations.rendezvous import host_store, open_store
from elastic_ep.runtime.rank_config import RankConfig
from elastic_ep.serving.config import ServeConfig
from elastic_ep.serving.rank_program import RankPlace, rank_program

SIZES = {"ep_size": 4, "experts_per_rank": 9, "max_tokens": 128, "top_k": 8, "hidden": 2048}


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    ours, theirs = socket.socketpair()
    options = {"store": "tcp:127.0.0.1:1", "gpu": 1, "ib_devices": "", "timeout_s": 5.0, "interrupt": ours}
    yield lambda backend, **changes: make_dispatcher(backend, 2, SIZES, **(options | changes))
    ours.close()
    theirs.close()


def test_each_backend_gets_its_dispatcher(make):
    mooncake = make("mooncake", ib_devices='{"0": "mlx5_0", "1": "mlx5_1,mlx5_2"}')
    assert isinstance(mooncake, MooncakeDispatcher)
    assert (mooncake.rank, mooncake.timeout_us, str(mooncake.device)) == (2, 5_000_000, "cuda:1")
    assert mooncake.ib_devices == ("mlx5_1", "mlx5_2")
    assert isinstance(make("nixl"), NixlDispatcher)


@pytest.mark.parametrize("backend", ["mooncake", "nixl"])
def test_a_library_that_is_not_installed_is_named_with_the_cure(backend, make):
    with pytest.raises(InvalidInputError, match=rf"pip install 'elastic-ep\[{backend}\]'"):
        make(backend).listen()


def test_ranks_find_the_store_that_the_server_hosts():
    hosted = host_store("127.0.0.1")
    open_store(hosted.address).set("key", "value")
    assert hosted.store.get("key") == b"value"


def test_the_server_tells_its_ranks_which_backend_and_where_to_meet():
    config = ServeConfig("/model", 4, device="cuda", dispatch="mooncake", mooncake_ib_device="mlx5_1", num_redundant_experts=0)
    place = RankPlace(1, 0, "unix:/c", "/run", "token", -1, "tcp:127.0.0.1:4100")
    program = rank_program(place, config, config.topology(8), 10.0)
    assert RankConfig(**program["rank"]).rank == 1
    assert program["dispatch"]["factory"] == "elastic_ep.integrations.ranks:make_dispatcher"
    assert (program["dispatch"]["backend"], program["dispatch"]["store"]) == ("mooncake", "tcp:127.0.0.1:4100")
    assert (program["dispatch"]["num_seats"], program["dispatch"]["ib_devices"]) == (4, "mlx5_1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dispatch": "mooncake"}, "give --device cuda"),
        ({"dispatch": "nixl"}, "give --device cuda"),
        ({"dispatch": "cuda"}, "give --device cuda"),
        ({"device": "cuda", "mooncake_ib_device": "mlx5_1"}, "is for --dispatch mooncake"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        ServeConfig("/model", 2, **options)
