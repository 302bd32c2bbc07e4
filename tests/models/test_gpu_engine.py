"""A model on a GPU: what it computes, its slots, digests that the device computes, a backup that it copies from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from elastic_ep.runtime.weights.base import LocalSource, digest_of
from elastic_ep.runtime.weights.host import HostBackup
from tests.checkpoints import FAMILIES
from tests.models.gpu_world import GpuWorld, needs_gpu
from tests.models.world import World

pytestmark = needs_gpu
SLEEP_CYCLES = 200_000_000
"""about a tenth of a second"""
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


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_written_where_peers_read_them(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from elastic_ep.runtime.dispatch.cuda.dispatcher import CudaDispatcher
    from elastic_ep.runtime.dispatch.cuda.region import Capacity

    in_place: list[bool] = []

    class Watched(CudaDispatcher):
        def enqueue_dispatch(self, x: torch.Tensor, *rest: Any) -> Any:
            in_place.append(not len(x) or x.data_ptr() == self.token_buffer(*x.shape, x.dtype).data_ptr())
            return super().enqueue_dispatch(x, *rest)

    class CudaWorld(GpuWorld):
        def make_dispatcher(self) -> Any:
            spec = self.engine.spec
            shape = {"max_tokens": 64, "top_k": spec.num_experts_per_tok, "hidden": spec.hidden_size}
            capacity = Capacity(1, spec.num_experts, spec.num_layers, **shape, itemsize=self.engine.dtype.itemsize)
            dispatcher = Watched(0, "tcp:127.0.0.1:0", capacity, token="t", cache=tmp_path)
            assert dispatcher.connect({0: dispatcher.listen()}, 20.0) is None
            return dispatcher

    folder = checkpoint(family, "bfloat16")
    world = CudaWorld(folder)
    try:
        logits = logits_of(world)
    finally:
        world.dispatcher.close()
    assert len(in_place) >= world.engine.spec.num_layers
    assert all(in_place)
    assert torch.equal(logits, logits_of(GpuWorld(folder)))


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
    torch.cuda._sleep(SLEEP_CYCLES)  # a step that runs all the while
    for slot in (6, 7):  # more at once than there are buffers
        slots.stage(SlotLoad(0, slot, 1))
    for slot in (6, 7):
        assert slots.adopt(SlotLoad(0, slot, 1)) == world.digests[0, 1]
    slots.stage(SlotLoad(0, 3, 4))  # in a buffer that is to be copied from first
    assert [digest_of(slots.slot_bytes(0, slot)) for slot in (6, 7, 3)] == [world.digests[0, expert] for expert in (1, 1, 3)]


def test_several_threads_fill_slots_at_a_time(checkpoint: Callable[..., Path]) -> None:
    world = GpuWorld(checkpoint("qwen3_moe", "bfloat16"))
    slots = world.engine.slots
    num_layers, num_experts, _ = slots.shape
    with ThreadPoolExecutor(slots.readers) as threads:
        loads = [SlotLoad(layer, slot, (slot + 3) % num_experts) for layer in range(num_layers) for slot in range(num_experts)]
        loaded = list(threads.map(slots.load, loads))
    assert [one.digest for one in loaded] == [world.digests[load.layer, load.expert] for load in loads]
    table = slots.tables()[:, :num_experts].cpu()
    assert table.tolist() == [[(expert - 3) % num_experts for expert in range(num_experts)]] * num_layers
    assert [digest_of(slots.slot_bytes(load.layer, load.local_slot)) for load in loads] == [one.digest for one in loaded]


_SECOND_DEVICE_PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch
from elastic_ep.models.gpu.engine import DeviceEngine
from elastic_ep.runtime.engine import SlotLoad
from elastic_ep.runtime.weights.host import HostBackup
engine = DeviceEngine(Path(sys.argv[1]), 1, 8, kv_tokens=64, device=1)
engine.make_slots()
slots, shape = engine.slots, engine.slots.shape
loads = [SlotLoad(layer, slot, slot) for layer in range(shape[0]) for slot in range(shape[1])]
with ThreadPoolExecutor(slots.readers) as threads:
    digests = [loaded.digest for loaded in threads.map(slots.load, loads)]
backup = HostBackup(HostBackup.create(*shape), *shape)
for load, digest in zip(loads, digests):
    backup.write(load.layer, load.expert, slots.bytes_of(load.layer, load.expert), digest)
slots.backup = backup
assert slots._mapped.wait_mapped(60.0)
with ThreadPoolExecutor(slots.readers) as threads:
    again = list(threads.map(lambda load: slots.load(load, (backup,), None), loads))
    list(threads.map(lambda load: slots.stage(load, (backup,), None), loads[:4]))
assert [loaded.digest for loaded in again] == digests
assert {loaded.kind for loaded in again} == {"host"}
assert not torch._C._cuda_hasPrimaryContext(0), "it has memory on a GPU that is another rank's"
engine.close()
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")
def test_threads_that_read_use_their_ranks_gpu_alone(page_checkpoint: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _SECOND_DEVICE_PROGRAM, str(page_checkpoint)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


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

    def test_one_process_of_the_host_maps_at_a_time(self, page_checkpoint: Path) -> None:
        world, backup = self.world_and_backup(page_checkpoint)
        world.engine.slots.backup = None
        program = "import fcntl, sys; fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
        command = [sys.executable, "-c", program, str(backup._fd)]
        with subprocess.Popen(command, pass_fds=[backup._fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdout.readline()
            world.engine.slots.backup = backup
            assert not world.engine.slots._mapped.wait_mapped(2.0)
            other.kill()
            other.wait()
            assert world.engine.slots._mapped.wait_mapped(20.0)
        world.engine.slots.backup = None

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

    def test_what_is_staged_for_an_empty_slot_lies_in_it(self, page_checkpoint: Path) -> None:
        world, backup = self.world_and_backup(page_checkpoint)
        slots, wanted = world.engine.slots, world.digests[0, 5]
        sources = (backup, slots.checkpoint)

        def empty() -> None:
            with pytest.raises(CheckpointError):
                slots.load(SlotLoad(0, 3, 5), (backup,), wanted ^ 1)
            assert digest_of(slots.slot_bytes(0, 3)) == wanted, "what was read, though refused"

        empty()
        assert slots.bytes_of(0, 3) is None
        assert slots.stage(SlotLoad(0, 3, 5), sources, wanted).digest == wanted
        assert digest_of(slots.slot_bytes(0, 3)) == wanted
        assert slots.adopt(SlotLoad(0, 3, 5)) == wanted
        slots.stage(SlotLoad(0, 3, 1), sources, world.digests[0, 1])
        assert digest_of(slots.slot_bytes(0, 3)) == wanted, "a slot that holds something is staged beside"
        empty()
        slots.stage(SlotLoad(0, 3, 5), sources, wanted)
        slots.load(SlotLoad(0, 3, 1), sources, world.digests[0, 1])
        assert slots.adopt(SlotLoad(0, 3, 5)) is None, "the slot was filled with another meanwhile"
        local = (LocalSource(slots.bytes_of), slots.checkpoint)
        assert slots.stage(SlotLoad(0, 2, 6), local, world.digests[0, 6])[:2] == (world.digests[0, 6], "local")
        assert slots.adopt(SlotLoad(0, 2, 6)) == world.digests[0, 6]
        assert digest_of(slots.slot_bytes(0, 2)) == world.digests[0, 6]
        slots.memory[0][7][5] += 1
        torch.cuda.synchronize()
        passed_over = slots.stage(SlotLoad(0, 4, 7), local, world.digests[0, 7])
        assert passed_over.kind == "checkpoint"
        assert "in another slot" in passed_over.errors[0]
        assert digest_of(slots.slot_bytes(0, 3)) == world.digests[0, 1]
        slots.backup = None


@pytest.fixture(scope="session")
def page_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.checkpoints import config_of, save_checkpoint

    config = config_of("qwen3_moe", moe_intermediate_size=64)
    return save_checkpoint(tmp_path_factory.mktemp("pages") / f"qwen-{os.getpid()}", config, "bfloat16")
