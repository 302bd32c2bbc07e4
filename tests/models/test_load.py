"""Checkpoints that cannot be served are refused before anything is loaded, with the name of what is wrong; loads are verified."""

from __future__ import annotations

import json
import mmap
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic_ep.core.errors import CheckpointError, ElasticEPError, InvalidInputError
from elastic_ep.models.slots import ExpertSlots
from elastic_ep.models.spec import inspect_checkpoint
from elastic_ep.runtime.engine import SlotLoad
from elastic_ep.runtime.weights.base import ExpertSource, SlotLayout, digest_of
from tests.checkpoints import FAMILIES, config_of, save_checkpoint, save_sparse
from tests.models.world import World


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the Qwen3-MoE checkpoint that a test may spoil."""
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_spec(family: str, dtype: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(family, dtype)
    spec, config = inspect_checkpoint(folder), config_of(family)
    assert spec.num_layers == {"qwen3_moe": 2, "deepseek_v3": 2, "mixtral": 3, "gpt_oss": 3}[family]
    assert (spec.num_experts, spec.num_experts_per_tok) == (config.num_local_experts, config.num_experts_per_tok)
    assert (spec.vocab_size, spec.max_positions, spec.dtype, spec.eos_token_ids) == (160, 512, dtype, ())
    stored = sum(t.end - t.begin for t in spec.tensors.values())
    assert spec.total_bytes == stored, "every tensor of the file is dense or an expert's"


def test_spec_needs_no_framework(checkpoint: Callable[..., Path]) -> None:
    code = "import sys; from elastic_ep.models.spec import inspect_checkpoint as i; i(sys.argv[1]); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code, str(checkpoint("gpt_oss"))], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "False"


def test_eos_from_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert inspect_checkpoint(folder).eos_token_ids == (5, 7)


def spoil_nothing(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])


def spoil_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def spoil_json(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:10] = b"??"
    path.write_bytes(data)


def spoil_shape(folder: Path) -> None:
    def edit(tensors: dict) -> None:
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        tensors[name] = tensors[name][:-1].clone()

    edit_tensors(folder, edit)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (spoil_nothing, CheckpointError, "is not a folder"),
        (lambda f: (f / "config.json").unlink(), CheckpointError, "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, "config.json"),
        (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "no JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "no model.safetensors"),
        (spoil_truncated, CheckpointError, "model.safetensors is truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), CheckpointError, "truncated"),
        (spoil_header, CheckpointError, "truncated or no safetensors file"),
        (spoil_json, CheckpointError, "damaged header"),
        (spoil_shape, CheckpointError, r"experts\.3\.up_proj\.weight .* \[39, 64\].*\[40, 64\]"),
        (
            lambda f: edit_tensors(f, lambda t: t.pop("model.layers.2.mlp.experts.7.down_proj.weight")),
            CheckpointError,
            r"lacks model\.layers\.2\.mlp\.experts\.7\.down_proj\.weight: config\.json says 8 experts",
        ),
        (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), CheckpointError, r"lacks tensor model\.norm\.weight \[64\]"),
        (lambda f: edit_config(f, num_local_experts=9), CheckpointError, r"layers\.1\.mlp\.gate\.weight .*\[8, 64\].*\[9, 64\]"),
        (lambda f: edit_config(f, architectures=["LlamaForCausalLM"]), InvalidInputError, "LlamaForCausalLM; supported.*Qwen3Moe"),
        (lambda f: edit_config(f, quantization_config={"quant_method": "mxfp4"}), InvalidInputError, r"quantized \(mxfp4\)"),
        (lambda f: edit_config(f, rope_parameters={"rope_type": "dynamic"}), InvalidInputError, "rope type 'dynamic'"),
        (lambda f: edit_config(f, mlp_only_layers=[0, 1, 2]), InvalidInputError, "no layer with routed experts"),
        (lambda f: edit_config(f, hidden_size=None), CheckpointError, "lacks 'hidden_size'"),
        (lambda f: edit_config(f, num_hidden_layers="three"), CheckpointError, "value of the wrong kind"),
    ],
)
def test_bad_checkpoint(spoil: Callable[[Path], Any], error: type[ElasticEPError], words: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(error, match=words) as caught:
        inspect_checkpoint(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_shard(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", config_of("mixtral"), max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        inspect_checkpoint(folder)


def test_index_that_lies(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", config_of("mixtral"), max_shard_size="60KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is not in"):
        inspect_checkpoint(folder)


def test_fewer_experts_in_a_fused_tensor(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("gpt_oss"), tmp_path / "model"))
    name = "model.layers.1.mlp.experts.down_proj"
    edit_tensors(folder, lambda t: t.update({name: t[name][:5].clone()}))
    with pytest.raises(CheckpointError, match=r"down_proj .*\[5, 32, 64\].*\[6, 32, 64\]"):
        inspect_checkpoint(folder)


def test_config_that_transformers_refuses(folder: Path) -> None:
    edit_config(folder, rms_norm_eps="small")
    with pytest.raises(CheckpointError, match=r"transformers refuses .*config\.json: .*rms_norm_eps"):
        World(folder)


def expert_offset(folder: Path, layer: int, expert: int) -> int:
    return inspect_checkpoint(folder).tensors[f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"].begin


def test_digests(folder: Path) -> None:
    """Equal for the same expert in any slot, different for others; a flipped bit is refused and the slot holds nothing."""
    world = World(folder, [[0, 1, 0], [1, 1, 2]])
    digests = world.digests
    assert digests[0, 0] == digests[0, 2]
    assert digests[1, 0] == digests[1, 1]
    assert len(set(digests.values())) == 4
    at = expert_offset(folder, 2, 1)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(at + 40)
        byte = file.read(1)[0]
        file.seek(at + 40)
        file.write(bytes([byte ^ 16]))
    assert World(folder, [[0], [1]]).digests[1, 0] != digests[1, 0]
    with pytest.raises(CheckpointError, match="expert 1 of MoE layer 1"):
        world.engine.slots.load(SlotLoad(1, 0, 1))
    assert world.engine.slots.find(1, 1) is world.engine.slots._slots[1][1].weights, "the slot that was not touched still serves"
    with pytest.raises(CheckpointError):
        world.engine.slots.load(SlotLoad(1, 1, 1))
    assert world.engine.slots.find(1, 1) is None


def test_file_that_shrinks_while_served(folder: Path) -> None:
    world = World(folder, [[0], [0]])
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(expert_offset(folder, 2, 3) + 10)
    with pytest.raises(CheckpointError, match=r"ends inside .*experts\.3"):
        world.engine.slots.load(SlotLoad(1, 0, 3))
    assert world.engine.slots.find(1, 0) is None


def test_slot_outside(checkpoint: Callable[..., Path]) -> None:
    world = World(checkpoint("mixtral"), [[0], [0], [0]])
    for load in (SlotLoad(3, 0, 0), SlotLoad(0, 1, 0), SlotLoad(0, 0, 6), SlotLoad(0, 0, -1)):
        with pytest.raises(InvalidInputError, match="outside 3 MoE layers, 1 local slots, 6 experts"):
            world.engine.slots.load(load)


_MEMORY_PROGRAM = """
import importlib, os, re, sys
from elastic_ep.models.engine import ElasticEngine
from elastic_ep.runtime.engine import SlotLoad
folders = sys.argv[1:]
for family in ("qwen3_moe", "gpt_oss"):
    importlib.import_module(f"transformers.models.{family}.modeling_{family}")
def kib(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
for folder in folders:
    child = os.fork()  # a child's peak starts at what it has
    if child == 0:
        before = kib("VmHWM")
        engine = ElasticEngine(folder, 0, 8, kv_tokens=1 << 20)
        engine.make_slots()
        engine.load_dense()
        for layer in range(engine.spec.num_layers):
            for slot in range(8):
                engine.slots.load(SlotLoad(layer, slot, slot))
        print(kib("VmHWM") - before, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_peak_memory(tmp_path: Path) -> None:
    """A rank's peak is dense + its experts + 10 %, of a checkpoint several times as large; one tensor per expert or one for all."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 4, "vocab_size": 16000, "num_attention_heads": 16, "head_dim": 64}
    experts = {
        "qwen3_moe": {"moe_intermediate_size": 768, "mlp_only_layers": [], "num_experts": 64, "tie_word_embeddings": False},
        "gpt_oss": {"intermediate_size": 768, "num_local_experts": 64},
    }
    folders = [save_sparse(tmp_path / family, config_of(family, **sizes, **experts[family])) for family in experts]
    out = subprocess.run(
        [sys.executable, "-c", _MEMORY_PROGRAM, *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    for folder, line in zip(folders, out.stdout.split(), strict=True):
        spec, peak = inspect_checkpoint(folder), int(line) * 1024
        share = spec.dense_bytes + spec.num_layers * 8 * spec.expert_bytes
        print(f"{folder.name}: peak {peak >> 20} MiB, share {share >> 20} MiB, checkpoint {spec.total_bytes >> 20} MiB")
        assert spec.total_bytes > 4 * share
        assert share * 0.95 < peak < share * 1.1


def test_staged_memory_is_used_again(checkpoint: Callable[..., Path]) -> None:
    """A slot that adopts an expert gives its memory to the next staging; what is dropped is used again, too."""
    slots = World(checkpoint("mixtral"), [[0, 1], [0, 1], [0, 1]]).engine.slots
    buffers = lambda: {id(buffer.memory) for layer in slots._slots for buffer in layer} | {id(buffer.memory) for buffer in slots._free}  # noqa: E731
    first = slots.slot_bytes(1, 0)
    slots.stage(SlotLoad(1, 0, 4))
    known = buffers() | {id(slots._staged[1, 0].buffer.memory)}
    assert slots.find(1, 4) is None
    assert slots.adopt(SlotLoad(1, 0, 4)) is not None
    assert slots.find(1, 4) is slots._slots[1][0].weights
    assert slots.find(1, 0) is None
    assert any(buffer.memory is first for buffer in slots._free)
    for expert in range(6):
        slots.stage(SlotLoad(1, 0, expert))
    assert slots.adopt(SlotLoad(1, 0, 3)) is None, "another expert was staged for it"
    slots.stage(SlotLoad(2, 1, 5))
    slots.drop_staged()
    assert buffers() == known
    assert slots.find(1, 4) is slots._slots[1][0].weights


class Paced:
    """The checkpoint, which waits before it fills the slot with the experts named."""

    kind = "checkpoint"

    def __init__(self, source: ExpertSource, *experts: int) -> None:
        self.source, self.experts = source, experts
        self.begun, self.gate = threading.Event(), threading.Event()

    def read(self, layer: int, expert: int, slot: torch.Tensor) -> Any:
        if expert in self.experts:
            self.begun.set()
            assert self.gate.wait(20.0)
        return self.source.read(layer, expert, slot)

    def known_digest(self, layer: int, expert: int) -> int | None:
        return None

    def close(self) -> None: ...


def test_touched_slots_have_their_memory() -> None:
    layout = SlotLayout((("gate_up_proj", (1024, 1024)), ("down_proj", (1024, 512))), torch.float32)
    slots = ExpertSlots(2, 4, 8, layout, Paced(None), False, 0)  # type: ignore[arg-type]
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE  # noqa: E731
    before = resident()
    slots.touch()
    assert resident() - before > 0.9 * 8 * layout.num_bytes


def test_what_is_staged_for_an_empty_slot_lies_there_already(checkpoint: Callable[..., Path]) -> None:
    slots = World(checkpoint("mixtral"), [[0, -1], [0, -1], [0, -1]]).engine.slots
    own = slots._slots[0][1]
    digest = slots.stage(SlotLoad(0, 1, 5)).digest
    assert slots.bytes_of(0, 5) is None, "nobody is sent what is only staged"
    assert not slots.addresses()[0, 5]
    assert slots.adopt(SlotLoad(0, 1, 5)) == digest
    assert slots.find(0, 5) is own.weights
    assert slots.addresses()[0, 5] == own.memory.data_ptr()
    assert not slots._free
    slots.stage(SlotLoad(1, 1, 4))
    slots.drop_staged()
    assert slots.load(SlotLoad(1, 1, 2)).digest == digest_of(slots.slot_bytes(1, 1))
    assert not slots._free, "a slot's own memory stays its own"
    slots.stage(SlotLoad(0, 1, 2))
    assert slots.find(0, 5) is own.weights, "a slot that serves is not read into"
    slots.adopt(SlotLoad(0, 1, 2))
    assert [id(buffer) for buffer in slots._free].count(id(own)) == 1


@pytest.mark.parametrize("adopted", [False, True])
def test_a_slot_is_loaded_while_an_order_that_was_given_up_still_reads_for_it(checkpoint: Callable[..., Path], adopted: bool) -> None:
    """The two never share memory, whichever ends first."""
    slots = World(checkpoint("mixtral"), [[0, -1], [0, -1], [0, -1]]).engine.slots
    paced = Paced(slots.checkpoint, 5)
    stager = threading.Thread(target=slots.stage, args=(SlotLoad(0, 1, 5), (paced,)))
    stager.start()
    assert paced.begun.wait(20.0)
    if adopted:
        assert slots.adopt(SlotLoad(0, 1, 2)) is None
    loaded = slots.load(SlotLoad(0, 1, 2))
    paced.gate.set()
    stager.join(20.0)
    assert digest_of(slots.slot_bytes(0, 1)) == loaded.digest
    slots.drop_staged()
    staged = slots.stage(SlotLoad(0, 1, 4))
    assert digest_of(slots.slot_bytes(0, 1)) == loaded.digest
    assert slots.adopt(SlotLoad(0, 1, 4)) == staged.digest == digest_of(slots.slot_bytes(0, 1))
    assert (len({id(buffer) for buffer in slots._free}), slots._lent) == (len(slots._free), set())


def test_the_lowest_slot_serves(checkpoint: Callable[..., Path]) -> None:
    slots = World(checkpoint("mixtral"), [[2, 1, 2], [0, 0, 0], [0, 1, 2]]).engine.slots
    weights = lambda slot: slots._slots[0][slot].weights  # noqa: E731
    assert slots.find(0, 2) is weights(0)
    slots.load(SlotLoad(0, 0, 1))
    assert (slots.find(0, 2), slots.find(0, 1)) == (weights(2), weights(0))
    slots.load(SlotLoad(0, 2, 5))
    assert slots.find(0, 2) is None
    assert (slots.find(0, 1), slots.find(0, 5)) == (weights(0), weights(2))
