"""Answer bodies as the OpenAPI document describes them. Generated text does not pass through these: its JSON is written directly."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    message: str = Field(description="One line: what is wrong with which value, and the cure.")
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] = Field([], description="With return_token_ids.")
    prompt_token_ids: list[int] = Field([], description="With return_token_ids; in a stream, in the choice's first part.")


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TokenLogprob(BaseModel):
    token: str
    logprob: float | None
    bytes: list[int]


class TokenLogprobs(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprobs]
    refusal: None


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] = Field([], description="With return_token_ids.")


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] = Field([], description="With return_token_ids.")


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "elastic-ep"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"]
    detail: str


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class RankStatus(_Open):
    rank: int
    pid: int | None
    host: str | None
    device: str | None
    state: str
    slots: int
    running_requests: int


class Recovery(_Open):
    """Times are null where they are not known (the moment of a fault) or not reached."""

    epoch: int
    ranks: list[int]
    kind: str
    tier: int | None
    detect_ms: float | None
    agree_ms: float | None
    plan_ms: float | None
    move_ms: float | None
    resume_ms: float | None
    stall_ms: float | None
    experts_lost: int
    bytes_moved: dict[str, int]


class RequestCounts(_Open):
    running: int
    waiting: int
    finished: int
    failed: int


class Status(_Open):
    epoch: int
    ep_size: int
    active_ranks: list[int] = Field(description="[ep_size], 1 = alive")
    ranks: list[RankStatus]
    survives: dict[str, Any] = Field(description="any_ranks: how many ranks may die without losing an expert; any_node: a whole node")
    recoveries: list[Recovery]
    tokens_committed: int
    requests: RequestCounts


class OperationStatus(_Open):
    operation_id: str
    operation: str
    state: str = Field(description="running, done, or failed: then it was undone")
    reason: str
    drain: str
    joining_ranks: list[int]
    leaving_ranks: list[int]
    seconds: float | None


class OperationList(_Open):
    operations: list[OperationStatus]


class IsScaling(_Open):
    is_scaling_elastic_ep: bool
    operation_id: str | None
