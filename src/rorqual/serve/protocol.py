"""What clients may send: OpenAI's chat and text completions, with the sampling settings that open servers add."""

import contextlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rorqual.engine import Grammar, SamplingParams
from rorqual.engine.grammar import json_grammar

N_MOST = 128  # answers to one request
LOGPROBS_MOST = 20
# Every one of these costs time at every token, of all that run.
STOPS_MOST, BIASES_MOST = 32, 1024

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class Part(BaseModel):
    """Of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: content as one text, a call's arguments as an object."""
        content = self.content if isinstance(self.content, str | None) else "".join(p.text for p in self.content)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content or "",
        }
        if self.tool_calls:
            calls = [c.model_dump() for c in self.tool_calls]
            for call in calls:
                with contextlib.suppress(ValueError):  # the model wrote it, and can be shown it as it was
                    call["function"]["arguments"] = json.loads(call["function"]["arguments"])
            message["tool_calls"] = calls
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


class Function(BaseModel):
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


class ChosenFunction(BaseModel):
    name: str


class ToolChoice(BaseModel):
    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    name: str = "answer"
    schema_: dict[str, Any] = Field(alias="schema", default_factory=lambda: {"type": "object"})


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


class StructuredOutputs(BaseModel):
    """One of these, as vLLM names them."""

    model_config = ConfigDict(populate_by_name=True)

    json_: dict[str, Any] | None = Field(alias="json", default=None)
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        if sum(x is not None for x in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar")
        return self

    def as_grammar(self) -> Grammar:
        if self.json_ is not None:
            return json_grammar(self.json_)
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return json_choice(self.choice)
        return Grammar("lark", self.grammar or "")


def json_choice(choices: list[str]) -> Grammar:
    """One of these texts, word for word."""
    return Grammar("lark", "start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in choices))


class StreamOptions(BaseModel):
    include_usage: bool = False


class Sampling(BaseModel):
    """Common to both; None: what the model's generation_config.json recommends."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=BIASES_MOST)] | None
    ) = None
    n: Annotated[int, Field(ge=1, le=N_MOST)] = 1
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=STOPS_MOST)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=STOPS_MOST)] = Field(default_factory=list)
    ignore_eos: bool = False
    thinking_budget: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    structured_outputs: StructuredOutputs | None = None

    def stops(self) -> tuple[str, ...]:
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(s for s in found if s)

    def params(self, recommended: SamplingParams, max_tokens: int, logprobs: int, grammar: Grammar | None) -> Any:
        """Raises UserError for what the engine refuses."""

        def given(value: Any, fallback: Any) -> Any:
            return fallback if value is None else value

        if grammar is None and self.structured_outputs is not None:
            grammar = self.structured_outputs.as_grammar()
        return SamplingParams(
            temperature=given(self.temperature, recommended.temperature),
            top_p=given(self.top_p, recommended.top_p),
            top_k=max(0, given(self.top_k, recommended.top_k)),
            min_p=given(self.min_p, recommended.min_p),
            repetition_penalty=given(self.repetition_penalty, recommended.repetition_penalty),
            presence_penalty=given(self.presence_penalty, recommended.presence_penalty),
            frequency_penalty=given(self.frequency_penalty, recommended.frequency_penalty),
            logit_bias=tuple((dict(recommended.logit_bias) | (self.logit_bias or {})).items()),
            max_tokens=max_tokens,
            max_length=recommended.max_length,
            n=self.n,
            seed=None if self.seed is None else self.seed % (1 << 63),
            stop=recommended.stop if self.stop is None else self.stops(),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            thinking_budget=self.thinking_budget,
            grammar=grammar,
            logprobs=logprobs,
        )


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MOST)] = 0
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [t.function.name for t in self.tools or []]
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is 'required', but tools is empty")
        return self


class CompletionRequest(Sampling):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    add_special_tokens: bool = True  # to a prompt given as text, those that the tokenizer puts before one
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MOST)] | None = None
    echo: bool = False

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TokenizeRequest(BaseModel):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(BaseModel):
    model: str | None = None
    tokens: list[TokenId]
