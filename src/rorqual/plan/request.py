"""What is asked of the planner about a stage: the options of `rorqual plan`, and the keys of a [[stage]] in a pipeline.

Defaults and bounds are here, for both.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from rorqual.errors import UserError
from rorqual.plan.step_time import IMBALANCE
from rorqual.sections import Count, Length, NotNegative, Positive, Section, Share

PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def amount(value: Any) -> float:
    """14.8T → 14.8e12."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([KMBGT]?)", str(value).strip(), re.IGNORECASE)
    try:
        assert found
        number = float(found[1]) * PREFIXES[found[2].upper()]
    except (AssertionError, ValueError):
        raise ValueError("must be a number such as 14.8T, 300B or 1e9") from None
    if not 0 < number <= 1e18:
        raise ValueError("must be above 0 and at most 1e18")
    return number


def _amounts(count: int) -> Callable[[Any], tuple[float, ...]]:
    def parsed(value: Any) -> tuple[float, ...]:
        parts = str(value).split(":")
        if len(parts) != count:
            raise ValueError(f"must be {count} numbers with : between")
        return tuple(amount(part) for part in parts)

    return parsed


Amount = Annotated[float, BeforeValidator(amount)]
Chips = Annotated[int, Field(ge=1, le=1 << 17)]
Tokens = Annotated[float, Field(ge=1, le=1 << 20)]
Precision = Literal["fp8", "bfloat16", "float32"]
EngineWeights = Literal["fp8", "bfloat16", "int4"]


class Request(Section):
    """Of any stage. `kind`: a key of REQUESTS, which gives the class."""

    kind: str
    name: str = ""
    model: str | None = None  # a known name, a config.json or a model's directory
    gpu: str = "h100"
    gpus: Chips | None = None
    price: NotNegative | None = None  # $ an hour of a chip; None: the chip's own


class TrainingRequest(Request):
    """Pre-training, or fine-tuning on as many tokens."""

    tokens: Amount | None = None  # None: as many as `budget` and `days` allow
    context: Length = 4096
    batch: Annotated[int, Field(ge=1, le=1 << 24)] | None = None  # sequences of a step; None: by the run's compute
    precision: Precision = "bfloat16"
    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    imbalance: NotNegative = IMBALANCE  # of the busiest expert, above the mean
    days: Positive | None = None
    budget: Positive | None = None  # $
    shape: Literal["dense", "mixture"] = "dense"  # of the model that is sought where none is named

    @model_validator(mode="after")
    def _an_end(self) -> Self:
        if self.tokens is None and self.budget is None and self.days is None:
            raise ValueError(
                "say on how many tokens it is trained, such as --tokens 14.8T, or what it may cost, such as --budget "
                "1000 or --days 3"
            )
        if self.tokens is not None and self.budget is not None:
            raise ValueError("give either --tokens or --budget: each follows from the other")
        if self.model is not None and self.shape != "dense":
            raise ValueError("--shape is for a model that is sought by --budget or --days; leave it out")
        return self


class RLRequest(Request):
    """Reinforcement learning with groups of answers (GRPO)."""

    steps: Count | None = None  # rollouts
    questions: Annotated[int, Field(ge=1, le=10**6)] = 32  # of a rollout
    samples: Annotated[int, Field(ge=1, le=10**6)] = 16  # of a question
    prompt: Tokens = 500.0
    lengths: Annotated[tuple[float, float], BeforeValidator(_amounts(2))] = (1000.0, 4000.0)  # of answers, start:end
    limit: Length = 8192
    stale: bool = False
    precision: Precision = "bfloat16"
    weights: EngineWeights = "bfloat16"  # of rollouts

    @model_validator(mode="after")
    def _an_end(self) -> Self:
        if self.steps is None or (self.gpus is None and self.gpu.lower() != "cpu"):
            raise ValueError("say how many rollouts the run has, and on how many chips, such as --steps 500 --gpus 8")
        return self


class SamplingRequest(Request):
    """Answers to problems, to be graded."""

    problems: Annotated[float, BeforeValidator(amount)] = 1000.0
    samples: Annotated[int, Field(ge=1, le=10**6)] = 16
    prompt: Tokens = 500.0
    answer: Tokens = 500.0  # on average
    limit: Length = 8192
    weights: EngineWeights = "bfloat16"


class DistillRequest(SamplingRequest):
    """Answers of a teacher, the best of which a student is trained on."""

    teacher: str | None = None
    keep: Count = 1  # answers of a problem, at most
    correct: Share = 1.0  # share of the problems that have a correct answer
    epochs: Positive = 2.0
    precision: Precision = "bfloat16"

    @model_validator(mode="after")
    def _two_models(self) -> Self:
        if self.teacher is None:
            raise ValueError("say whose answers the model learns from, such as --teacher deepseek-r1")
        return self


class ServeRequest(Request):
    """A service that goes on."""

    users: Positive | None = None  # who wait for tokens at the same time; None: as many as one instance has
    speed: Annotated[float, Field(gt=0, le=10**4)] = 20.0  # tokens/s of a user, at least
    prompt: Tokens = 500.0
    answer: Tokens = 500.0
    hit: Annotated[float, Field(ge=0, le=0.999)] = 0.0  # share of a prompt that the prefix cache has
    weights: EngineWeights = "fp8"
    accepted: Annotated[float, Field(ge=1, le=100)] = 1.0  # tokens a step, by speculative decoding
    prices: Annotated[tuple[float, float, float], BeforeValidator(_amounts(3))] | None = None  # $ a million tokens


REQUESTS: dict[str, type[Request]] = {
    "pretrain": TrainingRequest, "sft": TrainingRequest, "rl": RLRequest, "distill": DistillRequest,
    "eval": SamplingRequest, "serve": ServeRequest,
}  # fmt: skip


def parse_request(kind: str, given: Mapping[str, Any], said: Callable[[str], str]) -> Request:
    """`said`: how a field is called where it was given, such as "--tokens". Raises UserError with one sentence."""
    if kind not in REQUESTS:
        raise UserError(f"{said('for')} {kind}: must be one of {', '.join(REQUESTS)}")
    try:
        return REQUESTS[kind].model_validate({"kind": kind, **given})
    except ValidationError as e:
        first = e.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            raise UserError(_of_others(kind, name, said)) from None
        message = first["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        raise UserError(f"{said(name)} {given[name]}: {message}" if name in given else message) from None


def _of_others(kind: str, name: str, said: Callable[[str], str]) -> str:
    kinds = [other for other, request in REQUESTS.items() if name in request.model_fields]
    if not kinds:
        known = sorted(REQUESTS[kind].model_fields.keys() - {"kind"})
        return f"{said(name)} is unknown; known are {', '.join(known)}"
    others = " and ".join([", ".join(kinds[:-1]), kinds[-1]]) if len(kinds) > 1 else kinds[0]
    return f"{said(name)} is for {others}, not for {kind}; leave it out"
