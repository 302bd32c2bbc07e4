"""Request bodies: which fields there are, their types and bounds. What depends on the model is checked in `plan.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema

from elastic_ep.serving.api.errors import bad_request, invalid_field, shown

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARS = 1000

HARMLESS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "request_id",
)  # fmt: skip
"""Accepted with any value and ignored: they say nothing about the output."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "length_penalty": (1,),
    "top_k": (0, -1), "min_p": (0,), "min_tokens": (0,), "use_beam_search": (False,), "bad_words": ([],), "allowed_token_ids": (),
    "best_of": (), "suffix": ("",), "echo": (False,), "prompt_logprobs": (), "truncate_prompt_tokens": (),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": (),
    "verbosity": (), "web_search_options": (), "stop_token_ids": ([],), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,), "add_special_tokens": (True,),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "priority": (0,),
}  # fmt: skip
"""Known fields that are not supported, and the values besides null with which they change nothing. `best_of` may also equal `n`."""

_PROMPT_KINDS = "must be a string, a list of strings, a list of token ids or a list of lists of token ids"


def _check_prompt(value: Any) -> str | list[Any]:
    if isinstance(value, str):
        return _check_text(value)
    if not isinstance(value, list):
        raise ValueError(_PROMPT_KINDS)
    if not value:
        raise ValueError("must not be empty; give at least one token")
    kinds = set(map(type, value))
    if kinds == {str}:
        return [_check_text(text) for text in value]
    if (ids := _as_ids(value)) is not None:
        return ids
    if kinds == {list}:
        if not all(value):
            raise ValueError("must not hold an empty list; give each prompt at least one token")
        lists = [_as_ids(part) for part in value]
        if None not in lists:
            return lists
    raise ValueError(_PROMPT_KINDS)


def _as_ids(values: list[Any]) -> list[int] | None:
    """The list with its numbers as ints, None if anything in it is no whole number."""
    kinds = set(map(type, values))
    if kinds == {int}:
        return values
    if kinds <= {int, float} and all(v == int(v) for v in values):
        return [int(v) for v in values]
    return None


def _whole(value: Any) -> Any:
    """2.0 is an integer in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_text(text: str) -> str:
    if not text:
        raise ValueError("must not be empty; give at least one character")
    return text


def _check_stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"must have at most {MAX_STOPS} strings")
    if not all(0 < len(s) <= MAX_STOP_CHARS for s in stops):
        raise ValueError(f"must hold strings of 1 to {MAX_STOP_CHARS} characters")
    return stops


_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}

Prompt = Annotated[Any, PlainValidator(_check_prompt), WithJsonSchema({})]
"""Its schema depends on the model: `openapi.py` writes it."""
Stop = Annotated[
    list[str],
    PlainValidator(_check_stop),
    WithJsonSchema({"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}, {"type": "null"}]}),
]


WHOLE = BeforeValidator(_whole)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """`include_obfuscation` is accepted and ignored."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(_Strict):
    """Fields of both generating endpoints. null means the default."""

    model: str | None = Field(None, description="The served model's name, or nothing.")
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="Default 1; 0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1, description="Default 1.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1), WHOLE] | None = Field(
        None, description="Same seed, same tokens; drawn at random if not given."
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = Field(None, description="Default 1.")
    stop: Stop = Field([], description="Text ends before the first of these.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = Field(None, description="Adds token_ids to each choice, and the prompt's once.")


class CompletionRequest(GenerationBody):
    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = Field(
        None, description="How many alternatives to list for each token."
    )


class ContentPart(_Strict):
    type: Literal["text"]
    text: str


def _as_parts(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("must be a string or a list of text parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Nothing = Annotated[list[Any], Field(max_length=0)] | None
Content = Annotated[list[ContentPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart])]


class ChatMessage(_Strict):
    """One message. Fields that only an assistant's answer has are taken back where they are empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: Nothing = None
    tool_calls: Nothing = None
    function_call: None = None

    def text(self) -> str:
        return "".join(part.text for part in self.content)


class ChatCompletionRequest(GenerationBody):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = Field(None, description="Needs logprobs: true.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Switches of the model's own chat template.")


Body = TypeVar("Body", bound=BaseModel)


def parse_body(raw: bytes, kind: type[Body]) -> Body:
    """Raises ApiError 400 naming the first thing that is wrong."""
    try:
        data = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = str(error) if isinstance(error, msgspec.DecodeError) else type(error).__name__
        raise bad_request(f"the body is not valid JSON: {reason}; send one JSON object", code="invalid_json") from None
    if not isinstance(data, dict):
        raise bad_request(f"the body must be a JSON object, got {shown(data)}", code="invalid_json")
    try:
        return kind.model_validate(_drop_what_changes_nothing(data))
    except ValidationError as error:
        raise invalid_field(error) from None


def _drop_what_changes_nothing(data: dict[str, Any]) -> dict[str, Any]:
    for name in data.keys() & NEUTRAL.keys():
        value = data[name]
        same_as_n = name == "best_of" and _same(value, data.get("n") or 1)
        if value is not None and not same_as_n and not any(_same(value, neutral) for neutral in NEUTRAL[name]):
            raise bad_request(f"{name} is not supported; remove it (got {shown(value)})", name, "unsupported_parameter")
    return {name: value for name, value in data.items() if name not in NEUTRAL and name not in HARMLESS}


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON values: true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


class OperationRequest(BaseModel):
    """What growing, shrinking and draining have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)
    operation_id: str | None = Field(None, min_length=1, max_length=128, description="a name; asking twice with it begins once")
    drain: Literal["move", "finish"] | None = Field(None, description="requests of leaving ranks: compute elsewhere, or finish first")
    wait: bool = Field(True, description="answer when it is done or undone (200), not when it has begun (202)")


class ScaleRequest(OperationRequest):
    new_ep_size: int = Field(ge=1, le=65536)


class DrainRequest(OperationRequest):
    pass
