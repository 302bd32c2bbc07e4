"""Whatever body comes to the API: an answer, or a refusal in the OpenAPI document's shape; never a status of 500 or more."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_ep.serving.text import TextTokenizer
from tests.fuzz.bytes import FUZZ, check_line, mutated
from tests.serving.conftest import CHAT, COMPLETIONS, Api
from tests.serving.fakes import FakeBackend, text_tokenizer

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
any_json = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3))


@pytest.fixture(scope="module")
def words() -> TextTokenizer:
    return text_tokenizer()


@pytest.fixture
def api(words: TextTokenizer) -> Api:
    return Api(FakeBackend(), words)


def resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        found: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        schema = found
    return schema


def fields_of(document: dict[str, Any], path: str) -> list[str]:
    """The names that the document gives to a request's fields."""
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return sorted(resolved(body, document)["properties"])


def check(api: Api, path: str, content: bytes) -> None:
    response = api.request("POST", path, content=content, headers={"content-type": "application/json"})
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        check_line(error["message"])


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/scale_elastic_ep"])
@FUZZ
@given(data=st.data())
def test_any_json(api: Api, path: str, data: Any) -> None:
    """Known fields with any values, beside those that make a request whole."""
    names = st.sampled_from(fields_of(api.get("/openapi.json").json(), path))
    base = {COMPLETIONS: {"prompt": [1, 2], "max_tokens": 2}, CHAT: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}}
    values = any_json | st.sampled_from([0, 1, -1, 2**63, 1.5, True, "", [], {}, [[1]], [{}]])
    body = base.get(path, {}) | data.draw(st.dictionaries(names | st.text(max_size=5), values, max_size=3))
    check(api, path, json.dumps(body).encode())


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@FUZZ
@given(content=mutated(st.just(json.dumps({"prompt": "x", "messages": [], "max_tokens": 2}).encode())) | st.binary(max_size=60))
def test_any_bytes(api: Api, path: str, content: bytes) -> None:
    check(api, path, content)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_body_nested_without_end(api: Api, path: str) -> None:
    check(api, path, b'{"prompt": ' + b"[" * 100_000)
