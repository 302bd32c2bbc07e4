"""The answer of /v1/chat/completions: whole and as events."""

from __future__ import annotations

from typing import Any

from elastic_ep.brain.messages import SampledToken
from elastic_ep.serving.api.answers import FINISH, alternatives, encode, finite, sse
from elastic_ep.serving.api.generation import Delta
from elastic_ep.serving.api.plan import Plan
from elastic_ep.serving.text import Tokenizer


class ChatFormat:
    """An AnswerFormat."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer):
        self._plan = plan
        self._tokenizer = tokenizer
        self._base = self._head("chat.completion.chunk")
        self._heads = [b'data: %s,"choices":[{"index":%d,"delta":{"content":' % (self._base, i) for i in range(len(plan.requests))]
        self._end = b',"usage":null}' if plan.include_usage else b"}"

    def opening(self) -> bytes:
        """The role, for every choice; the first carries the prompt's ids where they were asked for."""
        events = []
        for index in range(len(self._plan.requests)):
            delta = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % index
            prompt = b',"prompt_token_ids":' + encode(self._plan.prompts[0]) if self._plan.with_token_ids and not index else b""
            events.append(sse(b'%s,"choices":[%s]%s%s' % (self._base, delta, prompt, self._end)))
        return b"".join(events)

    def event(self, delta: Delta) -> bytes:
        logprobs, ids = b"null", b""
        if self._plan.num_logprobs is not None:
            logprobs = encode(self._logprobs([delta]))
        if self._plan.with_token_ids:
            ids = b',"token_ids":[%s]' % (b"" if delta.token is None else b"%d" % delta.token.token)
        return b'%s%s},"logprobs":%s,"finish_reason":%s%s}]%s\n\n' % (
            self._heads[delta.choice], encode(delta.text), logprobs, FINISH[delta.finish], ids, self._end,
        )  # fmt: skip

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        return sse(b'%s,"choices":[],"usage":%s}' % (self._base, encode(usage)))

    def whole(self, deltas: list[list[Delta]], usage: dict[str, Any]) -> dict[str, Any]:
        plan = self._plan
        choices = [self._choice(i, parts) for i, parts in enumerate(deltas)]
        answer: dict[str, Any] = {"id": plan.id, "object": "chat.completion", "created": plan.created, "model": plan.model}
        answer |= {"choices": choices, "usage": usage}
        if plan.with_token_ids:
            answer["prompt_token_ids"] = plan.prompts[0]
        return answer

    def _head(self, kind: str) -> bytes:
        return encode({"id": self._plan.id, "object": kind, "created": self._plan.created, "model": self._plan.model})[:-1]

    def _choice(self, index: int, parts: list[Delta]) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": "".join(part.text for part in parts), "refusal": None},
            "logprobs": None if self._plan.num_logprobs is None else self._logprobs(parts),
            "finish_reason": parts[-1].finish,
        }
        if self._plan.with_token_ids:
            choice["token_ids"] = [part.token.token for part in parts if part.token is not None]
        return choice

    def _logprobs(self, parts: list[Delta]) -> dict[str, Any]:
        return {"content": [self._entry(part.token) for part in parts if part.token is not None], "refusal": None}

    def _entry(self, token: SampledToken) -> dict[str, Any]:
        best = [self._named(t, logprob) for t, logprob in alternatives(token, self._plan.num_logprobs or 0)]
        return self._named(token.token, finite(token.logprob)) | {"top_logprobs": best}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        label = self._tokenizer.label(token)
        return {"token": label.text, "logprob": logprob, "bytes": list(label.data)}
