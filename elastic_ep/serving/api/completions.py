"""The answer of /v1/completions: whole and as events."""

from __future__ import annotations

from typing import Any

from elastic_ep.brain.messages import SampledToken
from elastic_ep.serving.api.answers import FINISH, alternatives, encode, finite, sse
from elastic_ep.serving.api.generation import Delta
from elastic_ep.serving.api.plan import Plan
from elastic_ep.serving.text import Tokenizer


class CompletionFormat:
    """An AnswerFormat. `text_offset` of logprobs counts characters from the start of the choice's own text."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer):
        self._plan = plan
        self._tokenizer = tokenizer
        self._offsets = [0] * len(plan.requests)
        self._is_first = [plan.with_token_ids] * len(plan.requests)
        base = encode({"id": plan.id, "object": "text_completion", "created": plan.created, "model": plan.model})[:-1]
        self._base = base
        self._heads = [b'data: %s,"choices":[{"index":%d,"text":' % (base, i) for i in range(len(plan.requests))]
        self._tail = b'}],"usage":null}\n\n' if plan.include_usage else b"}]}\n\n"

    def opening(self) -> bytes:
        return b""

    def event(self, delta: Delta) -> bytes:
        logprobs = b"null"
        if self._plan.num_logprobs is not None:
            logprobs = encode(self._logprobs([delta]))
        extra = self._ids(delta) if self._plan.with_token_ids else b""
        return b'%s%s,"logprobs":%s,"finish_reason":%s%s%s' % (
            self._heads[delta.choice], encode(delta.text), logprobs, FINISH[delta.finish], extra, self._tail,
        )  # fmt: skip

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        return sse(b'%s,"choices":[],"usage":%s}' % (self._base, encode(usage)))

    def whole(self, deltas: list[list[Delta]], usage: dict[str, Any]) -> dict[str, Any]:
        plan = self._plan
        choices = [self._choice(i, parts) for i, parts in enumerate(deltas)]
        base = {"id": plan.id, "object": "text_completion", "created": plan.created, "model": plan.model}
        return base | {"choices": choices, "usage": usage}

    def _choice(self, index: int, parts: list[Delta]) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": "".join(part.text for part in parts),
            "logprobs": None if self._plan.num_logprobs is None else self._logprobs(parts),
            "finish_reason": parts[-1].finish,
        }
        if self._plan.with_token_ids:
            choice["prompt_token_ids"] = self._prompt_of(index)
            choice["token_ids"] = [part.token.token for part in parts if part.token is not None]
        return choice

    def _prompt_of(self, index: int) -> tuple[int, ...]:
        return self._plan.requests[index].prompt_ids

    def _ids(self, delta: Delta) -> bytes:
        ids = b',"token_ids":[%s]' % (b"" if delta.token is None else b"%d" % delta.token.token)
        if self._is_first[delta.choice]:
            self._is_first[delta.choice] = False
            ids += b',"prompt_token_ids":' + encode(self._prompt_of(delta.choice))
        return ids

    def _logprobs(self, parts: list[Delta]) -> dict[str, Any]:
        tokens, logprobs, top, offsets = [], [], [], []
        for part in parts:
            if part.token is not None:
                tokens.append(self._tokenizer.label(part.token.token).text)
                logprobs.append(finite(part.token.logprob))
                top.append(self._top(part.token))
                offsets.append(self._offsets[part.choice])
            self._offsets[part.choice] += len(part.text)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def _top(self, token: SampledToken) -> dict[str, float | None]:
        """Label -> logprob of the best tokens, and of the sampled one, also where it is not among them."""
        label = self._tokenizer.label
        best = {label(t).text: logprob for t, logprob in alternatives(token, self._plan.num_logprobs or 0)}
        return {label(token.token).text: finite(token.logprob)} | best
