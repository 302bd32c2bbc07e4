"""The OpenAPI document: FastAPI's, with the request bodies that the routes parse themselves and the served model's own limits."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from elastic_ep.serving.api.requests import HARMLESS, NEUTRAL, ChatCompletionRequest, CompletionRequest
from elastic_ep.serving.api.responses import ErrorBody

_ERRORS = {
    400: "The request is wrong; the message names the field, the value and the cure.",
    404: "The model is not served.",
    413: "The body is too large.",
    429: "The queue is full; come again after Retry-After seconds.",
    503: "Nothing can be generated now; the message is the reason.",
}
_BODIES = (CompletionRequest, ChatCompletionRequest)


def describe(
    answer: type[BaseModel] | None,
    *,
    body: type[BaseModel] | None = None,
    streams: bool = False,
    media_type: str = "application/json",
    errors: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Keyword arguments of a route decorator: what it takes and every status that it answers."""
    content: dict[str, Any] = {} if answer is not None else {media_type: {"schema": {"type": "string"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    ok: dict[str, Any] = {"content": content, "description": "OK"}
    if answer is not None:
        ok["model"] = answer
    codes = tuple(_ERRORS) if body is not None else errors
    responses: dict[int, dict[str, Any]] = {200: ok}
    responses |= {code: {"model": ErrorBody, "description": _ERRORS[code]} for code in codes}
    if 429 in responses:
        responses[429]["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
    route: dict[str, Any] = {"responses": responses, "response_model": None}
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        route["openapi_extra"] = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    return route


def install_openapi(app: FastAPI, model_name: str, vocab_size: int) -> None:
    """Makes GET /openapi.json tell what this server takes."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, model_name, vocab_size)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI, model_name: str, vocab_size: int) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, bodies = models_json_schema([(body, "validation") for body in _BODIES], ref_template="#/components/schemas/{model}")
    components = schema["components"]["schemas"]
    components.update(bodies["$defs"])
    for name in ("HTTPValidationError", "ValidationError"):
        components.pop(name, None)
    for body in _BODIES:
        properties = components[body.__name__]["properties"]
        properties["model"]["anyOf"] = [{"type": "string", "const": model_name}, {"type": "null"}]
        properties.update({name: {"description": "Ignored."} for name in HARMLESS})
        for name, values in NEUTRAL.items():
            properties[name] = {"enum": [None, *values], "description": "Not supported: only what changes nothing is accepted."}
    _limit_ids(components["CompletionRequest"]["properties"]["prompt"], vocab_size)
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    return schema


def _limit_ids(prompt: dict[str, Any], vocab_size: int) -> None:
    """Token ids end at the vocabulary."""
    ids = prompt["anyOf"][2]
    limited = {**ids, "items": {**ids["items"], "maximum": vocab_size - 1}}
    text, texts, _, lists = prompt["anyOf"]
    prompt["anyOf"] = [text, texts, limited, {**lists, "items": limited}]
