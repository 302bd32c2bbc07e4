"""Arithmetic that stands in for a model: a token is a pure function of the tokens before it, and shows any wrong expert or wrong KV.

Bytes of an expert are one integer, its digest the same integer. KV of a position is one integer that depends on all tokens up to it. An
expert with other bytes changes that integer, so the token and every later one come out differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

_MASK = (1 << 61) - 1
VOCAB = 50_021
JUNK = 0x5DEECE66D
"""what a void step leaves in the KV that it was writing"""


@cache
def expert_bytes(layer: int, expert: int) -> int:
    """What the checkpoint holds for one expert."""
    return (((layer + 1) * 0x9E3779B97F4A7C15) ^ ((expert + 1) * 0xC2B2AE3D27D4EB4F)) & _MASK


def advance(state: int, token: int) -> int:
    """KV of the next position."""
    return ((state ^ (token + 1)) * 0x2545F4914F6CDD1D + 0x9E3779B9) & _MASK


def chosen_expert(state: int, layer: int, num_experts: int) -> int:
    """The expert that a position goes to in a layer."""
    return ((state >> 7) + layer * 5) % num_experts


def sample(state: int) -> int:
    return (state >> 11) % VOCAB


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """What a run without faults gives."""
    state = 0
    for token in prompt:
        state = advance(state, token)
    tokens = []
    for _ in range(count):
        tokens.append(sample(state))
        state = advance(state, tokens[-1])
    return tokens
