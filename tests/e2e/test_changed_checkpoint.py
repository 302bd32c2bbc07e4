"""A checkpoint that changes under a running server: ranks go on with what they have read, and who reads something else never joins."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest

from elastic_ep.testing.server import ServerProcess
from tests.e2e.conftest import prompts
from tests.e2e.test_streams import run_streams


@pytest.mark.parametrize("what", ["config", "dense weights"])
def test_a_replacement_does_not_compute_with_other_weights(checkpoint, tmp_path, what):
    folder = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "served")
    file = folder / ("config.json" if what == "config" else "model.safetensors")
    before = file.read_bytes()
    arguments = ("--ep-size", "3", "--host-backup", "experts", "--restart-backoff", "0.05")
    with ServerProcess(folder, *arguments) as server:
        server.wait_status(lambda s: s["host_backup"]["experts"] == s["host_backup"]["of"])
        undisturbed = asyncio.run(run_streams(server, prompts(6)))
        file.write_bytes(_changed_config(before) if what == "config" else _changed_norm(before))
        server.signal_rank(1)
        status = server.wait_status(lambda s: "the checkpoint has changed since" in (s["ranks"][1].get("failure") or ""))
        assert status["active_ranks"] == [1, 0, 1]
        assert asyncio.run(run_streams(server, prompts(6))) == undisturbed
        file.write_bytes(before)
        server.wait_status(lambda s: s["active_ranks"] == [1, 1, 1])
        assert asyncio.run(run_streams(server, prompts(6))) == undisturbed


def _changed_config(before: bytes) -> bytes:
    config = json.loads(before)
    return json.dumps(config | {"norm_topk_prob": not config["norm_topk_prob"]}).encode()


def _changed_norm(before: bytes) -> bytes:
    """One weight of the last norm."""
    size = int.from_bytes(before[:8], "little")
    begin = 8 + size + json.loads(before[8 : 8 + size])["model.norm.weight"]["data_offsets"][0]
    return before[:begin] + bytes([before[begin] ^ 0x40]) + before[begin + 1 :]
