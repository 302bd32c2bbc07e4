"""From outside: OpenAI clients of a real server whose ranks die. Every stream is whole, and its tokens are those of an undisturbed run."""

from __future__ import annotations

import asyncio
import random
import signal
from typing import Any

import pytest
from openai import AsyncOpenAI

from elastic_ep.testing.server import ServerProcess
from tests.checkpoints import FAMILIES
from tests.e2e.conftest import COUNT, prompts, reference

NO_RESTART = ("--restart", "never")


async def stream(client: AsyncOpenAI, model: str, prompt: list[int], **parameters: Any) -> list[int]:
    """All token ids of one streamed completion; the client raises for any error."""
    extra = {"return_token_ids": True, "ignore_eos": True}
    chunks = await client.completions.create(
        model=model, prompt=prompt, max_tokens=COUNT, stream=True, extra_body=extra, **({"temperature": 0} | parameters)
    )
    ids: list[int] = []
    finish = None
    async for chunk in chunks:
        ids += chunk.choices[0].token_ids
        finish = chunk.choices[0].finish_reason or finish
    assert finish == "length"
    return ids


async def run_streams(server: ServerProcess, all_prompts: list[list[int]], disturb: Any = None, **parameters: Any) -> list[list[int]]:
    """All prompts at once; `disturb` is awaited beside them."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        model = server.facts["model"]
        streams = [stream(client, model, prompt, **parameters) for prompt in all_prompts]
        results = await asyncio.gather(*streams, *([disturb] if disturb else []))
        return results[: len(all_prompts)]


async def committed(server: ServerProcess, tokens: int) -> None:
    while (await asyncio.to_thread(server.status))["tokens_committed"] < tokens:
        await asyncio.sleep(0.005)


async def kill_at_random(server: ServerProcess, ranks: list[int], rng: random.Random, total: int) -> None:
    """kill -9 each of `ranks` at a random point of the work, rank 0 among them."""
    start = server.status()["tokens_committed"]
    for rank, moment in zip(ranks, sorted(rng.randrange(total * 3 // 4) for _ in ranks), strict=True):
        await committed(server, start + moment)
        server.signal_rank(rank)


def check_kills_change_nothing(server: ServerProcess, asked: list[list[int]], victims: list[int], rng: random.Random) -> Any:
    """All but one rank are killed at random moments, and every stream is as without. Returns what came, and the status at the end."""
    undisturbed = asyncio.run(run_streams(server, asked))
    disturbed = asyncio.run(run_streams(server, asked, kill_at_random(server, victims, rng, len(asked) * COUNT)))
    # on a busy machine the streams can end before the last death is noticed
    status = server.wait_status(lambda s: sum(s["active_ranks"]) == 1)
    assert disturbed == undisturbed
    assert status["requests"]["failed"] == 0
    return undisturbed, status


@pytest.mark.parametrize("family", FAMILIES)
def test_random_kills_change_no_token(checkpoint, family):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    asked = prompts(32)
    victims = [0, *rng.sample([1, 2, 3], 2)]
    rng.shuffle(victims)
    arguments = ("--ep-size", "4", "--num-redundant-experts", "2", "--prefill-chunk", "16", *NO_RESTART)
    with ServerProcess(checkpoint(family), *arguments) as server:
        undisturbed, status = check_kills_change_nothing(server, asked, victims, rng)
    assert {rank for recovery in status["recoveries"] for rank in recovery["ranks"]} == set(victims)
    assert undisturbed[:8] == reference(checkpoint(family), 8)


def test_sampled_streams_are_the_same_too(checkpoint):
    asked = prompts(12)
    parameters = {"temperature": 1.1, "top_p": 0.9, "seed": 99}
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "3", *NO_RESTART) as server:
        undisturbed = asyncio.run(run_streams(server, asked, **parameters))
        disturb = kill_at_random(server, [1], random.Random(3), len(asked) * COUNT)
        assert asyncio.run(run_streams(server, asked, disturb, **parameters)) == undisturbed
    assert undisturbed[:8] != reference(checkpoint("qwen3_moe"), 8)


def test_a_stopped_rank_is_killed_and_replaced(checkpoint):
    async def stop(server: ServerProcess) -> None:
        await committed(server, 100)
        server.signal_rank(2, signal.SIGSTOP)

    asked = prompts(8)
    with ServerProcess(checkpoint("mixtral"), "--ep-size", "3", *NO_RESTART) as server:
        disturbed = asyncio.run(run_streams(server, asked, stop(server)))
        recovery = server.status()["recoveries"][0]
        assert (recovery["ranks"], recovery["kind"]) == ([2], "stopped")
    assert disturbed == reference(checkpoint("mixtral"), 8)


def test_killed_ranks_come_back(checkpoint):
    """Each rank in turn is killed once the one before has rejoined; the streams of all that time are the same."""
    asked = prompts(32)
    with ServerProcess(checkpoint("gpt_oss"), "--ep-size", "3", "--num-redundant-experts", "6") as server:
        for rank in (0, 2, 1):
            start = server.status()["tokens_committed"]

            async def kill(rank: int = rank, start: int = start) -> None:
                await committed(server, start + 200)
                server.signal_rank(rank)

            assert asyncio.run(run_streams(server, asked, kill()))[:8] == reference(checkpoint("gpt_oss"), 8)
            server.wait_status(lambda status: sum(status["active_ranks"]) == 3 and status["survives"]["any_ranks"] == 1)
        status = server.status()
    assert [rank["incarnation"] for rank in status["ranks"]] == [1, 1, 1]
    assert status["requests"]["failed"] == 0
    assert [recovery["kind"] for recovery in status["recoveries"] if recovery["tier"] == 2].count("rejoin") == 3


FAULTS = {
    "killed in a step": (["1:step_begin:kill:20"], {1}),
    "killed between exchange and answer": (["2:step_end:kill:20"], {2}),
    "killed while a recovery installs": (["1:step_begin:kill:20", "2:install_begin:kill:2"], {1, 2}),
    "killed after a recovery installed": (["1:step_begin:kill:20", "0:install_end:kill:2"], {1, 0}),
    "two at once": (["1:step_begin:kill:20", "2:step_begin:kill:20"], {1, 2}),
    "wedged in a step": (["2:step_begin:wedge:20"], {2}),
    "wedged after the last exchange": (["0:step_end:wedge:20"], {0}),
    "wedged while a recovery installs": (["1:step_begin:kill:20", "3:install_begin:wedge:2"], {1, 3}),
    "its control channel cut": (["3:step_begin:close:20"], {3}),
    "killed when loaded": (["1:dense_loaded:kill:1"], {1}),
    "killed in the first install": (["2:install_begin:kill:1"], {2}),
    "killed by its first expert": (["0:load_expert:kill:1"], {0}),
    "wedged at start": (["1:install_begin:wedge:1"], {1}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_at_named_points(checkpoint, name):
    """E = 8 experts on 4 ranks x 3 slots, every second expert twice: recoveries of both tiers."""
    faults, dead = FAULTS[name]
    arguments = [word for fault in faults for word in ("--fault", fault)]
    asked = prompts(8)
    redundancy = ["--num-redundant-experts", "4", "--step-timeout", "5", *NO_RESTART]
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "4", *redundancy, *arguments) as server:
        received = asyncio.run(run_streams(server, asked))
        status = server.status()
    assert received == reference(checkpoint("qwen3_moe"), 8)
    assert {rank["rank"]: rank["failure"] for rank in status["ranks"] if rank["failure"]}.keys() == dead, status["ranks"]
    assert status["requests"]["failed"] == 0
    check_phases(status)


def test_killed_while_a_recovery_loads(checkpoint):
    """Whichever rank reads an expert in the recovery dies doing so (its seventh: the first six fill its slots at start)."""
    faults = [word for rank in range(3) for word in ("--fault", f"{rank}:load_expert:kill:7")]
    arguments = ("--ep-size", "4", "--num-redundant-experts", "4", "--fault", "3:step_begin:kill:15", *faults)
    with ServerProcess(checkpoint("qwen3_moe"), *arguments) as server:
        received = asyncio.run(run_streams(server, prompts(8)))
        status = server.status()
    assert received == reference(checkpoint("qwen3_moe"), 8)
    first = status["recoveries"][0]
    assert first["ranks"][0] == 3
    assert len(first["ranks"]) > 1
    assert status["requests"]["failed"] == 0
    check_phases(status)


def check_phases(status: dict[str, Any]) -> None:
    for recovery in status["recoveries"]:
        phases = [recovery[f"{phase}_ms"] for phase in ("detect", "agree", "plan", "move", "resume")]
        assert sum(phases) == pytest.approx(recovery["stall_ms"], abs=0.01)
