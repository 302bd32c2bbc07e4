"""Bad input: each refused in the OpenAI shape, with one line that names the field, the value and the cure; nothing reaches the backend."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_ep.brain.events import TokenEvent
from elastic_ep.serving.api import generate_routes
from elastic_ep.serving.backend import QueueFull, Unavailable
from elastic_ep.serving.text import TextTokenizer
from tests.serving.conftest import CHAT, COMPLETIONS, Api, refusal
from tests.serving.fakes import FakeBackend

PROMPT_KINDS = "prompt must be a string, a list of strings, a list of token ids or a list of lists of token ids, got "
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", PROMPT_KINDS + "null"),
    ({"prompt": 5}, "prompt", PROMPT_KINDS + "5"),
    ({"prompt": [1, "a"]}, "prompt", PROMPT_KINDS + '[1, "a"]'),
    ({"prompt": [1, True]}, "prompt", PROMPT_KINDS + "[1, true]"),
    ({"prompt": [1, 1.5]}, "prompt", PROMPT_KINDS + "[1, 1.5]"),
    ({"prompt": [1.5]}, "prompt", PROMPT_KINDS + "[1.5]"),
    ({"prompt": [[[1]]]}, "prompt", PROMPT_KINDS + "[[[1]]]"),
    ({"prompt": ""}, "prompt", 'prompt must not be empty; give at least one character, got ""'),
    ({"prompt": ["a", ""]}, "prompt", 'prompt must not be empty; give at least one character, got ["a", ""]'),
    ({"prompt": []}, "prompt", "prompt must not be empty; give at least one token, got []"),
    ({"prompt": [[1], []]}, "prompt", "prompt must not hold an empty list; give each prompt at least one token, got [[1], []]"),
    ({"prompt": [400]}, "prompt", "prompt holds token id 400, outside the vocabulary; use ids from 0 to 399"),
    ({"prompt": [[1], [2, -1]]}, "prompt", "prompt holds token id -1, outside the vocabulary; use ids from 0 to 399"),
    ({"prompt": [10**30]}, "prompt", f"prompt holds token id {10**30}, outside the vocabulary; use ids from 0 to 399"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0"),
    ({"max_tokens": "5"}, "max_tokens", 'max_tokens must be an integer, got "5"'),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens must be an integer, got 1.5"),
    ({"max_tokens": True}, "max_tokens", "max_tokens must be an integer, got true"),
    (
        {"prompt": [1] * 200, "max_tokens": 57},
        "max_tokens",
        "a prompt of 200 tokens and max_tokens 57 exceed the model's context (max_model_len 256); shorten the prompt or ask for at most 56",
    ),
    (
        {"prompt": [1] * 256},
        "prompt",
        "a prompt of 256 tokens leaves no room in the model's context (max_model_len 256); shorten it by at least 1",
    ),
    (
        {"prompt": "a" * 40_000},
        "prompt",
        "a prompt of 40000 characters is longer than the model's context (max_model_len 256); shorten it",
    ),
    ({"temperature": -0.1}, "temperature", "temperature must be at least 0, got -0.1"),
    ({"temperature": 2.5}, "temperature", "temperature must be at most 2, got 2.5"),
    ({"temperature": "hot"}, "temperature", 'temperature must be a number, got "hot"'),
    ({"top_p": 0}, "top_p", "top_p must be above 0, got 0"),
    ({"seed": 2**64}, "seed", f"seed must be at most {2**64 - 1}, got {2**64}"),
    ({"n": 0}, "n", "n must be at least 1, got 0"),
    ({"prompt": [[1]] * 21, "n": 100}, "prompt", "21 prompts with n 100 ask for 2100 choices; ask for at most 2048 at once"),
    ({"n": 129}, "n", "n must be at most 128, got 129"),
    ({"stop": 5}, "stop", "stop must be a string or a list of strings, got 5"),
    ({"stop": ["a", ""]}, "stop", 'stop must hold strings of 1 to 1000 characters, got ["a", ""]'),
    ({"stop": ["a"] * 65}, "stop", "stop must have at most 64 strings, got "),
    ({"stream": "yes"}, "stream", 'stream must be true or false, got "yes"'),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream: true; add it or remove stream_options"),
    ({"stream": True, "stream_options": {"chunks": 1}}, "stream_options.chunks", "stream_options.chunks is not a field of this request"),
    ({"stream": True, "stream_options": 1}, "stream_options", "stream_options must be an object, got 1"),
    ({"logprobs": 21}, "logprobs", "logprobs must be at most 20, got 21"),
    ({"logprobs": True}, "logprobs", "logprobs must be an integer, got true"),
    ({"model": 5}, "model", "model must be a string, got 5"),
    ({"tempratur": 1}, "tempratur", "tempratur is not a field of this request; remove it"),
    ({"best_of": 2}, "best_of", "best_of is not supported; remove it (got 2)"),
    ({"echo": True}, "echo", "echo is not supported; remove it (got true)"),
    ({"suffix": "end"}, "suffix", 'suffix is not supported; remove it (got "end")'),
    ({"logit_bias": {"5": 1}}, "logit_bias", 'logit_bias is not supported; remove it (got {"5": 1})'),
    ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty is not supported; remove it (got 0.5)"),
    ({"frequency_penalty": -1}, "frequency_penalty", "frequency_penalty is not supported; remove it (got -1)"),
    ({"top_k": 5}, "top_k", "top_k is not supported; remove it (got 5)"),
    ({"repetition_penalty": True}, "repetition_penalty", "repetition_penalty is not supported; remove it (got true)"),
    ({"response_format": {"type": "json_object"}}, "response_format", "response_format is not supported; remove it"),
]


@pytest.mark.parametrize(("body", "param", "message"), REFUSED, ids=[f"{i}-{c[1]}" for i, c in enumerate(REFUSED)])
def test_completions_refuse(api: Api, body: dict[str, Any], param: str, message: str) -> None:
    error = api.refused(COMPLETIONS, **{"prompt": "hello", **body})
    assert error["message"].startswith(message)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert api.backend.requests == []


CHAT_REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "messages needs 1 or more entries, got []"),
    ({"messages": "hello"}, "messages", 'messages must be a list, got "hello"'),
    ({"messages": ["hello"]}, "messages[0]", 'messages[0] must be an object, got "hello"'),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is required; add it"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "messages[0].role is required; add it"),
    (
        {"messages": [{"role": "tool", "content": "a"}]},
        "messages[0].role",
        "messages[0].role must be 'system', 'developer', 'user' or 'assist",
    ),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "messages[0].content must be a string or a list of text parts"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "messages[0].content[0].type must be 'text', got \"image_url\"",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "messages[0].tool_calls",
        "messages[0].tool_calls takes at most 0 entries",
    ),
    ({"messages": [{"role": "user", "content": "a", "audio": {}}]}, "messages[0].audio", "messages[0].audio is not supported; remove it"),
    ({"prompt": "a"}, "prompt", "prompt is not a field of this request; remove it"),
    ({"top_logprobs": 2}, "top_logprobs", "top_logprobs 2 needs logprobs: true; add it or remove top_logprobs"),
    ({"logprobs": 2}, "logprobs", "logprobs must be true or false, got 2"),
    ({"max_tokens": 2, "max_completion_tokens": 2}, "max_tokens", "max_tokens and max_completion_tokens mean the same; give one of them"),
    ({"max_tokens": 2000}, "max_tokens", "a prompt of "),
    ({"tools": [{"type": "function"}]}, "tools", "tools is not supported; remove it"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs", "chat_template_kwargs must be an object, got []"),
]


@pytest.mark.parametrize(("body", "param", "message"), CHAT_REFUSED, ids=[f"{i}-{c[1]}" for i, c in enumerate(CHAT_REFUSED)])
def test_chat_refuses(api: Api, body: dict[str, Any], param: str, message: str) -> None:
    error = api.refused(CHAT, **{"messages": [{"role": "user", "content": "hello"}], **body})
    assert error["message"].startswith(message)
    assert error["param"] == param
    assert api.backend.requests == []


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\\ud800"}', b"[" * 100_000, b"9" * 5000, b'{"a":1}x'],
    ids=lambda c: repr(c[:12]),
)
def test_invalid_json(api: Api, path: str, content: bytes) -> None:
    error = refusal(api.request("POST", path, content=content), 400)
    assert error["message"].startswith("the body ")
    assert error["code"] == "invalid_json"


def test_content_type_makes_no_difference(api: Api) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-8"):
        headers = {"content-type": kind}
        response = api.request("POST", COMPLETIONS, content='{"prompt": "你"}'.encode(), headers=headers)
        assert response.status_code == 200


def test_unforeseen_names_and_values_are_shown_in_ascii(api: Api) -> None:
    error = api.refused(COMPLETIONS, prompt="a", temperature="ß" * 1000)
    assert error["message"].isascii()
    assert api.refused(COMPLETIONS, prompt="a", **{"x" * 5000: 1})["message"].endswith("; remove it")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_harmless_and_neutral_fields(api: Api, path: str) -> None:
    prompt = {"prompt": "a"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "a"}]}
    fields = {
        "user": "me", "metadata": {"a": 1}, "store": True, "service_tier": "auto", "safety_identifier": "x", "parallel_tool_calls": True,
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "top_k": -1, "min_p": 0, "best_of": 2, "n": 2, "tools": [],
        "response_format": {"type": "text"}, "repetition_penalty": 1.0, "tool_choice": "auto", "max_tokens": 1, "suffix": None,
    }  # fmt: skip
    assert len(api.post(path, **prompt, **fields)["choices"]) == 2


def test_model_that_is_not_served(api: Api) -> None:
    error = api.refused(COMPLETIONS, 404, prompt="a", model="gpt-5")
    assert error == {
        "message": 'model "gpt-5" is not served here; use "tiny"',
        "type": "not_found_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue(api: Api, stream: bool) -> None:
    api.backend.refuse = QueueFull("1024 requests wait already (limit 1024); try again later", retry_after_s=3)
    response = api.request("POST", COMPLETIONS, json={"prompt": "a", "stream": stream})
    error = refusal(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize("stream", [False, True])
def test_unavailable(api: Api, stream: bool) -> None:
    api.backend.refuse = Unavailable("no rank is alive; restart the ranks")
    error = api.refused(COMPLETIONS, 503, prompt="a", stream=stream)
    assert error["message"] == "no rank is alive; restart the ranks"
    assert error["type"] == "service_unavailable"


def test_all_choices_or_none(api: Api) -> None:
    api.backend.refuse, api.backend.accept_only = QueueFull("full"), 2
    api.refused(COMPLETIONS, 429, prompt="a", n=3)
    assert api.backend.cancelled == [r.request_id for r in api.backend.requests]
    assert len(api.backend.cancelled) == 2


def fails_at(index: int) -> Any:
    def answer(request: Any) -> list[TokenEvent]:
        events = FakeBackend().submit(request).script[:index]
        return [*events, TokenEvent(None, index, "error", "the last rank died; restart the server")]

    return answer


def test_failure_of_a_running_request(api: Api) -> None:
    api.backend.answer = fails_at(2)
    error = api.refused(COMPLETIONS, 503, prompt="a", n=2)
    assert (error["message"], error["code"]) == ("the last rank died; restart the server", "generation_failed")


def test_failure_in_a_stream_is_its_last_event(api: Api) -> None:
    api.backend.answer = fails_at(2)
    events = api.stream(COMPLETIONS, prompt="hello", max_tokens=5)
    assert [e["choices"][0]["text"] for e in events[:2]] == ["hello", "hello"]
    assert events[2]["error"]["message"] == "the last rank died; restart the server"
    assert len(events) == 3


def test_a_bug_shows_nothing_of_itself(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    def answer(request: Any) -> list[TokenEvent]:
        return [TokenEvent(None, 0)]  # ends without a finish

    api.backend.answer = answer
    error = api.refused(COMPLETIONS, 500, prompt="a")
    assert error["message"] == "internal error; the server's log has the details"
    assert "ended without a finish" in caplog.text
    (event,) = api.stream(COMPLETIONS, prompt="a")[1:]
    assert event["error"]["type"] == "internal_error"


def test_large_bodies(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_routes, "MAX_BODY_BYTES", 1000)
    error = api.refused(COMPLETIONS, 413, prompt="a" * 1000)
    assert error["message"] == "the body exceeds 1000 bytes; send less at once"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2", 404), ("GET", "/v1/completions/", 404), ("GET", COMPLETIONS, 405), ("PUT", CHAT, 405), ("POST", "/health", 405)],
)
def test_routes_that_are_not(api: Api, method: str, path: str, status: int) -> None:
    response = api.request(method, path)
    error = refusal(response, status)
    assert path in error["message"]
    assert ("allow" in response.headers) == (status == 405)


def test_a_path_cannot_break_the_line(api: Api) -> None:
    message = refusal(api.get("/a%0Ab%C3%9F" + "x" * 1000), 404)["message"]
    assert message.startswith("GET /a%0Ab%C3%9Fxxx"), message


def test_long_texts_are_tokenized_beside_the_event_loop(tokenizer: TextTokenizer) -> None:
    api = Api(FakeBackend(max_model_len=10_000), tokenizer)
    text = "hello world " * 600
    api.complete(prompt=[text, "hello"], max_tokens=1)
    assert [list(r.prompt_ids) for r in api.backend.requests] == [tokenizer.encode(text), tokenizer.encode("hello")]


def test_a_tokenizer_larger_than_the_model(tokenizer: TextTokenizer) -> None:
    api = Api(FakeBackend(vocab_size=10), tokenizer)
    assert api.refused(COMPLETIONS, prompt="hello")["message"].startswith("prompt holds token id 323, outside the vocabulary")
    assert api.refused(CHAT, messages=[{"role": "user", "content": "hello"}])["param"] == "messages"
