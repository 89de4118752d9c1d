"""Request bodies: OpenAI's chat and text completions, with the sampling parameters that open servers add."""

import json
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from rorqual.data.tool_formats import too_deep
from rorqual.engine import Grammar, SamplingParams
from rorqual.engine.grammar import json_grammar
from rorqual.serve.request_fields import (
    Biases,
    Count,
    FailFastList,
    Integer,
    OnlyDefaults,
    Prompt,
    RequestObject,
    TokenId,
)

T = TypeVar("T")
MAX_N = 128  # answers to one request
MAX_LOGPROBS, MAX_TOOLS, MAX_MESSAGES, MAX_CHOICES = 20, 1024, 1 << 14, 1024
# Each costs time at every token, for all running requests.
MAX_STOPS = 32


def _shallow(schema: dict[str, Any]) -> dict[str, Any]:
    if too_deep(schema):
        raise ValueError("is nested too deeply; make it flatter")
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(_shallow)]


class Message(RequestObject):
    """A message of a conversation, read by `rorqual.data.chat_messages`, as those of training data are.

    Unknown fields are allowed, since clients send back messages that they got from other servers.
    """

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Any] | None = Field(None, description="text, or parts of type text or refusal")
    refusal: str | None = None
    tool_calls: list[Any] | None = Field(None, description="an assistant's calls, as in the response")
    function_call: dict[str, Any] | None = None
    tool_call_id: str | None = None
    prefix: bool | None = Field(None, description="of the last message: the answer continues it, as in DeepSeek's API")

    @model_validator(mode="after")
    def _only_an_answer_goes_on(self) -> "Message":
        if self.prefix and self.role != "assistant":
            raise ValueError("prefix is for an assistant's message; leave it out")
        return self


class Function(RequestObject):
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None

    @property
    def schema_(self) -> dict[str, Any]:
        """Schema of the arguments, an object; without parameters it is empty."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return self.parameters | {"type": "object"}


class Tool(RequestObject):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        function = {key: value for key, value in self.function if value is not None and key != "strict"}
        return {"type": self.type, "function": {"parameters": {"type": "object", "properties": {}}} | function}


class ChosenFunction(RequestObject):
    name: str


class ToolChoice(RequestObject):
    type: Literal["function"]
    function: ChosenFunction


class Allowed(RequestObject):
    mode: Literal["auto", "required"]
    tools: Annotated[FailFastList[ToolChoice], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(RequestObject):
    """Restricts calls to these tools."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed

    def names(self) -> list[str]:
        return [t.function.name for t in self.allowed_tools.tools]


class JsonSchema(RequestObject):
    model_config = ConfigDict(populate_by_name=True)

    name: str = "answer"
    description: str | None = None
    strict: bool = True  # the schema is always enforced
    schema_: Schema = Field(alias="schema", default_factory=lambda: {"type": "object"})


class ResponseFormat(RequestObject):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


class StructuredOutputs(RequestObject):
    """Exactly one of these constraints, named as in vLLM."""

    model_config = ConfigDict(populate_by_name=True)

    json_: Schema | None = Field(alias="json", default=None)
    regex: str | None = None
    choice: Annotated[FailFastList[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
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
    """A grammar of exactly these texts."""
    return Grammar("lark", "start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in choices))


class StreamOptions(RequestObject):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class Sampling(OnlyDefaults):
    """Fields common to chat and text completions; None: the default of the model's generation_config.json."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases | None = None
    n: Annotated[Integer, Field(ge=1, le=MAX_N)] = 1
    seed: Annotated[Integer, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] = Field(default_factory=list)
    ignore_eos: bool = False
    thinking_budget: Annotated[Integer, Field(ge=0, le=1 << 40)] | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "Sampling":
        if self.structured_outputs is not None and self.response_format is not None:
            raise ValueError("give structured_outputs or response_format, not both")
        return self

    def form(self) -> Grammar | None:
        """The grammar of the answer, if it is constrained."""
        if self.structured_outputs is not None:
            return self.structured_outputs.as_grammar()
        response_format = self.response_format
        if response_format is None or response_format.type == "text":
            return None
        return json_grammar(None if response_format.json_schema is None else response_format.json_schema.schema_)

    def stops(self) -> tuple[str, ...]:
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(s for s in found if s)

    def params(
        self, defaults: SamplingParams, max_tokens: int, logprobs: int, grammar: Grammar | None
    ) -> SamplingParams:
        """Parameters for the engine, with its defaults. Raises UserError for invalid ones."""

        def given(value: T | None, fallback: T) -> T:
            return fallback if value is None else value

        return SamplingParams(
            temperature=given(self.temperature, defaults.temperature),
            top_p=given(self.top_p, defaults.top_p),
            top_k=max(0, given(self.top_k, defaults.top_k)),
            min_p=given(self.min_p, defaults.min_p),
            repetition_penalty=given(self.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=given(self.presence_penalty, defaults.presence_penalty),
            frequency_penalty=given(self.frequency_penalty, defaults.frequency_penalty),
            logit_bias=tuple((dict(defaults.logit_bias) | (self.logit_bias or {})).items()),
            max_tokens=max_tokens,
            max_length=defaults.max_length,
            n=self.n,
            seed=None if self.seed is None else self.seed % (1 << 63),
            stop=defaults.stop if self.stop is None else self.stops(),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            thinking_budget=self.thinking_budget,
            grammar=grammar,
            logprobs=logprobs,
        )


class ChatRequest(Sampling):
    messages: Annotated[FailFastList[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] = 0
    tools: Annotated[FailFastList[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | AllowedTools | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: str | None = None  # for templates that read it
    add_generation_prompt: bool | None = None  # None: unless the last message is continued
    continue_final_message: bool = False
    # Accepted only with the value that is the behaviour here.
    add_special_tokens: Literal[False] = False
    echo: Literal[False] = False
    include_reasoning: Literal[True] = True
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    separate_reasoning: Literal[True] = True
    stream_reasoning: Literal[True] = True
    verbosity: Literal["medium"] = "medium"

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        names = [t.function.name for t in self.tools or []]
        chosen = [self.tool_choice.function.name] if isinstance(self.tool_choice, ToolChoice) else []
        chosen = self.tool_choice.names() if isinstance(self.tool_choice, AllowedTools) else chosen
        for name in chosen:
            if name not in names:
                raise ValueError(f"tool_choice names {name!r}, which is not among tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is 'required', but tools is empty")
        return self

    @property
    def unfinished(self) -> bool:
        """Whether the answer continues the last message."""
        return self.continue_final_message or bool(self.messages[-1].prefix)

    def response_schema(self) -> dict[str, Any] | None:
        """JSON schema of response_format; None without one."""
        response_format = self.response_format
        if response_format is None or response_format.type == "text":
            return None
        return {"type": "object"} if response_format.json_schema is None else response_format.json_schema.schema_


class CompletionRequest(Sampling):
    prompt: Prompt
    add_special_tokens: bool = True  # prepend the tokenizer's BOS to prompts given as text
    max_tokens: Annotated[Integer, Field(ge=0, le=1 << 40)] = 16
    logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    # Accepted only with the value that is the behaviour here.
    best_of: Integer | None = None
    suffix: Literal[""] = ""

    @model_validator(mode="after")
    def _all_of_them(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: must equal n, since all answers are returned")
        return self

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [cast(list[int], self.prompt)]
        return list(cast(list[str] | list[list[int]], self.prompt))


class TokenizeRequest(RequestObject):
    """A text, or messages with their template's arguments."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None  # for a text; the chat template adds its own
    messages: Annotated[FailFastList[Message], Field(max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[FailFastList[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give either prompt or messages")
        others = self.model_fields_set & {"tools", "add_generation_prompt", "chat_template_kwargs"}
        others |= {"continue_final_message"} if self.continue_final_message else set()
        if self.prompt is not None and others:
            raise ValueError(f"{min(others)} goes with messages, not with a prompt")
        if self.messages and self.add_special_tokens:
            raise ValueError("add_special_tokens goes with a prompt, not with messages")
        return self


class DetokenizeRequest(RequestObject):
    model: str | None = None
    tokens: FailFastList[TokenId]
