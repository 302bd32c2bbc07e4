"""A model on a GPU: what it computes, its slots, digests that the device computes, a backup that it copies from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from elastic_ep.brain.messages import SamplingParams, SequenceWork
from elastic_ep.core.errors import CheckpointError, WrongExpertError
from elastic_ep.core.placement import ExpertPlacement
from elastic_ep.core.routing import RoutingTable
from elastic_ep.core.topology import Topology
from elastic_ep.runtime.engine import SlotLoad
from elastic_ep.runtime.weights.base import digest_of
from elastic_ep.runtime.weights.host import HostBackup
from tests.checkpoints import FAMILIES
from tests.models.gpu_world import GpuWorld, needs_gpu
from tests.models.world import World

pytestmark = needs_gpu
TOKENS = [(7 * i) % 160 for i in range(90)]
CUTS = [1, 2, 30, 31, 64, 65, 80, 90]


def logits_of(world: World) -> torch.Tensor:
    return torch.stack(list(world.logits_at(1, TOKENS, CUTS).values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_processor(family: str, checkpoint: Callable[..., Path]) -> None:
    """They are several units apart; the sums have another order."""
    folder = checkpoint(family, "float32")
    assert (logits_of(World(folder)) - logits_of(GpuWorld(folder))).abs().max() < 5e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_the_truth_as_on_the_processor(family: str, checkpoint: Callable[..., Path]) -> None:
    """Rounding alone changes an expert here and there, so the two are compared by their distance from float32."""
    folder = checkpoint(family, "bfloat16")
    truth = logits_of(World(folder, dtype="float32"))
    ours, theirs = (float((logits_of(kind(folder)) - truth).abs().mean()) for kind in (GpuWorld, World))
    assert ours < 1.7 * theirs + 0.02


def test_sampling_and_logprobs_are_computed_as_on_the_processor(checkpoint: Callable[..., Path]) -> None:
    world = GpuWorld(checkpoint("qwen3_moe"))
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=5, top_logprobs=3)
    out = world.engine.run_step([SequenceWork(1, 0, (3, 4, 5), params)], (), world.routing, world.dispatcher, 0)
    token = out.tokens[0]
    expected = torch.log_softmax(world.engine.logits[1].double(), dim=0)
    assert token.logprob == pytest.approx(float(expected[token.token]), abs=1e-6)
    assert [i for i, _ in token.top] == expected.topk(3).indices.tolist()
    assert out.expert_counts.sum() == out.expert_counts.shape[0] * 3 * world.engine.spec.num_experts_per_tok


def test_an_expert_that_is_not_here_is_fatal(checkpoint: Callable[..., Path]) -> None:
    world = GpuWorld(checkpoint("qwen3_moe"), slots=[[0, 1, 2]] * 2)
    every = ExpertPlacement(np.tile(np.arange(8), (2, 1)), 8)
    world.routing = RoutingTable.build(1, every, Topology((8,)))
    with pytest.raises(WrongExpertError, match="was sent tokens for expert"):
        world.step([SequenceWork(1, 0, tuple(range(20)), SamplingParams(temperature=0))])


@pytest.mark.parametrize("num_bytes", [256, 1024, 1032, 2048, 5000, 131072, 1 << 20, 9437184])
def test_the_device_computes_the_same_digest(num_bytes: int) -> None:
    from elastic_ep.models.gpu.digest import DeviceDigest, new_stream

    device = torch.device("cuda", 0)
    data = np.random.default_rng(num_bytes).integers(0, 256, num_bytes, dtype=np.uint8)
    digest, stream = DeviceDigest(num_bytes, device), new_stream(device)
    on_device = torch.from_numpy(data).to(device)
    torch.cuda.synchronize()
    assert digest.of(on_device, stream) == xxhash.xxh3_64_intdigest(data.data)
    on_device[num_bytes // 2] ^= 4
    torch.cuda.synchronize()
    assert digest.of(on_device, stream) != xxhash.xxh3_64_intdigest(data.data)


def test_slots_are_loaded_staged_and_adopted(checkpoint: Callable[..., Path]) -> None:
    world = GpuWorld(checkpoint("qwen3_moe", "bfloat16"))
    slots = world.engine.slots
    first = slots.bytes_of(0, 2).clone()
    assert digest_of(first) == world.digests[0, 2]
    staged = slots.stage(SlotLoad(0, 5, 2))
    assert not torch.equal(slots.slot_bytes(0, 5), first)
    assert slots.adopt(SlotLoad(0, 5, 3)) is None, "another expert was staged for it"
    slots.stage(SlotLoad(0, 5, 2))
    assert slots.adopt(SlotLoad(0, 5, 2)) == staged.digest == world.digests[0, 2]
    assert torch.equal(slots.slot_bytes(0, 5), first)
    assert slots.bytes_of(0, 5) is None


class TestMappedBackup:
    """Slots of whole pages, which the driver maps."""

    @staticmethod
    def world_and_backup(folder: Path) -> tuple[GpuWorld, HostBackup]:
        world = GpuWorld(folder)
        num_layers, num_experts, slot_bytes = world.engine.slots.shape
        assert slot_bytes % 4096 == 0
        backup = HostBackup(HostBackup.create(num_layers, num_experts, slot_bytes), num_layers, num_experts, slot_bytes)
        for layer in range(num_layers):
            for expert in range(num_experts):
                backup.write(layer, expert, world.engine.slots.bytes_of(layer, expert), world.digests[layer, expert])
        world.engine.slots.backup = backup
        assert world.engine.slots._mapped.wait_mapped(20.0)
        return world, backup

    def test_experts_come_back_bit_by_bit(self, page_checkpoint: Path) -> None:
        world, backup = self.world_and_backup(page_checkpoint)
        before = world.engine.slots.slot_bytes(0, 1)
        loaded = world.engine.slots.load(SlotLoad(0, 0, 1), (backup, world.engine.slots.checkpoint), world.digests[0, 1])
        assert (loaded.kind, loaded.digest, loaded.errors) == ("host", world.digests[0, 1], ())
        assert torch.equal(world.engine.slots.slot_bytes(0, 0), before)
        world.engine.slots.backup = None

    def test_a_flipped_bit_is_found_and_the_next_source_asked(self, page_checkpoint: Path) -> None:
        world, backup = self.world_and_backup(page_checkpoint)
        backup.view(1, 3)[100] ^= 1
        sources = (backup, world.engine.slots.checkpoint)
        loaded = world.engine.slots.load(SlotLoad(1, 0, 3), sources, world.digests[1, 3])
        assert loaded.kind == "checkpoint"
        assert "a bit of this host's memory has changed" in loaded.errors[0]
        with pytest.raises(CheckpointError, match="host backup"):
            world.engine.slots.load(SlotLoad(1, 0, 3), (backup,), world.digests[1, 3])
        world.engine.slots.backup = None


@pytest.fixture(scope="session")
def page_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.checkpoints import config_of, save_checkpoint

    config = config_of("qwen3_moe", moe_intermediate_size=64)
    return save_checkpoint(tmp_path_factory.mktemp("pages") / f"qwen-{os.getpid()}", config, "bfloat16")
