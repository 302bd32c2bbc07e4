"""Make the package's asset of a finished run: one weight file, the tokenizer, and the load trace of its router on held-out text.

    python -m training.ship DATA OUT elastic_ep/assets

DATA is what training.corpus wrote, OUT what training.train wrote. Runs on the CPU in a minute or two.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from training.corpus import END

WINDOW = 2048
"""tokens of one snapshot of the trace, one sequence each"""
NUM_WINDOWS = 24
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def load_trace(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """int32 [NUM_WINDOWS, L, E]: pairs (token, expert) in windows of WINDOW tokens spread evenly over `ids`."""
    counts: list[torch.Tensor] = []
    num_experts = model.config.num_experts

    def count(module: torch.nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
        counts.append(torch.bincount(output[2].flatten(), minlength=num_experts))

    hooks = [layer.mlp.gate.register_forward_hook(count) for layer in model.model.layers]
    trace = []
    for start in np.linspace(0, len(ids) - WINDOW, NUM_WINDOWS).astype(int):
        counts.clear()
        with torch.inference_mode():
            model.model(input_ids=torch.from_numpy(ids[start : start + WINDOW].astype(np.int64))[None], use_cache=False)
        trace.append(torch.stack(counts).numpy())
    for hook in hooks:
        hook.remove()
    return np.stack(trace).astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "out", "assets"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    folder = args.assets / "demo_model"
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="16.7MB")
    core = Tokenizer.from_file(str(args.data / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, clean_up_tokenization_spaces=False, model_max_length=WINDOW)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    trace = load_trace(model.float(), np.fromfile(args.data / "val.bin", dtype=np.uint16))
    np.savez_compressed(args.assets / "demo_load.npz", load=trace)
    total = trace.sum(0)
    busiest = total.max(1) / total.mean(1)
    print(f"{trace.shape} pairs; busiest expert over the mean, by layer: {np.round(busiest, 2).tolist()}")


if __name__ == "__main__":
    main()
