"""From a request body to the sequences that it asks for: prompts as ids, lengths, seeds. Nothing is submitted here."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_ep.brain.messages import SamplingParams
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.serving.api.errors import ApiError, bad_request, shown
from elastic_ep.serving.api.requests import ChatCompletionRequest, CompletionRequest, GenerationBody
from elastic_ep.serving.backend import Backend, GenerationRequest
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
        n: choices per prompt.
        num_logprobs: None tells none.
        with_token_ids: tell the ids, too; always so for a checkpoint without a tokenizer.
    """

    id: str
    created: int
    model: str
    requests: tuple[GenerationRequest, ...]
    prompts: tuple[tuple[int, ...], ...]
    n: int
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
    max_tokens = body.max_tokens
    prompts, lengths = [], []
    texts = _split_prompts(body.prompt)
    num_choices = len(texts) * (body.n or 1)
    if num_choices > MAX_CHOICES_AT_ONCE:
        what = f"{len(texts)} prompts with n {body.n or 1} ask for {num_choices} choices"
        raise bad_request(f"{what}; ask for at most {MAX_CHOICES_AT_ONCE} at once", "prompt")
    for prompt in texts:
        ids = await _encode(tokenizer, prompt, backend, "prompt") if isinstance(prompt, str) else prompt
        _check_ids(ids, backend.vocab_size)
        prompts.append(tuple(ids))
        lengths.append(_length(len(ids), max_tokens, DEFAULT_COMPLETION_TOKENS, backend, "prompt"))
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
    ids = await _encode(tokenizer, text, backend, "messages")
    if not ids:
        raise bad_request("messages give an empty prompt; give at least one token", "messages")
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    length = _length(len(ids), max_tokens, backend.max_model_len, backend, "messages")
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _plan("chatcmpl-", body, backend, tokenizer, [tuple(ids)], [length], num_logprobs)


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
        n=n,
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


def _split_prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt


async def _encode(tokenizer: Tokenizer, text: str, backend: Backend, param: str) -> Sequence[int]:
    """Ids of a prompt; a long one in a thread, so that the event loop goes on."""
    encode = tokenizer.encode if param == "prompt" else tokenizer.encode_chat
    limit = backend.max_model_len * MAX_CHARS_PER_TOKEN
    if len(text) > limit:
        raise _too_long(f"a prompt of {len(text)} characters is longer than", backend, param, "shorten it")
    try:
        ids = await asyncio.to_thread(encode, text) if len(text) > LONG_TEXT_CHARS else encode(text)
    except InvalidInputError as error:
        raise bad_request(str(error), param) from None
    if not ids:
        raise bad_request(f"{param} {shown(text)} has no tokens; give at least one", param)
    return ids


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise bad_request(f"prompt holds token id {shown(wrong)}, outside the vocabulary; use ids from 0 to {vocab_size - 1}", "prompt")


def _length(num_prompt_tokens: int, max_tokens: int | None, default: int, backend: Backend, param: str) -> int:
    """How many tokens to generate at most: what was asked for, or the default as far as the context reaches."""
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
