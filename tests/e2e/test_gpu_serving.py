"""A server whose ranks share a GPU: kills, a replacement, both dispatch backends; the tokens are an undisturbed run's."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

from elastic_ep.testing.server import ServerProcess
from tests.e2e.conftest import COUNT, prompts
from tests.e2e.test_streams import check_kills_change_nothing, kill_at_random, run_streams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.mark.parametrize(
    ("family", "dispatch"), [("qwen3_moe", "socket"), ("gpt_oss", "socket"), ("deepseek_v3", "socket"), ("qwen3_moe", "cuda")]
)
def test_gpu_ranks_die_and_no_token_changes(checkpoint, family, dispatch):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    asked = prompts(16)
    victims = rng.sample([0, 1, 2], 2)
    arguments = ("--ep-size", "3", "--num-redundant-experts", "3", "--device", "cuda", "--dispatch", dispatch, "--restart", "never")
    with ServerProcess(checkpoint(family), *arguments) as server:
        _, status = check_kills_change_nothing(server, asked, victims, rng)
    assert {rank["device"] for rank in status["ranks"]} == {"cuda"}


def test_a_gpu_rank_is_replaced_from_the_host_backup(checkpoint):
    asked = prompts(16)
    # two ranks have slots for all experts, three none to spare for a second replica of each
    arguments = (
        "--ep-size",
        "3",
        "--num-redundant-experts",
        "4",
        "--device",
        "cuda",
        "--host-backup",
        "experts",
        "--restart-backoff",
        "0.05",
    )
    with ServerProcess(checkpoint("qwen3_moe"), *arguments) as server:
        undisturbed = asyncio.run(run_streams(server, asked))
        server.wait_status(lambda s: s["host_backup"]["experts"] == s["host_backup"]["of"])
        disturbed = asyncio.run(run_streams(server, asked, kill_at_random(server, [1], random.Random(3), len(asked) * COUNT)))
        status = server.wait_status(lambda s: s["active_ranks"] == [1, 1, 1], 60.0)
        again = asyncio.run(run_streams(server, asked))
    assert disturbed == undisturbed == again
    assert status["requests"]["failed"] == 0
    assert any(recovery["experts_lost"] and recovery["bytes_moved"]["host"] for recovery in status["recoveries"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")
@pytest.mark.parametrize("dispatch", ["socket", "cuda"])
def test_ranks_with_a_gpu_each_die_and_come_back_and_no_token_changes(checkpoint, dispatch):
    asked = prompts(16)
    arguments = ("--ep-size", "2", "--num-redundant-experts", "8", "--device", "cuda", "--dispatch", dispatch, "--restart-backoff", "0.05")
    with ServerProcess(checkpoint("qwen3_moe"), *arguments) as server:
        undisturbed = asyncio.run(run_streams(server, asked))
        for victim in (1, 0):
            kill = kill_at_random(server, [victim], random.Random(victim), len(asked) * COUNT)
            assert asyncio.run(run_streams(server, asked, kill)) == undisturbed
            status = server.wait_status(lambda s: s["active_ranks"] == [1, 1], 60.0)
        again = asyncio.run(run_streams(server, asked))
    assert again == undisturbed
    assert status["requests"]["failed"] == 0
