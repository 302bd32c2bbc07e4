"""From a request body to the sequences that it asks for: prompts as ids, lengths, seeds. Nothing is submitted here."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_ep.brain.events import GenerationRequest
from elastic_ep.brain.messages import SamplingParams
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.serving.api.errors import ApiError, bad_request, shown
from elastic_ep.serving.api.requests import ChatCompletionRequest, CompletionRequest, GenerationBody
from elastic_ep.serving.backend import Backend
from elastic_ep.serving.text import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
MAX_CHOICES_AT_ONCE = 2048
LONG_TEXT_CHARS = 4000
"""Texts longer than this are tokenized in a thread (at 2 MB/s, 4000 characters take 2 ms)."""
MAX_CHARS_PER_TOKEN = 128
"""No tokenizer in use has longer tokens: a text beyond this many per token of context need not be tokenized to be refused."""

_MASK = 2**64 - 1


@dataclass(frozen=True)
class Plan:
    """What one HTTP request generates and how the answer is told.

    Attributes:
        requests: one per choice; choice `index` is prompt index * n + i.
        prompts: token ids of each prompt.
        num_logprobs: None tells none.
        with_token_ids: tell the ids, too; always so for a checkpoint without a tokenizer.
    """

    id: str
    created: int
    model: str
    requests: tuple[GenerationRequest, ...]
    prompts: tuple[tuple[int, ...], ...]
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    with_token_ids: bool
    num_logprobs: int | None

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def choice_seed(seed: int, i: int) -> int:
    """Seed of choice i of a request: the request's own (mod 2^64) for i = 0, else SplitMix64's i-th output after it."""
    seed &= _MASK
    if i == 0:
        return seed
    z = (seed + i * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


async def plan_completion(body: CompletionRequest, backend: Backend, tokenizer: Tokenizer) -> Plan:
    """Raises ApiError or InvalidInputError naming what cannot be served."""
    _check_common(body, backend, tokenizer)
    texts, ids = _split_prompts(body.prompt)
    num_prompts = len(texts) + len(ids)
    num_choices = num_prompts * (body.n or 1)
    if num_choices > MAX_CHOICES_AT_ONCE:
        what = f"{num_prompts} prompts with n {body.n or 1} ask for {num_choices} choices"
        raise bad_request(f"{what}; ask for at most {MAX_CHOICES_AT_ONCE} at once", "prompt")
    prompts = await _encode(tokenizer.encode, texts, backend, "prompt") if texts else list(map(tuple, ids))
    lengths = [_length(prompt, body.max_tokens, DEFAULT_COMPLETION_TOKENS, backend, "prompt") for prompt in prompts]
    return _plan("cmpl-", body, backend, tokenizer, prompts, lengths, body.logprobs)


async def plan_chat(body: ChatCompletionRequest, backend: Backend, tokenizer: Tokenizer) -> Plan:
    """Raises ApiError or InvalidInputError naming what cannot be served."""
    _check_common(body, backend, tokenizer)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request(f"top_logprobs {body.top_logprobs} needs logprobs: true; add it or remove top_logprobs", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise bad_request("max_tokens and max_completion_tokens mean the same; give one of them", "max_tokens")
    messages = [{"role": m.role, "content": m.text()} | ({"name": m.name} if m.name else {}) for m in body.messages]
    try:
        text = tokenizer.render_chat(messages, body.chat_template_kwargs or {})
    except InvalidInputError as error:
        raise bad_request(str(error), "messages") from None
    prompts = await _encode(tokenizer.encode_chat, [text], backend, "messages")
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    lengths = [_length(ids, max_tokens, backend.max_model_len, backend, "messages") for ids in prompts]
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _plan("chatcmpl-", body, backend, tokenizer, prompts, lengths, num_logprobs)


def _plan(
    prefix: str,
    body: GenerationBody,
    backend: Backend,
    tokenizer: Tokenizer,
    prompts: list[tuple[int, ...]],
    lengths: list[int],
    num_logprobs: int | None,
) -> Plan:
    plan_id = prefix + uuid.uuid4().hex
    n = body.n or 1
    requests: list[GenerationRequest] = []
    for prompt, length in zip(prompts, lengths, strict=True):
        seed = body.seed if body.seed is not None else secrets.randbits(64)
        for i in range(n):
            sampling = SamplingParams(
                temperature=1.0 if body.temperature is None else float(body.temperature),
                top_p=1.0 if body.top_p is None else float(body.top_p),
                seed=choice_seed(seed, i),
                top_logprobs=num_logprobs,
            )
            eos_ids = frozenset[int]() if body.ignore_eos else tokenizer.eos_ids
            requests.append(GenerationRequest(f"{plan_id}-{len(requests)}", prompt, length, sampling, eos_ids))
    return Plan(
        id=plan_id,
        created=int(time.time()),
        model=backend.model_name,
        requests=tuple(requests),
        prompts=tuple(prompts),
        stops=tuple(body.stop),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        with_token_ids=bool(body.return_token_ids) or not tokenizer.has_text,
        num_logprobs=num_logprobs,
    )


def _check_common(body: GenerationBody, backend: Backend, tokenizer: Tokenizer) -> None:
    if body.model not in (None, backend.model_name):
        message = f"model {shown(body.model)} is not served here; use {shown(backend.model_name)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream: true; add it or remove stream_options", "stream_options")
    if body.stop and not tokenizer.has_text:
        raise bad_request(f"stop {shown(body.stop)} needs text, but this checkpoint has no tokenizer; remove it", "stop")


def _split_prompts(prompt: Any) -> tuple[list[str], list[list[int]]]:
    """The prompts of a checked `prompt` as (texts, lists of ids); one of them is empty."""
    several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    return (several, []) if isinstance(several[0], str) else ([], several)


async def _encode(encode: Callable[[str], list[int]], texts: Sequence[str], backend: Backend, param: str) -> list[tuple[int, ...]]:
    """Ids of prompts; long ones in a thread, so that the event loop goes on."""
    limit = backend.max_model_len * MAX_CHARS_PER_TOKEN
    longest = max(map(len, texts))
    if longest > limit:
        raise _too_long(f"a prompt of {longest} characters is longer than", backend, param, "shorten it")

    def encode_all() -> list[tuple[int, ...]]:
        return [tuple(encode(text)) for text in texts]

    try:
        prompts = await asyncio.to_thread(encode_all) if sum(map(len, texts)) > LONG_TEXT_CHARS else encode_all()
    except InvalidInputError as error:
        raise bad_request(str(error), param) from None
    if not all(prompts):
        raise bad_request(f"{param} gives a prompt without tokens; give at least one", param)
    return prompts


def _length(ids: Sequence[int], max_tokens: int | None, default: int, backend: Backend, param: str) -> int:
    """How many tokens to generate at most: what was asked for, or the default as far as the context reaches. Checks the ids, too."""
    low, high = min(ids), max(ids)
    if low < 0 or high >= backend.vocab_size:
        wrong, limit = low if low < 0 else high, backend.vocab_size - 1
        raise bad_request(f"{param} holds token id {shown(wrong)}, outside the vocabulary; use ids from 0 to {limit}", param)
    num_prompt_tokens = len(ids)
    room = backend.max_model_len - num_prompt_tokens
    if room < 1:
        raise _too_long(f"a prompt of {num_prompt_tokens} tokens leaves no room in", backend, param, f"shorten it by at least {1 - room}")
    if max_tokens is None:
        return min(default, room)
    if max_tokens > room:
        what = f"a prompt of {num_prompt_tokens} tokens and max_tokens {shown(max_tokens)} exceed"
        raise _too_long(what, backend, "max_tokens", f"shorten the prompt or ask for at most {room}")
    return max_tokens


def _too_long(what: str, backend: Backend, param: str, cure: str) -> ApiError:
    return bad_request(f"{what} the model's context (max_model_len {backend.max_model_len}); {cure}", param, "context_length_exceeded")
