"""The sections of recipes that sample and reward: environments, rewards, GRPO, distillation, rollouts."""

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from rorqual.presets import GRPO_PRESETS, with_preset
from rorqual.sections import (
    Config,
    Count,
    LocalPath,
    NotNegative,
    Positive,
    Python,
    Section,
    Share,
    Size,
    Temperature,
    Weight,
)

HELPFULNESS = "helpfulness"  # the part of the reward that a reward model gives


class EnvironmentSection(Section):
    """Problems from a reasoning-gym dataset or an installed environment (`name`, `config`), a file of questions and
    answers (`path`), or a class or function in Python (docs/environments.md).
    """

    name: str
    config: Config = Field(default={})
    path: LocalPath | None = None
    python: Python | None = None
    weight: Weight = 1.0
    prompt: str | None = None  # Python format string over the problem's fields; None: the generated question
    turns: int | None = Field(
        default=None, ge=2, le=1 << 20
    )  # of the model in an episode; None: what the environment says
    turn_tokens: Size | None = None  # sampled in a turn; None: what is left of max_tokens
    timeout: Positive = 10.0  # seconds of a call of its `reward`, its `reply` or a tool
    open: bool = False  # of a file: prompts without a right answer, which reward.model judges

    @model_validator(mode="after")
    def _one_source(self) -> "EnvironmentSection":
        if self.path is not None and self.python is not None:
            raise ValueError(f"environment {self.name}: path and python are two sources; leave one of them out")
        if self.open and self.path is None:
            raise ValueError(f"environment {self.name}: open = true is for a file of prompts; give its path")
        if self.python is not None and self.prompt is not None:
            raise ValueError(f"environment {self.name}: prompt is not for python, whose question is text; leave it out")
        return self


def _unique_names(sections: list[EnvironmentSection]) -> list[EnvironmentSection]:
    name, count = Counter(section.name for section in sections).most_common(1)[0]
    if count > 1 or not name.strip():
        raise ValueError(f"{count} environments are named {name!r}; names must be unique and not empty")
    return sections


Environments = Annotated[list[EnvironmentSection], Field(min_length=1), AfterValidator(_unique_names)]


class FunctionSection(Section):
    """A reward that is a Python function."""

    python: Python
    weight: Annotated[float, Field(ge=-1e12, le=1e12)] = 1.0


class RewardModelSection(Section):
    """A reward model (`rorqual reward`), which scores answers to open problems."""

    path: LocalPath
    weight: Positive = 1.0


class RewardSection(Section):
    """Weights of the reward's parts; each part is logged separately."""

    accuracy: NotNegative = 1.0
    format: NotNegative = 1.0
    language: NotNegative = 0.0
    length: NotNegative = 0.0
    verdict: NotNegative = 0.0  # correctness of the self-verification (✓)
    target_language: Literal[
        "ar", "cs", "de", "el", "en", "es", "fr", "he", "hi", "it", "ja", "ko", "nl", "pl", "pt", "ru", "sv", "th",
        "tr", "uk", "vi", "zh",
    ] = "en"  # fmt: skip
    functions: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], FunctionSection] = Field(
        default={}
    )  # by their name in logs
    timeout: Positive = 10.0  # seconds of a call of one
    model: RewardModelSection | None = None  # for open environments; None: rules alone

    @model_validator(mode="after")
    def _own_names(self) -> "RewardSection":
        if taken := [name for name in self.functions if name in (*RewardSection.model_fields, HELPFULNESS)]:
            raise ValueError(f"functions.{taken[0]}: {taken[0]} is the name of a part; choose another")
        return self

    @property
    def rewards_nothing(self) -> bool:
        """Whether all weights are 0."""
        return not (self.accuracy or self.verdict) and self.rewards_no_open

    @property
    def rewards_no_open(self) -> bool:
        """Whether no answer to an open problem is rewarded."""
        rules = (self.format, self.language, self.length)
        return self.model is None and not any(rules) and not any(f.weight for f in self.functions.values())


class FilterSection(Section):
    """Which correct completions a distillation keeps (R1 §2.3.3)."""

    max_tokens: Count | None = None  # of a completion
    language: Share = 0.0  # of the thinking's words, at least, in the script of reward.target_language
    readable: bool = False  # no paragraph over 1000 characters, code block or line four times in the thinking


class MixSection(Section):
    """Conversations that a distillation's samples are mixed with, such as general ones (R1 §2.3.3)."""

    path: LocalPath  # as ChatDataSection's
    samples: Count | None = None  # drawn from them; None: all


class GRPOSection(Section):
    """Group relative policy optimisation (R1 §2.1); the defaults are R1-Zero's (R1 supplement)."""

    # Sets the fields below that are not given (presets.py); "opd": on-policy distillation alone, without rewards.
    algorithm: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "opd"] = "grpo"
    group_size: int = Field(default=16, ge=2, le=1 << 20)
    questions_per_step: Size = 32
    mini_batches: Count = 1  # optimizer steps per rollout; 1: on-policy
    ratio: Literal["token", "sequence"] = "token"  # sequence: one length-normalised ratio of an output (GSPO)
    surrogate: Literal["clipped", "weighted"] = "clipped"  # weighted: the clipped ratio weights log π (CISPO)
    clip_low: float = Field(default=0.2, gt=0, le=1)  # 1, with "weighted": no lower bound
    clip_high: Positive = 0.2
    kl: NotNegative = 0.001  # β; 0: no reference model
    kl_estimate: Literal["k3", "unbiased"] = "k3"  # unbiased: k3 weighted by π/π_old (V3.2 §3.1)
    refresh_reference: int = Field(default=400, ge=0, lt=1 << 31)  # steps between copies of π to π_ref; 0: never
    normalise_std: bool = True
    # Of the loss; token: DAPO; constant: Σ over tokens / (outputs · max_tokens), Dr. GRPO
    average: Literal["sequence", "token", "constant"] = "sequence"
    drop_zero_std_groups: bool = False  # drop groups whose rewards are all equal
    max_draws: Annotated[int, Field(ge=1, le=1000)] = 1  # of a step, until enough groups' rewards differ (DAPO); 1: one
    mask_truncated: bool = False  # no loss from outputs that max_tokens cut off (DAPO's overlong filtering)
    temperature: Temperature = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)  # of rollouts, as the next two; the loss keeps the same tokens
    top_k: int = Field(default=0, ge=0, lt=1 << 31)  # 0: all
    min_p: float = Field(default=0.0, ge=0, lt=1)
    max_tokens: Size = 256  # of a completion
    micro_tokens: int = Field(default=16384, ge=64, lt=1 << 31)  # tokens per forward pass in training
    rollout_max_num_seqs: Size = 256  # sequences decoded at once
    # Sample from rounded weights: linears in FP8; or 8 or 4 bits, on a CPU. None: from those that are trained
    rollout_weights: Literal["fp8", "int8", "int4"] | None = None
    # Importance weights of π_old/π_s. None: token-truncate where rollouts or updates round or rollouts are stale
    correction: Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"] | None = None
    importance_cap: Positive | None = None  # of them; None: 2
    off_policy_mask: Positive | None = None  # δ: outputs with A < 0 and mean log(π_s/π) > δ count nothing (V3.2 §3.1)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        return with_preset(GRPO_PRESETS, given, given)

    @model_validator(mode="after")
    def _enough_questions(self) -> "GRPOSection":
        if self.mini_batches > self.questions_per_step:
            raise ValueError(
                f"mini_batches = {self.mini_batches}: a step has only questions_per_step = "
                f"{self.questions_per_step}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _with_a_bound(self) -> "GRPOSection":
        if self.surrogate == "clipped" and self.clip_low == 1:
            raise ValueError(
                "clip_low = 1: the clipped surrogate needs a lower bound; lower it, or set surrogate = 'weighted'"
            )
        return self

    @model_validator(mode="after")
    def _with_a_reference(self) -> "GRPOSection":
        if self.kl_estimate != "k3" and not self.kl:
            raise ValueError(f"kl_estimate = {self.kl_estimate!r}: with kl = 0 there is no KL term; set kl above 0")
        return self

    @property
    def filters(self) -> bool:
        """Whether rollouts are sampled from some of the tokens only."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


class OPDSection(Section):
    """On-policy distillation: the student samples, a teacher says how probable it finds each token (docs/rl.md)."""

    teacher: LocalPath | None = None  # a model's directory, for every environment that `teachers` does not name
    teachers: dict[str, LocalPath] = Field(default={})  # by environment
    weight: Positive = 1.0  # of the distillation beside the reward
    loss: Literal["sampled", "full"] = "sampled"  # of the sampled tokens only, or over the whole vocabulary

    def of(self, environment: str) -> str | None:
        """The path of an environment's teacher."""
        return self.teachers.get(environment, self.teacher)


class RolloutsSection(Section):
    """Rollouts on Ray (`--ray`); the first four need it."""

    workers: int | None = Field(default=None, ge=1, le=4096)  # None: 2
    # Optimizer steps by which a rollout's weights may be older than those it trains; 0: synchronous. None: 1
    staleness: int | None = Field(default=None, ge=0, le=64)
    threads: int | None = Field(default=None, ge=1, le=1024)  # of a worker; None: the CPUs shared among the workers
    gpus: float | None = Field(default=None, gt=0, le=1)  # of a worker, and of the trainer; None: 1 where on GPUs
    replay_routing: bool = False  # updates take the experts that rollouts chose (V3.2 §3.1); also without Ray
