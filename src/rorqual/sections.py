"""The sections of recipes: typed fields with their bounds. All numbers are finite."""

import math
from datetime import date, time
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from rorqual.errors import UserError
from rorqual.local_paths import local_path

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


class ExistingTokenizer(Section):
    """Of a model that starts from random weights; one that goes on has its own."""

    path: LocalPath  # a directory with it, such as a model's


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


class PairDataSection(Section):
    """Pairs of answers to the same prompt, the better one first."""

    path: LocalPath | None = None  # .jsonl(.gz) or .parquet with prompt, chosen and rejected; None: [pairs] makes them
    valid_fraction: float = Field(default=0.1, ge=0, lt=1)  # of the prompts
    sequence_length: Length = 512  # of a conversation with its answer; pairs with a longer one are left out


class PairsSection(Section):
    """Pairs that a model's answers and rules make (docs/r1.md): its own answers are better than their worse twins."""

    prompts: LocalPath  # .jsonl with `prompt` or `question`
    model: LocalPath  # whose answers are the better ones
    temperature: Temperature = 0.3  # of those
    hot: Temperature = 1.4  # of the answers that are a twin
    max_tokens: Size = 150  # of an answer
    twins: int = Field(default=4, ge=1, le=4)  # of an answer: how many of the four kinds it gets
