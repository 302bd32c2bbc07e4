"""The OpenAPI document: FastAPI's, with the request bodies that the routes parse themselves and the served model's own limits."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from elastic_ep.serving.api.plan import MAX_CHOICES_AT_ONCE
from elastic_ep.serving.api.requests import HARMLESS, NEUTRAL, ChatCompletionRequest, CompletionRequest, DrainRequest, ScaleRequest
from elastic_ep.serving.api.responses import ErrorBody
from elastic_ep.serving.backend import Backend

_ERRORS = {
    400: "The request is wrong; the message names the field, the value and the cure.",
    404: "Nothing of this name is served.",
    409: "It cannot be done, or not now; the message is the reason.",
    413: "The body is too large.",
    429: "The queue is full; come again after Retry-After seconds.",
    503: "Nothing can be generated now; the message is the reason.",
}
GENERATING_ERRORS = (400, 404, 413, 429, 503)
_SSE_ITEM = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_GENERATING_BODIES = (CompletionRequest, ChatCompletionRequest)
_BODIES = (*_GENERATING_BODIES, ScaleRequest, DrainRequest)
_LENGTHS = ("max_tokens", "max_completion_tokens")


def describe(
    answer: type[BaseModel] | None,
    *,
    body: type[BaseModel] | None = None,
    streams: bool = False,
    media_type: str = "application/json",
    errors: tuple[int, ...] = (),
    may_be_accepted: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of a route decorator: what it takes and every status that it answers."""
    content: dict[str, Any] = {}
    if streams:
        content["text/event-stream"] = {"itemSchema": _SSE_ITEM}
    elif answer is None:
        content[media_type] = {"schema": {"type": "string"}}
    ok: dict[str, Any] = {"content": content, "description": "OK"}
    if answer is not None:
        ok["model"] = answer
    codes = errors or (GENERATING_ERRORS if body is not None else ())
    responses: dict[int, dict[str, Any]] = {200: ok}
    if may_be_accepted:
        responses[202] = ok | {"description": "Begun."}
    responses |= {code: {"model": ErrorBody, "description": _ERRORS[code]} for code in codes}
    if 429 in responses:
        responses[429]["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
    route: dict[str, Any] = {"responses": responses, "response_model": None}
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        route["openapi_extra"] = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    return route


def install_openapi(app: FastAPI, backend: Backend, *, has_text: bool) -> None:
    """Makes GET /openapi.json tell what this server takes."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, backend, has_text)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI, backend: Backend, has_text: bool) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, bodies = models_json_schema([(body, "validation") for body in _BODIES], ref_template="#/components/schemas/{model}")
    components = schema["components"]["schemas"]
    components.update(bodies["$defs"])
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which are never sent
        components.pop(name, None)
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for body in _GENERATING_BODIES:
        _complete_body(components[body.__name__], backend)
    components["CompletionRequest"]["properties"]["prompt"] = _prompt(backend, has_text)
    if not has_text:
        components["CompletionRequest"]["properties"]["stop"] = {"enum": [None, []], "description": "Needs a tokenizer."}
        del schema["paths"]["/v1/chat/completions"]
    components["ChatCompletionRequest"]["allOf"] += [
        _needs_true("top_logprobs", "integer", "logprobs"),
        {"not": {"properties": {name: {"type": "integer"} for name in _LENGTHS}, "required": list(_LENGTHS)}},
    ]
    return schema


def _complete_body(body: dict[str, Any], backend: Backend) -> None:
    """Adds the fields that are taken without effect, the model's own limits, and what one field asks of another."""
    properties = body["properties"]
    properties["model"]["anyOf"] = [{"type": "string", "const": backend.model_name}, {"type": "null"}]
    properties.update({name: {"description": "Ignored."} for name in HARMLESS})
    for name, values in NEUTRAL.items():
        properties[name] = {"enum": [None, *values], "description": "Not supported: only what changes nothing is accepted."}
    for name in set(_LENGTHS) & properties.keys():
        properties[name]["anyOf"][0]["maximum"] = backend.max_model_len - 1
    body["allOf"] = [_needs_true("stream_options", "object", "stream")]


def _needs_true(field: str, kind: str, switch: str) -> dict[str, Any]:
    """If `field` is given, `switch` is true."""
    given = {"properties": {field: {"type": kind}}, "required": [field]}
    return {"if": given, "then": {"properties": {switch: {"const": True}}, "required": [switch]}}


def _prompt(backend: Backend, has_text: bool) -> dict[str, Any]:
    def some(items: dict[str, Any], limit: int) -> dict[str, Any]:
        return {"type": "array", "items": items, "minItems": 1, "maxItems": limit}

    text = {"type": "string", "minLength": 1}
    ids = some({"type": "integer", "minimum": 0, "maximum": backend.vocab_size - 1}, backend.max_model_len - 1)
    texts = [text, some(text, MAX_CHOICES_AT_ONCE)] if has_text else []
    return {"anyOf": [*texts, ids, some(ids, MAX_CHOICES_AT_ONCE)], "title": "Prompt"}
