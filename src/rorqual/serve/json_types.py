"""The JSON of responses, as dictionaries: OpenAI's fields, and DeepSeek's for reasoning and cache hits."""

from typing import Literal, NotRequired, TypedDict


class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: NotRequired[list["TokenLogprob"]]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    reasoning_content: list[TokenLogprob]


class FunctionJson(TypedDict):
    name: str
    arguments: str  # an object, as JSON


class ToolCallJson(TypedDict):
    index: NotRequired[int]  # in a chunk
    id: str
    type: Literal["function"]
    function: FunctionJson


class ChatDeltaJson(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[ToolCallJson]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDeltaJson
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class MessageJson(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallJson]]


class ChatMessageChoice(TypedDict):
    index: int
    message: MessageJson
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextJson(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


ChoiceJson = ChatChunkChoice | ChatMessageChoice | TextJson


class PromptTokens(TypedDict):
    cached_tokens: int


class CompletionTokens(TypedDict):
    reasoning_tokens: int


class UsageJson(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int


class ResponseJson(TypedDict):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChoiceJson]
    usage: NotRequired[UsageJson]
