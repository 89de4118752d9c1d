"""The sections of recipes: typed fields with their bounds. All numbers are finite."""

import math
from collections import Counter
from datetime import date, time
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from rorqual.errors import UserError
from rorqual.local_paths import local_path
from rorqual.presets import GRPO_PRESETS, with_preset

TomlValue: TypeAlias = str | int | float | bool | date | time | list["TomlValue"] | dict[str, "TomlValue"] | None

Count = Annotated[int, Field(ge=1, lt=1 << 31)]
Size = Annotated[int, Field(ge=1, le=1 << 20)]  # of what is held in memory at once
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
NotNegative = Annotated[float, Field(ge=0, le=1e12)]
Temperature = Annotated[float, Field(ge=0.01, le=100)]  # not 0: logits are divided by it
Weight = Annotated[float, Field(ge=1e-6, le=1e6)]  # relative to the other weights
Beta = Annotated[float, Field(ge=0, lt=1)]
LocalPath = Annotated[str, Field(min_length=1), AfterValidator(local_path)]
Python = Annotated[LocalPath, Field(pattern=r".:\S+$")]  # FILE.py:NAME or MODULE:NAME
Length = Annotated[int, Field(ge=2, le=1 << 20)]  # of a sequence
V3_CONSTANT = 10 / 14.8  # V3 §4.2: fraction of the tokens with the learning rate at its peak


def _check_config(config: dict[str, Any]) -> dict[str, Any]:
    for name, value in config.items():
        _check_value(f"config.{name}", value)
    return config


def _check_value(name: str, value: TomlValue) -> None:
    """Only values that TOML and JSON both have: no dates, and no NaN, which does not equal itself."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_value(f"{name}.{key}", inner)
    elif not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{name} = {value}: must be text, a finite number, true or false")


Config = Annotated[dict[str, Any], AfterValidator(_check_config)]


class Section(BaseModel):
    # Strict: true is not a number, 3.5 not a count, and "100" is text.
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """A pre-trained model at `path` (a Hugging Face directory), or random weights with the sizes in `config`."""

    path: LocalPath | None = None
    config: Config | None = None  # ModelConfig's fields; vocab_size defaults to the tokenizer's
    # Compute dtype; bfloat16 keeps FP32 master weights. auto: the fastest on the machine that starts the run.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @model_validator(mode="after")
    def _one_of(self) -> "ModelSection":
        if (self.path is None) == (self.config is None):
            raise ValueError("give either path (a model directory) or config (sizes), not both or neither")
        return self


DeviceName = Literal["auto", "cpu", "cuda"]
# As in precision/formats.py and precision/recompute.py.
PrecisionName = Literal["fp8", "fp8-ue8m0", "fp8-tensor", "mxfp8", "fp8-mxfp4", "fp8-nvfp4"]
RecomputeName = Literal["none", "v3", "full"]


class TokenizerSection(Section):
    """An existing tokenizer at `path`, or byte-level BPE trained on the corpus to `vocab_size`."""

    path: LocalPath | None = None
    vocab_size: int = Field(default=4096, ge=257, lt=1 << 31)
    special_tokens: list[str] = []
    whole_numbers: int = Field(default=0, ge=0, le=1000)  # integers below this are one token each


class Source(Section):
    """One source of the mixture: a .txt, .md, .jsonl(.gz) or .parquet file, a glob, a saved dataset or a Hub name."""

    path: LocalPath
    weight: Weight = 1.0
    text_field: str = "text"
    split: str = "train"


class DataSection(Section):
    sources: list[Source] = Field(min_length=1)
    valid_fraction: float = Field(default=0.01, ge=0, lt=1)  # fraction of each source held out for bits per byte
    sequence_length: Length = 256
    isolate_documents: bool = False  # document mask: attention within documents only (V3 §4.1 has none)
    fim_rate: Share = 0.0  # fraction of documents in fill-in-the-middle order, PSM (V3 §4.1: 0.1)
    workers: int = Field(default=2, ge=1, le=1024)


class OptimizerSection(Section):
    name: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 3e-4  # of AdamW (all parameters, or those that Muon does not update)
    muon_lr: Positive = 0.02  # of Muon, on hidden matrices
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)
    eps: float = Field(default=1e-8, ge=1e-30, lt=1)
    weight_decay: NotNegative = 0.1
    clip: Positive = 1.0  # global gradient norm
    # Of AdamW's two moments; other than float32, Muon's momentum is bfloat16. Masters and gradients are FP32 always.
    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    stochastic_rounding: bool = False  # of AdamW's bfloat16 moments

    @model_validator(mode="after")
    def _rounding(self) -> "OptimizerSection":
        if self.stochastic_rounding and self.moments != "bfloat16":
            raise ValueError(
                f'stochastic_rounding = true: with moments = "{self.moments}" nothing is rounded to bfloat16; set '
                'moments = "bfloat16", or leave it out'
            )
        return self

    @model_validator(mode="after")
    def _decay(self) -> "OptimizerSection":
        for name in ("lr", "muon_lr") if self.name == "muon" else ("lr",):
            rate = getattr(self, name)
            if rate * self.weight_decay >= 1:
                raise ValueError(
                    f"weight_decay = {self.weight_decay:g}: times {name} = {rate:g} it is at least 1, which removes "
                    "all of a weight in one step; lower one of them"
                )
        return self


class FineTuningOptimizer(OptimizerSection):
    lr: Positive = 1e-5


class RLOptimizer(OptimizerSection):
    lr: Positive = 3e-6
    weight_decay: NotNegative = 0.0


class ScheduleSection(Section):
    """Learning rate schedule: `v3` (V3 §4.2: warm-up, constant, cosine, constant tail), `cosine`, `wsd`, `constant`."""

    name: Literal["v3", "cosine", "wsd", "constant"] = "wsd"
    warmup: Share = 0.01  # fraction of the run
    decay: Share = 0.2  # wsd: fraction of the run in which it decays to `final`
    final: Share = 0.0  # of the peak, at the end

    @model_validator(mode="after")
    def _apart(self) -> "ScheduleSection":
        if self.name == "wsd" and self.warmup + self.decay > 1 + 1e-9:
            raise ValueError(
                f"warmup = {self.warmup:g} and decay = {self.decay:g} together are longer than the run; their sum must "
                "be 1 at most"
            )
        if self.name == "v3" and self.warmup > V3_CONSTANT:
            raise ValueError(
                f"warmup = {self.warmup:g}: v3 decays from {V3_CONSTANT:.4f} of the run on; end the warm-up before"
            )
        return self


class FineTuningSchedule(ScheduleSection):
    name: Literal["v3", "cosine", "wsd", "constant"] = "cosine"
    final: Share = 0.1


class MTPSection(Section):
    weight: NotNegative = 0.3  # λ (V3 §4.2)
    final_weight: NotNegative = 0.1  # λ after `switch_at`
    switch_at: Share = 0.68  # fraction of the run: 10 T of 14.8 T tokens in V3


class PolicyMTPSection(Section):
    """The multi-token module trained along with a policy; its loss changes nothing else."""

    weight: NotNegative = 0.0  # λ; 0: it stays as it is


class BalanceSection(Section):
    bias_speed: NotNegative = 0.001  # γ (V3 §2.1.2); 0: no bias balancing
    bias_stop_at: Share = 0.97  # fraction of the run after which γ = 0 (14.3 T of 14.8 T)
    sequence_loss: NotNegative = 0.0001  # α (V3 eq. 17)


class NoBalance(BalanceSection):
    bias_speed: NotNegative = 0.0
    sequence_loss: NotNegative = 0.0


class TrainSection(Section):
    steps: Count | None = None
    seconds: Positive | None = None  # time budget; schedules then follow time
    epochs: Positive | None = None
    batch_size: Size = 8  # sequences per optimizer step
    # (first batch size, fraction of the run to reach batch_size)
    batch_ramp: tuple[Size, Annotated[float, Field(gt=0, le=1)]] | None = Field(default=None, strict=False)
    micro_batch: Size | None = None  # sequences per forward pass; None: the whole batch
    ema: float | None = Field(default=None, gt=0, lt=1)
    eval_every: Count = 100
    save_every: Count = 200
    keep: Count = 2
    compile: bool = False
    threads: int | None = Field(default=None, ge=1, le=1024)

    @model_validator(mode="after")
    def _one_end(self) -> "TrainSection":
        if sum(x is not None for x in (self.steps, self.seconds, self.epochs)) != 1:
            raise ValueError("give exactly one of steps, seconds or epochs")
        if self.batch_ramp and self.batch_ramp[0] > self.batch_size:
            raise ValueError(
                f"batch_ramp starts with {self.batch_ramp[0]} sequences, above batch_size = {self.batch_size}; "
                "start with fewer"
            )
        return self


class LoRASection(Section):
    """Low-rank updates of a frozen model are trained (docs/training.md, "LoRA"): weight + alpha/rank · B·A."""

    rank: int = Field(default=16, ge=1, le=4096)
    alpha: Positive = 32.0
    # Linears by the last part of their name, such as q_proj; all: those of attention, feed-forwards, shared experts and
    # multi-token modules.
    targets: Literal["all"] | Annotated[list[str], Field(min_length=1)] = "all"


class SpikesSection(Section):
    """What a run does where its loss or gradient norm leaps up (docs/training.md)."""

    action: Literal["continue", "stop", "roll-back"] = "continue"
    threshold: float = Field(default=6.0, ge=1, le=1e6)  # above the median, in robust standard deviations
    window: int = Field(default=128, ge=8, le=1 << 16)  # steps before, which a step is compared with
    limit: Count = 20  # roll-backs of a run, after which a spike stops it


class ParallelSection(Section):
    """How processes share the work (docs/scaling.md): pipeline · data · context of them. One process needs none."""

    pipeline: Size = 1  # ranks that share the layers
    data: Size = 1  # ranks of a stage with sequences of their own
    context: Size = 1  # ranks that share a sequence, of a multiple of 2 · context tokens
    experts: Size = 1  # ranks that share the routed experts of a layer; divides data · context
    sharding: Literal["zero-1", "full"] = "zero-1"  # what the ranks with the same layers keep their own rows of
    stages_together: bool = False  # all stages of a place on neighbouring ranks, so that nodes share the experts
    ranks_per_node: Size | None = None  # links within a node are fast; None: those of one machine
    schedule: Literal["1f1b", "zb1p", "dualpipev"] = "dualpipev"  # of the pipeline
    # How tokens travel to experts.
    dispatch: Literal["all-to-all", "two-hop", "two-hop-fp8", "deepep", "deepep-fp8"] = "two-hop"
    overlap: bool = True  # tokens travel while other work is computed
    timeout: Positive = 600.0  # seconds until a collective that hangs ends the run
    restarts: int = Field(default=3, ge=0, lt=1 << 20)  # from the newest checkpoint, after a process has died

    @model_validator(mode="after")
    def _full_sharding(self) -> "ParallelSection":
        if self.sharding == "full" and self.pipeline > 1:
            raise ValueError(
                f"sharding = 'full' with pipeline = {self.pipeline}: every micro-batch would gather each stage's "
                "weights again; make it 'zero-1', or pipeline 1"
            )
        return self

    @property
    def processes(self) -> int:
        return self.pipeline * self.data * self.context

    @property
    def by_deep_ep(self) -> bool:
        """Whether tokens travel by DeepEP's kernels."""
        return self.dispatch in ("deepep", "deepep-fp8")


class ChatDataSection(Section):
    path: LocalPath  # .jsonl(.gz) or .parquet with `messages`, or `prompt` and `completion`
    valid_fraction: float = Field(default=0.0, ge=0, lt=1)
    sequence_length: Length = 512


class EnvironmentSection(Section):
    """Problems from a reasoning-gym dataset or an installed environment (`name`, `config`), a file of questions and
    answers (`path`), or a class or function in Python (docs/environments.md).
    """

    name: str
    config: Config = {}
    path: LocalPath | None = None
    python: Python | None = None
    weight: Weight = 1.0
    prompt: str | None = None  # Python format string over the problem's fields; None: the generated question
    turns: int | None = Field(
        default=None, ge=2, le=1 << 20
    )  # of the model in an episode; None: what the environment says
    turn_tokens: Size | None = None  # sampled in a turn; None: what is left of max_tokens
    timeout: Positive = 10.0  # seconds of a call of its `reward`

    @model_validator(mode="after")
    def _one_source(self) -> "EnvironmentSection":
        if self.path is not None and self.python is not None:
            raise ValueError(f"environment {self.name}: path and python are two sources; leave one of them out")
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
    functions: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], FunctionSection] = {}  # by their name in logs
    timeout: Positive = 10.0  # seconds of a call of one

    @model_validator(mode="after")
    def _own_names(self) -> "RewardSection":
        if taken := [name for name in self.functions if name in RewardSection.model_fields]:
            raise ValueError(f"functions.{taken[0]}: {taken[0]} is the name of a part; choose another")
        return self

    @property
    def rewards_nothing(self) -> bool:
        """Whether all weights are 0."""
        rules = (self.accuracy, self.format, self.language, self.length, self.verdict)
        return not any(rules) and not any(f.weight for f in self.functions.values())


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
    rollout_weights: Literal["fp8"] | None = None  # fp8: sample from linears in FP8; None: from those that are trained
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
    teachers: dict[str, LocalPath] = {}  # by environment
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
