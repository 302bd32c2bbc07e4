"""The group grows, shrinks and loses chosen ranks under load; every stream is whole and the same."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from elastic_ep.cli.plan_load import read_load
from elastic_ep.testing.client import StreamRecord, stream_all
from elastic_ep.testing.server import ServerProcess
from tests.e2e.conftest import prompts

COUNT = 160


async def post(server: ServerProcess, path: str, **body: Any) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        return await client.post(server.url + path, json=body)


async def under_load(server: ServerProcess, change: Any) -> list[StreamRecord]:
    """16 streams, and `change()` once all of them run."""
    streams = asyncio.ensure_future(
        stream_all(server.url, server.facts["model"], prompts(16), max_tokens=COUNT, temperature=0, ignore_eos=True)
    )
    while (await asyncio.to_thread(server.status))["requests"]["running"] < 16:
        await asyncio.sleep(0.01)
    await change()
    return await streams


@pytest.mark.parametrize("drain", ["move", "finish"])
def test_scale_and_drain_under_load(checkpoint, drain):
    """4 -> 6 -> 3 -> 4, then rank 0 leaves: no request fails, no token differs."""
    steps = {}
    with ServerProcess(checkpoint("qwen3_moe"), "--ep-size", "4", "--num-redundant-experts", "4", "--drain", drain) as server:
        quiet = asyncio.run(under_load(server, lambda: asyncio.sleep(0)))

        for name, path, body in (
            ("4 to 6", "/scale_elastic_ep", {"new_ep_size": 6}),
            ("6 to 3", "/scale_elastic_ep", {"new_ep_size": 3}),
            ("3 to 4", "/scale_elastic_ep", {"new_ep_size": 4}),
            ("rank 0 leaves", "/elastic/ranks/0/drain", {}),
        ):

            async def change(path: str = path, body: dict[str, Any] = body, name: str = name) -> None:
                answer = await post(server, path, operation_id=name, **body)
                assert answer.status_code == 200, answer.text
                assert answer.json()["state"] == "done", answer.text

            records = asyncio.run(under_load(server, change))
            assert [r.error for r in records] == [""] * 16
            assert [r.token_ids for r in records] == [r.token_ids for r in quiet], name
            status = server.status()
            steps[name] = (sum(status["active_ranks"]), round(max(max(r.gaps_s) for r in records) * 1e3))
        assert [ranks for ranks, _ in steps.values()] == [6, 3, 4, 3]
        assert status["ranks"][0]["state"] == "retired"
        assert status["requests"]["failed"] == 0
        print("longest gap in ms:", {name: gap for name, (_, gap) in steps.items()}, "quiet:", max(max(r.gaps_s) for r in quiet) * 1e3)


def test_operations_are_named_refused_and_undone(checkpoint, tmp_path):
    trace = tmp_path / "loads.npz"
    arguments = ("--ep-size", "2", "--when-short", "refuse", "--num-redundant-experts", "2", "--load-trace", str(trace))
    with ServerProcess(checkpoint("mixtral"), *arguments) as server:
        with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:

            def refused(path: str, **body: Any) -> str:
                answer = client.post(path, json=body)
                assert answer.status_code == 409, answer.text
                return str(answer.json()["error"]["message"])

            experts = server.facts["experts"]
            assert f"give 1 to {experts}" in refused("/scale_elastic_ep", new_ep_size=experts + 1)
            assert "--when-short is refuse" in refused("/elastic/ranks/1/drain")
            assert "there is no rank 7" in refused("/elastic/ranks/7/drain")
            assert client.post("/scale_elastic_ep", json={"new_ep_size": 0}).status_code == 400
            assert client.get("/elastic/operations/none").status_code == 404

            begun = client.post("/scale_elastic_ep", json={"new_ep_size": 3, "operation_id": "grow", "wait": False})
            assert (begun.status_code, begun.json()["state"]) == (202, "running")
            assert client.get("/is_scaling_elastic_ep").json() == {"is_scaling_elastic_ep": True, "operation_id": "grow"}
            assert "grow is still running" in refused("/scale_elastic_ep", new_ep_size=2)
            again = client.post("/scale_elastic_ep", json={"new_ep_size": 3, "operation_id": "grow"})
            assert again.json()["state"] == "done"
            assert client.get("/elastic/operations/grow").json() == again.json()

            server.signal_rank(2)  # a joiner of the past is a rank like another
            server.wait_status(lambda status: sum(status["active_ranks"]) == 3 and status["ranks"][2]["incarnation"] == 2)
            asyncio.run(under_load(server, lambda: asyncio.sleep(0)))
        server.stop()
    load = read_load(str(trace))
    assert load.shape == (server.facts["layers"], experts)
    assert load.sum() > 0, json.dumps(load.tolist())
