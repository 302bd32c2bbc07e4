"""/v1/chat/completions where it differs from completions."""

from __future__ import annotations

import pytest

from elastic_ep.serving.chat_template import ChatTemplate
from elastic_ep.serving.text import TextTokenizer
from tests.serving.conftest import CHAT, Api
from tests.serving.fakes import FakeBackend, byte_level, sentencepiece

HELLO = [{"role": "user", "content": "hello"}]


def test_defaults_reach_to_the_end_of_the_context(api: Api) -> None:
    answer = api.chat()
    (request,) = api.backend.requests
    assert request.prompt_ids == tuple(api.tokenizer.encode("user: hello\nassistant:"))
    assert len(request.prompt_ids) + request.max_tokens == api.backend.max_model_len
    (choice,) = answer["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].startswith("user: hello\nassistant:user:")
    assert (choice["logprobs"], choice["finish_reason"], answer["object"]) == (None, "length", "chat.completion")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_length(api: Api, name: str) -> None:
    assert api.chat(**{name: 3})["usage"]["completion_tokens"] == 3


def test_template_and_its_switches() -> None:
    template = ChatTemplate("{{ messages[0].role }} {{ messages[0].name }} {{ messages[0].content }}{{ extra }}", {})
    api = Api(FakeBackend(), TextTokenizer(byte_level(), template))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "name": "me", "content": parts, "refusal": None, "tool_calls": []}]
    api.post(CHAT, messages=messages, max_tokens=1, chat_template_kwargs={"extra": "!"})
    assert api.tokenizer.encode("developer me ab!") == list(api.backend.requests[0].prompt_ids)


def test_an_answer_is_a_text_of_its_own() -> None:
    """Its first word has no leading space where the tokenizer marks words by one."""
    inner = sentencepiece()
    ids = [1, *inner.encode("he wo he", add_special_tokens=False).ids]  # 1 is a special token
    api = Api(FakeBackend(answer=lambda request: ids), TextTokenizer(inner))
    assert api.chat(max_tokens=len(ids))["choices"][0]["message"]["content"] == "he wo he"
    assert api.complete(prompt="he", max_tokens=len(ids))["choices"][0]["text"] == " he wo he"


def test_logprobs(api: Api) -> None:
    (choice,) = api.chat(max_tokens=2, logprobs=True, top_logprobs=2)["choices"]
    u, s = choice["logprobs"]["content"]
    assert (u["token"], u["logprob"], u["bytes"]) == ("u", -0.5, [117])
    assert [t["logprob"] for t in u["top_logprobs"]] == [-0.5, -1.5]
    assert s["token"] == "s"
    (choice,) = api.chat(max_tokens=1, logprobs=True)["choices"]
    assert [t["top_logprobs"] for t in choice["logprobs"]["content"]] == [[]]
    assert api.backend.requests[-1].sampling.top_logprobs == 0
    streamed = api.stream(CHAT, messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=2)
    assert streamed[0]["choices"][0]["logprobs"] is None
    assert [part["choices"][0]["logprobs"]["content"][0] for part in streamed[1:]] == [u, s]


def test_token_ids(api: Api) -> None:
    answer = api.chat(max_tokens=2, n=2, return_token_ids=True)
    prompt = api.tokenizer.encode("user: hello\nassistant:")
    assert answer["prompt_token_ids"] == prompt
    assert [c["token_ids"] for c in answer["choices"]] == [prompt[:2]] * 2


def test_stream_order(api: Api) -> None:
    events = api.stream(CHAT, messages=HELLO, n=2, max_tokens=3, return_token_ids=True, stream_options={"include_usage": True})
    prompt = api.tokenizer.encode("user: hello\nassistant:")
    assert all(e["object"] == "chat.completion.chunk" and e["id"] == events[0]["id"] for e in events)
    roles = [e["choices"][0] for e in events[:2]]
    assert [(c["index"], c["delta"]) for c in roles] == [(i, {"role": "assistant", "content": ""}) for i in range(2)]
    assert events[0]["prompt_token_ids"] == prompt
    assert all("prompt_token_ids" not in e for e in events[1:])
    for index in range(2):
        parts = [e["choices"][0] for e in events[2:-1] if e["choices"][0]["index"] == index]
        assert [p["token_ids"] for p in parts] == [[t] for t in prompt[:3]]
        assert "".join(p["delta"]["content"] for p in parts) == "use"
        assert [p["finish_reason"] for p in parts] == [None, None, "length"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 6, "total_tokens": len(prompt) + 6}
    assert all(e["usage"] is None for e in events[:-1])


def test_a_refusing_template_is_a_400() -> None:
    template = ChatTemplate("{{ raise_exception('no system role') }}", {})
    api = Api(FakeBackend(), TextTokenizer(byte_level(), template))
    error = api.refused(CHAT, messages=HELLO)
    assert error["param"] == "messages"
    assert "no system role" in error["message"]
