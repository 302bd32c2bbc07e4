"""Every refusal in the OpenAI shape: {"error": {"message", "type", "param", "code"}}, one line that names the value and the cure."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.serving.backend import OperationRefused, QueueFull, Unavailable

_log = logging.getLogger(__name__)

CLIENT_CLOSED = 499
"""What the access log shows for a client that went away; nobody reads it."""

_TYPES = {404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error", 500: "internal_error", 503: "service_unavailable"}


class ApiError(Exception):
    """An answer other than 200. `param` names the request's field, `code` is for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ):
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "internal_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told about an exception; anything not foreseen is logged and told as 500 without its details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        retry_after = str(max(1, round(error.retry_after_s)))
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": retry_after})
    if isinstance(error, OperationRefused):
        return ApiError(409, str(error), code="refused")
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code="unavailable")
    if isinstance(error, InvalidInputError):
        return bad_request(str(error))
    _log.error("unexpected error while serving a request", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details", code="internal_error")


def invalid_field(error: ValidationError) -> ApiError:
    """The first complaint of a failed validation as one line: field, what it must be, what it was."""
    first = error.errors(include_url=False)[0]
    param = _path(first["loc"])
    what = _requirement(first["type"], first.get("ctx") or {}, first["msg"])
    if first["type"] in ("missing", "extra_forbidden"):
        return bad_request(f"{param} {what}", param, "missing_field" if first["type"] == "missing" else "unknown_field")
    return bad_request(f"{param} {what}, got {shown(first['input'])}", param, "invalid_value")


def shown(value: Any) -> str:
    """A value as JSON, short and in ASCII."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return _short(text)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        if isinstance(part, str):
            part = _short(part.encode("unicode_escape").decode())
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "body"


def _requirement(kind: str, ctx: dict[str, Any], message: str) -> str:
    simple = {
        "missing": "is required; add it",
        "extra_forbidden": "is not a field of this request; remove it",
        "int_type": "must be an integer",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "bool_type": "must be true or false",
        "string_type": "must be a string",
        "string_unicode": "must be valid Unicode",
        "list_type": "must be a list",
        "dict_type": "must be an object",
        "model_type": "must be an object",
        "none_required": "is not supported; remove it",
    }
    if kind in simple:
        return simple[kind]
    bounds = {"greater_than_equal": ("at least", "ge"), "less_than_equal": ("at most", "le"), "greater_than": ("above", "gt")}
    if kind in bounds:
        words, key = bounds[kind]
        limit = ctx[key]
        return f"must be {words} {int(limit) if limit == int(limit) else limit}"
    if kind == "too_short":
        return f"needs {ctx['min_length']} or more entries"
    if kind == "too_long":
        return f"takes at most {ctx['max_length']} entries"
    if kind == "literal_error":
        return f"must be {ctx['expected']}"
    if kind == "value_error":
        return str(ctx["error"])
    return message[:1].lower() + message[1:]


def install_error_handlers(app: FastAPI, count: Callable[[int], None]) -> None:
    """Makes every error of `app` an ApiError's response: also unknown paths, wrong methods and bugs. `count` is told each status."""

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        path = _short(quote(request.scope["path"]))
        reason = {
            404: f"{request.method} {path} is not served here; GET /openapi.json lists what is",
            405: f"{request.method} is not allowed on {path}; GET /openapi.json lists the methods",
        }.get(error.status_code, str(error.detail))
        code = {404: "unknown_path", 405: "method_not_allowed"}.get(error.status_code)
        headers = dict(error.headers) if error.headers else None
        return answer(ApiError(error.status_code, reason, code=code, headers=headers))

    async def any_error(request: Request, error: Exception) -> JSONResponse:
        return answer(as_api_error(error))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    def answer(error: ApiError) -> JSONResponse:
        count(error.status)
        return error.response()

    app.add_exception_handler(HTTPException, http_error)
    for kind in (ApiError, OperationRefused, QueueFull, Unavailable, InvalidInputError):
        app.add_exception_handler(kind, any_error)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, any_error)
