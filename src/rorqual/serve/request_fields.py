"""Types of request fields: null means not given, types are strict, unknown fields are refused.

Also the fields of other servers that change nothing here: those of `Ignored` take any value, those of `OnlyDefaults`
only the value that is the behaviour here.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Strict,
    Tag,
    model_validator,
)

T = TypeVar("T")
MAX_BIASES = 1024  # each costs time at every token


def _nullable(schema: dict[str, Any]) -> None:
    """Mark optional fields as nullable in the OpenAPI description."""
    needed = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        kinds = field.get("anyOf", [field])
        if name not in needed and field and {"type": "null"} not in kinds:
            about = {key: field.pop(key) for key in ("title", "default", "description") if key in field}
            schema["properties"][name] = {"anyOf": [*field.get("anyOf", [field]), {"type": "null"}]} | about


class RequestObject(BaseModel):
    """Base of the objects that a client sends."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_nullable)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        given = {name: value for name, value in body.items() if value is not None}
        if len(given) > len(cls.model_fields) and cls.model_config.get("extra") == "forbid":
            # Report one unknown field only: 200 000 would take seconds.
            known = {field.alias or name for name, field in cls.model_fields.items()}
            unknown = [name for name in given if name not in known]
            given = {name: value for name, value in given.items() if name in known or name == unknown[0]}
        return given


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_whole)]  # 1.0 is 1 too: JSON has one kind of number


@dataclass(unsafe_hash=True)
class _HashableFailFast(FailFast):
    """Pydantic's FailFast is not hashable, which members of a union must be."""


FailFastList = Annotated[list[T], _HashableFailFast()]  # reports the first error only: 100 000 take a minute
Count = Annotated[Integer, Field(ge=1, le=1 << 40)]  # tokens
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


def _prompt_kind(prompt: object) -> str | None:
    """The union member of a prompt, by its first element, so that no other is tried."""
    if not isinstance(prompt, list):
        return "text" if isinstance(prompt, str) else None
    first = prompt[0] if prompt else 0
    return "texts" if isinstance(first, str) else "batch" if isinstance(first, list) else "tokens"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[FailFastList[str], Tag("texts")]
    | Annotated[FailFastList[TokenId], Tag("tokens")]
    | Annotated[FailFastList[FailFastList[TokenId]], Tag("batch")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt",
        custom_error_message="must be a string, token ids, or a list of either",
    ),
]


def _check_count(biases: object) -> object:
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"{len(biases)} biases are more than {MAX_BIASES}")
    return biases


Biases = Annotated[
    # Keys of a JSON object are strings.
    dict[Annotated[TokenId, Strict(False)], Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_check_count),
    Field(max_length=MAX_BIASES),
]


class Ignored(RequestObject):
    # OpenAI's: billing, storage, priority.
    metadata: object = None
    prediction: object = None
    prompt_cache_key: object = None
    prompt_cache_retention: object = None
    safety_identifier: object = None
    service_tier: object = None
    store: object = None
    user: object = None
    # Of open servers: request ids, and parameters of samplers that `OnlyDefaults` keeps off.
    cache_prompt: object = None
    dry_allowed_length: object = None
    dry_base: object = None
    dry_penalty_last_n: object = None
    dry_sequence_breakers: object = None
    dynatemp_exponent: object = None
    mirostat_eta: object = None
    mirostat_tau: object = None
    repeat_last_n: object = None
    request_id: object = None
    rid: object = None
    xtc_threshold: object = None


Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]


class OnlyDefaults(Ignored):
    bad_words: Annotated[list[str], Field(max_length=0)] = Field(default_factory=list)
    dry_multiplier: Zero = 0.0
    dynatemp_range: Zero = 0.0
    early_stopping: Literal[False] = False
    id_slot: Literal[-1] = -1
    include_stop_str_in_output: Literal[False] = False
    length_penalty: One = 1.0
    min_tokens: Literal[0] = 0
    mirostat: Literal[0] = 0
    no_stop_trim: Literal[False] = False
    priority: Literal[0] = 0
    repeat_penalty: One = 1.0
    return_hidden_states: Literal[False] = False
    return_token_ids: Literal[False] = False
    return_tokens_as_token_ids: Literal[False] = False
    skip_special_tokens: Literal[True] = True
    typical_p: One = 1.0
    use_beam_search: Literal[False] = False
    xtc_probability: Zero = 0.0
