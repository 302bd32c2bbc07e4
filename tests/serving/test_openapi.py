"""The OpenAPI document says what the server does."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel

from elastic_ep.serving.api import responses
from elastic_ep.serving.api.requests import HARMLESS, NEUTRAL
from elastic_ep.serving.text import Tokenizer
from tests.serving.conftest import CHAT, COMPLETIONS, Api
from tests.serving.fakes import FakeBackend


@pytest.fixture
def document(api: Api) -> dict[str, Any]:
    return api.get("/openapi.json").json()


def test_every_route_is_there_with_its_statuses(document: dict[str, Any]) -> None:
    statuses = {(m, path): sorted(op["responses"]) for path, ops in document["paths"].items() for m, op in ops.items()}
    generating = ["200", "400", "404", "413", "429", "503"]
    assert statuses == {
        ("post", COMPLETIONS): generating,
        ("post", CHAT): generating,
        ("get", "/v1/models"): ["200"],
        ("get", "/v1/models/{model}"): ["200", "404"],
        ("get", "/health"): ["200", "503"],
        ("get", "/metrics"): ["200"],
        ("get", "/elastic/status"): ["200"],
        ("get", "/elastic/events"): ["200"],
        ("post", "/scale_elastic_ep"): ["200", "202", "400", "409", "413"],
        ("get", "/is_scaling_elastic_ep"): ["200"],
        ("post", "/elastic/ranks/{rank}/drain"): ["200", "202", "400", "404", "409", "413"],
        ("get", "/elastic/operations"): ["200"],
        ("get", "/elastic/operations/{operation_id}"): ["200", "404"],
    }


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    names = set(document["components"]["schemas"])

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                assert node["$ref"].removeprefix("#/components/schemas/") in names
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(document)
    assert "HTTPValidationError" not in names


def test_bodies_tell_the_models_limits(document: dict[str, Any]) -> None:
    properties = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert document["components"]["schemas"]["CompletionRequest"]["additionalProperties"] is False
    assert properties["model"]["anyOf"] == [{"type": "string", "const": "tiny"}, {"type": "null"}]
    _, texts, ids, lists = properties["prompt"]["anyOf"]
    assert texts["maxItems"] == lists["maxItems"] == 2048
    assert ids == {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 399}, "minItems": 1, "maxItems": 255}
    assert lists["items"] == ids
    assert properties["max_tokens"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 255}
    assert properties["logit_bias"]["enum"] == [None, {}]
    assert set(HARMLESS) | set(NEUTRAL) <= set(properties)


def test_without_a_tokenizer_prompts_are_ids() -> None:
    api = Api(FakeBackend(), Tokenizer())
    document = api.get("/openapi.json").json()
    prompt = document["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    assert [kind["type"] for kind in prompt["anyOf"]] == ["array", "array"]
    assert CHAT not in document["paths"]


@pytest.mark.parametrize(
    ("method", "path", "body", "kind"),
    [
        ("POST", COMPLETIONS, {"prompt": "a", "logprobs": 2, "return_token_ids": True}, responses.Completion),
        ("POST", CHAT, {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 1}, responses.ChatCompletion),
        ("POST", COMPLETIONS, {}, responses.ErrorBody),
        ("GET", "/v1/models", None, responses.ModelList),
        ("GET", "/v1/models/tiny", None, responses.ModelCard),
        ("GET", "/health", None, responses.Health),
        ("GET", "/elastic/status", None, responses.Status),
        ("GET", "/nothing", None, responses.ErrorBody),
    ],
)
def test_answers_are_as_described(api: Api, method: str, path: str, body: dict[str, Any] | None, kind: type[BaseModel]) -> None:
    answer = api.request(method, path, json=body).json()
    described = kind.model_validate(answer, strict=True, extra="forbid" if kind is not responses.Status else None)
    assert described.model_dump(exclude_unset=True) == answer


def test_the_api_needs_no_torch_to_start() -> None:
    code = "import sys, elastic_ep.serving.api.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0
