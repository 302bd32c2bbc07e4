"""A scripted backend and two tiny tokenizers: byte-level BPE, and SentencePiece-like with byte fallback."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from elastic_ep.brain.events import Drain, DrainRequested, GenerationRequest, ScaleRequested, TokenEvent
from elastic_ep.brain.messages import SampledToken
from elastic_ep.serving.text import TextTokenizer

CORPUS = ["hello world, the quick brown fox jumps over the lazy dog. 你好世界 émoji 🎉🎊 naïve "] * 20
EOS = "<|end|>"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<｜a b｜>", special=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁helowrdAB中", "he", "ll", "▁w", "▁he"]
    merges = [("h", "e"), ("l", "l"), ("▁", "w"), ("▁", "he")]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@dataclass
class FakeStream:
    """Plays a script; waits for `gate` before each token if there is one."""

    backend: FakeBackend
    request: GenerationRequest
    script: list[TokenEvent]
    position: int = 0
    closed: bool = False

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> TokenEvent:
        if self.position >= len(self.script):
            raise StopAsyncIteration
        if self.backend.gate is not None:
            await self.backend.gate.acquire()
        elif self.position % 7 == 0:
            await asyncio.sleep(0)
        event = self.script[self.position]
        self.position += 1
        if event.finish:
            self.closed = True
        return event

    async def aclose(self) -> None:
        if not self.closed:
            self.closed = True
            self.backend.cancelled.append(self.request.request_id)
            self.backend.cancel_seen.set()

    async def finish(self) -> None:
        await self.aclose()


def scripted(ids: list[int], eos_ids: frozenset[int], max_tokens: int, top: int | None = None) -> list[TokenEvent]:
    """Events as a real backend gives them for these sampled ids."""
    events: list[TokenEvent] = []
    for index, token in enumerate(ids):
        finish = "stop" if token in eos_ids else "length" if index + 1 == max_tokens else None
        alternatives = tuple((t, -float(k) - 0.5) for k, t in enumerate([token, *range(10)][:top])) if top else ()
        logprob = None if top is None else -0.5
        events.append(TokenEvent(SampledToken(0, token, logprob, alternatives), index, finish))
        if finish:
            return events
    raise AssertionError(f"script of {len(ids)} tokens ends before max_tokens {max_tokens}")


def _repeat(request: GenerationRequest) -> list[int]:
    """The default answer: the prompt over and over."""
    return [request.prompt_ids[i % len(request.prompt_ids)] for i in range(request.max_tokens)]


@dataclass
class FakeBackend:
    model_name: str = "tiny"
    max_model_len: int = 256
    vocab_size: int = 400
    answer: Callable[[GenerationRequest], list[int] | list[TokenEvent]] = _repeat
    refuse: Exception | None = None
    accept_only: int = 0
    gate: asyncio.Semaphore | None = None
    healthy: tuple[bool, str] = (True, "serving")
    requests: list[GenerationRequest] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    cancel_seen: asyncio.Event = field(default_factory=asyncio.Event)
    event_log: asyncio.Queue[dict[str, Any] | None] = field(default_factory=asyncio.Queue)
    unsubscribed: asyncio.Event = field(default_factory=asyncio.Event)

    def submit(self, request: GenerationRequest) -> FakeStream:
        if self.refuse is not None and len(self.requests) >= self.accept_only:
            raise self.refuse
        self.requests.append(request)
        answer = self.answer(request)
        if answer and isinstance(answer[0], int):
            answer = scripted(answer, request.eos_ids, request.max_tokens, request.sampling.top_logprobs)  # type: ignore[arg-type]
        stream = FakeStream(self, request, answer)  # type: ignore[arg-type]
        self.streams.append(stream)
        return stream

    def status(self) -> dict[str, Any]:
        rank = {"rank": 0, "pid": 1, "host": "h", "device": "cpu", "state": "active", "slots": 4, "running_requests": 2}
        recovery = {
            "epoch": 2, "ranks": [1], "kind": "killed", "tier": 1, "detect_ms": 0.4, "agree_ms": 1.0, "plan_ms": 2.0, "move_ms": 3.0,
            "resume_ms": 4.0, "stall_ms": 10.4, "experts_lost": 3, "bytes_moved": {"peer": 10, "host": 0, "checkpoint": 20},
        }  # fmt: skip
        return {
            "epoch": 2, "ep_size": 2, "active_ranks": [1, 0], "ranks": [rank], "survives": {"any_ranks": 1, "any_node": False},
            "recoveries": [recovery], "tokens_committed": 7, "requests": {"running": 2, "waiting": 3, "finished": 4, "failed": 0},
        }  # fmt: skip

    def events(self) -> FakeEvents:
        return FakeEvents(self)

    default_drain: Drain = "move"
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def begin_operation(self, request: ScaleRequested | DrainRequested) -> Awaitable[dict[str, Any]]:
        if self.refuse is not None:
            raise self.refuse
        finished: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        name = request.operation_id
        operation = {
            "operation_id": name, "operation": repr(request), "state": "done", "reason": "", "drain": request.drain,
            "joining_ranks": [], "leaving_ranks": [], "seconds": 0.0,
        }  # fmt: skip
        finished.set_result(self.done.setdefault(name, operation))
        return finished

    def operation(self, operation_id: str) -> dict[str, Any] | None:
        return self.done.get(operation_id)

    def operations(self) -> list[dict[str, Any]]:
        return list(self.done.values())

    def health(self) -> tuple[bool, str]:
        return self.healthy


@dataclass
class FakeEvents:
    backend: FakeBackend

    def __aiter__(self) -> FakeEvents:
        return self

    async def __anext__(self) -> dict[str, Any]:
        event = await self.backend.event_log.get()
        if event is None:
            raise StopAsyncIteration
        return event

    async def aclose(self) -> None:
        self.backend.unsubscribed.set()


def text_tokenizer() -> TextTokenizer:
    inner = byte_level()
    return TextTokenizer(inner, eos_ids=frozenset((inner.token_to_id(EOS),)))
