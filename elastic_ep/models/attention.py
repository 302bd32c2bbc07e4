"""Attention as transformers' modules call it, over our own keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from elastic_ep.models.build import IMPLEMENTATION
from elastic_ep.models.kv import PagedKV, Runs


class Attention(Protocol):
    """What each attention module of one engine has as `elastic_attention`."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend: query [1, heads, T, key dim], key and value [1, kv heads, T, dim] of the step's
        tokens -> [1, T, heads, value dim]."""
        ...


@dataclass
class AttentionState:
    """The attention of one engine and what it needs of the step in progress. One object shared by all layers.

    Attributes:
        num_tokens: real rows; those after it are padding and get zeros.
    """

    kv: PagedKV
    runs: Runs | None = None
    num_tokens: int = 0

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Attention.attend`."""
        assert self.runs is not None, "attention outside of a step"
        out = torch.empty(query.shape[2], query.shape[1], value.shape[3], dtype=torch.float32)
        out[self.num_tokens :] = 0
        sinks = None if sinks is None else sinks.float()
        self.kv.attend(layer, _by_token(query), _by_token(key), _by_token(value), out, self.runs, scale, window, sinks)
        return out.to(query.dtype).unsqueeze(0)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls."""
    attention: Attention = module.elastic_attention  # type: ignore[assignment]
    return attention.attend(module.layer_idx, query, key, value, scaling, sliding_window or 0, s_aux), None  # type: ignore[arg-type]


def _by_token(x: torch.Tensor) -> torch.Tensor:
    return x[0].transpose(0, 1).float().contiguous()


# No mask function is registered under this name, so transformers builds no mask.
AttentionInterface.register(IMPLEMENTATION, attend)
