"""Response schemas for /openapi.json; responses are built as plain dictionaries, since validation costs time."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Finish = Literal["stop", "length", "tool_calls", "cancelled"]


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(Shape):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Shape):
    """OpenAI's form."""

    error: Problem


class PromptDetails(Shape):
    cached_tokens: int


class CompletionDetails(Shape):
    reasoning_tokens: int


class UsageShape(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    prompt_cache_hit_tokens: int = Field(description="DeepSeek's name for cached_tokens")
    prompt_cache_miss_tokens: int


class Likely(Shape):
    token: str
    logprob: float
    bytes: list[int]


class LikelyHere(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(Shape):
    content: list[LikelyHere]
    reasoning_content: list[LikelyHere]


class FunctionCall(Shape):
    name: str
    arguments: str = Field(description="an object, as JSON")


class ToolCall(Shape):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(Shape):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = Field("", description="the thinking before the answer; left out where there is none")
    tool_calls: list[ToolCall] = Field([], description="left out where there is none")


class ChatAnswerChoice(Shape):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class Answer(Shape):
    id: str
    created: int
    model: str
    usage: UsageShape


class ChatAnswer(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatAnswerChoice]


class TextLogprobs(Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextAnswerChoice(Shape):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish


class TextAnswer(Answer):
    object: Literal["text_completion"]
    choices: list[TextAnswerChoice]


class ModelCard(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="tokens that a prompt and its answer may have")


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(Shape):
    count: int
    max_model_len: int
    tokens: list[int]


class Text(Shape):
    prompt: str


class Health(Shape):
    status: str


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors that a route may return, for FastAPI's `responses`."""
    descriptions = {
        400: "the request is invalid: `message` names the field",
        401: "no valid API key",
        403: "an Origin or Host that is not allowed",
        404: "no such model",
        408: "the request was not received in time",
        413: "the request is too large",
        415: "the body is not uncompressed JSON in UTF-8",
        429: "the queue is full; retry after Retry-After seconds",
        500: "the server failed; send the request again",
        503: "the engine has stopped",
        504: "the answer took too long",
    }
    return {status: {"model": ErrorAnswer, "description": descriptions[status]} for status in statuses}


def streamed(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Responses of a route whose answer is one object, or server-sent events with `stream`."""
    data = {"type": "string", "contentMediaType": "application/json", "description": "a chunk; the last is [DONE]"}
    events = {
        "itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]},
        "example": 'data: {"id": "…", "choices": [{"index": 0, "delta": {"content": "Hi"}}]}\n\ndata: [DONE]\n\n',
    }
    return {
        200: {"model": model, "description": "the answer", "content": {"text/event-stream": events}},
        **problems(400, 401, 403, 404, 408, 413, 415, 429, 500, 504),
    }
