"""What a rank process is started with follows from the server's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic_ep.core.topology import Topology
from elastic_ep.serving.config import RemoteRanks, ServeConfig
from elastic_ep.serving.rank_program import RankPlace, rank_program

REMOTE = RemoteRanks((("b", 1),), "tcp:127.0.0.1:7000", "token", "a")


@pytest.mark.parametrize(
    ("options", "reads"),
    [({}, True), ({"peer_reads": "socket"}, False), ({"device": "cuda"}, False), ({"remote": REMOTE}, False)],
)
def test_only_ranks_that_can_read_each_others_memory_open_it(options: dict[str, Any], reads: bool) -> None:
    config = ServeConfig(checkpoint=Path("unused"), ep_size=2, **options)
    place = RankPlace(0, 0, "unix:/none", "/run", "token", -1)
    assert rank_program(place, config, Topology((4, 4)), 10.0)["rank"]["reads_peer_memory"] is reads
