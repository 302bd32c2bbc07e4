"""Train the demo's model: a Qwen3-MoE of 8.2 M parameters, on one GPU, in minutes.

    python3 -m training.train DATA OUT --minutes 7.5

DATA is what training.corpus wrote. OUT gets the checkpoint (bfloat16, rewritten every minute), loss.csv and run.json.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

SEQUENCE = 2048
BALANCE_WEIGHT = 0.01
WARMUP_STEPS = 200
LAST_RATE = 0.02
"""of the highest learning rate, at the end of the cosine"""
SAVE_EVERY_S = 60.0
MEASURED_STEPS = (10, 40)
"""the steps whose time decides how many fit into the minutes"""


def model_config(**changes: Any) -> Qwen3MoeConfig:
    """8 layers of 32 experts (top 4), hidden 256: 8.2 M parameters, 2.7 M of them at work for one token."""
    sizes = {
        "vocab_size": 2048,
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 32,  # of dense layers, and there are none
        "moe_intermediate_size": 32,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "max_position_embeddings": SEQUENCE,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    return Qwen3MoeConfig(**(sizes | changes))


# ---- the model in training: experts as two grouped products, routers that keep their balance loss


class _Reorder(torch.autograd.Function):
    """Rows in another order. The gradient is the inverse order: a copy, where autograd would add up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.saved_tensors[1]), None, None


def grouped_experts(module: Any, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """The experts' sum [T, H] for x [T, H], ids and weights [T, K], in bfloat16 over rows sorted by expert."""
    num_tokens, k = topk_ids.shape
    flat = topk_ids.reshape(-1)
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.zeros(module.num_experts, dtype=torch.int32, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat, dtype=torch.int32)
    )
    ends = counts.cumsum(0, dtype=torch.int32)
    rows = _Reorder.apply(x.bfloat16().unsqueeze(1).expand(-1, k, -1).reshape(num_tokens * k, -1), order, inverse)
    gate, up = F.grouped_mm(rows, module.gate_up_proj.bfloat16().transpose(1, 2), offs=ends).chunk(2, dim=-1)
    rows = F.grouped_mm(F.silu(gate) * up, module.down_proj.bfloat16().transpose(1, 2), offs=ends)
    parts = _Reorder.apply(rows, inverse, order).view(num_tokens, k, -1)
    return (parts * topk_weights.to(parts.dtype).unsqueeze(-1)).sum(1).to(x.dtype)


class BalancedRouter(Qwen3MoeTopKRouter):
    """Keeps `balance`: E * sum over experts of share of pairs * mean probability, 1 when all are used alike (Switch Transformer, eq. 4)."""

    balance: torch.Tensor

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, weights, ids = super().forward(hidden_states)
        share = F.one_hot(ids, self.num_experts).float().mean((0, 1))
        self.balance = self.num_experts * (share * logits.float().softmax(-1).mean(0)).sum()
        return logits, weights, ids


def build(config: Qwen3MoeConfig, device: str) -> Qwen3MoeForCausalLM:
    ALL_EXPERTS_FUNCTIONS.register("training_grouped", grouped_experts)
    model = Qwen3MoeForCausalLM._from_config(
        config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="training_grouped"
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj")):  # the layers' outputs add up: start them small
            nn.init.normal_(parameter, std=config.initializer_range / math.sqrt(2 * config.num_hidden_layers))
    for layer in model.model.layers:
        layer.mlp.gate.__class__ = BalancedRouter
    return model.to(device)


# ---- training


@dataclass(frozen=True)
class Settings:
    """Of one run. `minutes` bounds it where `steps` is None."""

    data: Path
    out: Path
    minutes: float
    steps: int | None
    batch: int
    rate: float
    decay: float
    compiled: bool
    seed: int = 6


class Texts:
    """Token streams on the device, cut into windows of SEQUENCE + 1."""

    def __init__(self, folder: Path, device: str, sequence: int):
        self.train, self.val = (
            torch.from_numpy(np.fromfile(folder / f"{name}.bin", dtype=np.uint16).astype(np.int64)).to(device) for name in ("train", "val")
        )
        self._window = torch.arange(sequence + 1, device=device)

    def batch(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """[size, SEQUENCE + 1] from anywhere in the training text."""
        starts = torch.randint(len(self.train) - len(self._window), (size, 1), generator=generator)
        return self.train[starts.to(self.train.device) + self._window]

    def validation(self, size: int) -> Iterator[torch.Tensor]:
        """All of the held-out text, in order, in batches of at most `size`."""
        starts = torch.arange(0, len(self.val) - len(self._window), len(self._window) - 1, device=self.val.device)
        for chunk in starts.split(size):
            yield self.val[chunk[:, None] + self._window]


def loss_of(model: Qwen3MoeForCausalLM, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy in nats per token, mean balance over layers) of [B, SEQUENCE + 1]."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    balance = torch.stack([layer.mlp.gate.balance for layer in model.model.layers]).mean()
    return loss, balance


@torch.no_grad()
def validate(model: Qwen3MoeForCausalLM, texts: Texts, size: int) -> float:
    """Nats per token over the held-out text."""
    total, count = 0.0, 0
    for tokens in texts.validation(size):
        total += loss_of(model, tokens)[0].item() * len(tokens)
        count += len(tokens)
    return total / max(count, 1)


def rate_at(step: int, steps: int) -> float:
    """Share of the highest rate: linear warm-up, then a cosine down to LAST_RATE."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = min(1.0, (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS))
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_of(model: nn.Module, settings: Settings, device: str) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms and embeddings do not."""
    named = list(model.named_parameters())
    plain = [p for name, p in named if p.ndim < 2 or "embed" in name]
    decayed = [p for name, p in named if not (p.ndim < 2 or "embed" in name)]
    groups = [{"params": decayed, "weight_decay": settings.decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=device == "cuda")


def save(model: Qwen3MoeForCausalLM, folder: Path) -> None:
    """In bfloat16, in shards of at most 9 MB."""
    half = copy.deepcopy(model).to("cpu", torch.bfloat16)
    for layer in half.model.layers:
        layer.mlp.gate.__class__ = Qwen3MoeTopKRouter
        layer.mlp.gate.__dict__.pop("balance", None)
    half.save_pretrained(folder, max_shard_size="9MB")


def train(settings: Settings, config: Qwen3MoeConfig) -> dict[str, Any]:
    """Returns, and writes to run.json, what came out."""
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    settings.out.mkdir(parents=True, exist_ok=True)
    texts = Texts(settings.data, device, config.max_position_embeddings)
    model = build(config, device)
    optimizer = optimizer_of(model, settings, device)
    if settings.compiled:
        for layer in model.model.layers:
            layer.compile()
    steps, step, saved = settings.steps, 0, started
    clock = started
    rows: list[tuple[int, float, float, float, float]] = []
    sums = torch.zeros(2, device=device)
    facts: dict[str, Any] = {}

    def report() -> None:
        nonlocal sums
        mean = (sums / max(1, step - (rows[-1][0] if rows else 0))).tolist()
        sums = torch.zeros(2, device=device)
        val = validate(model, texts, settings.batch)
        rows.append((step, round(time.monotonic() - started, 1), round(mean[0], 4), round(val, 4), round(mean[1], 4)))
        print(f"step {step} of {steps}: {rows[-1][1]} s, train {mean[0]:.4f}, val {val:.4f}, balance {mean[1]:.3f}", flush=True)
        with (settings.out / "loss.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("step", "seconds", "train_loss", "val_loss", "balance"), *rows])
        facts.update(
            step=step,
            steps=steps,
            parameters=sum(p.numel() for p in model.parameters()),
            tokens=step * settings.batch * config.max_position_embeddings,
            train_loss=rows[-1][2],
            val_loss=rows[-1][3],
            balance=rows[-1][4],
            seconds=rows[-1][1],
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            torch=torch.__version__,
            **{name: getattr(settings, name) for name in ("batch", "rate", "decay", "compiled", "seed")},
        )
        (settings.out / "run.json").write_text(json.dumps(facts, indent=1) + "\n")

    while steps is None or step < steps:
        if step in MEASURED_STEPS and device == "cuda":
            torch.cuda.synchronize()
        if step == MEASURED_STEPS[0]:
            clock = time.monotonic()
        elif step == MEASURED_STEPS[1] and steps is None:
            each = (time.monotonic() - clock) / (MEASURED_STEPS[1] - MEASURED_STEPS[0])
            left = settings.minutes * 60 - (time.monotonic() - started)
            steps = step + max(1, int(left / (each * 1.06)))  # 6 % for validation and saving
            print(f"{each * 1e3:.1f} ms a step: {steps} steps", flush=True)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * rate_at(step, steps or 10**6)
        loss, balance = loss_of(model, texts.batch(settings.batch, generator))
        (loss + BALANCE_WEIGHT * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums += torch.stack([loss.detach(), balance.detach()])
        step += 1
        if step % 100 == 0 and step != steps:
            report()
            if time.monotonic() - saved > SAVE_EVERY_S:
                save(model, settings.out)
                saved = time.monotonic()
    report()
    save(model, settings.out)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--steps", type=int, help="instead of --minutes")
    parser.add_argument("--batch", type=int, default=32, help=f"sequences of {SEQUENCE} tokens in a step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--compile", action="store_true", dest="compiled", help="compile each layer")
    print(json.dumps(train(Settings(**vars(parser.parse_args())), model_config())))


if __name__ == "__main__":
    main()
