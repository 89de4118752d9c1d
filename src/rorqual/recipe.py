"""Recipes: what a run does, typed and checked before anything starts.

A recipe is one TOML file; `key=value` words on the command line override it (`train.steps=100`).
The resolved recipe is saved with the run.
"""

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rorqual.errors import UserError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelSection(Section):
    """Start from `path` (a Hugging Face directory), or from random weights of the sizes in `config`."""

    path: str | None = None
    config: dict[str, Any] | None = None  # ModelConfig's fields; vocab_size defaults to the tokenizer's
    # Compute; bfloat16 keeps FP32 master weights. auto: what is fastest on the machine that starts the run.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @model_validator(mode="after")
    def _one_of(self) -> "ModelSection":
        if (self.path is None) == (self.config is None):
            raise ValueError("give either path (a model directory) or config (sizes), not both or neither")
        return self


class TokenizerSection(Section):
    """An existing tokenizer at `path`, or byte-level BPE trained on the corpus to `vocab_size`."""

    path: str | None = None
    vocab_size: int = Field(4096, ge=257)
    special_tokens: list[str] = []
    whole_numbers: int = Field(0, ge=0, le=1000)  # integers below this are one token each


class Source(Section):
    """One part of the mixture: a .txt, .jsonl(.gz) or .parquet file, a glob, a datasets directory or Hub name."""

    path: str
    weight: float = Field(1.0, gt=0)
    text_field: str = "text"
    split: str = "train"


class DataSection(Section):
    sources: list[Source] = Field(min_length=1)
    valid_fraction: float = Field(0.01, ge=0, lt=1)  # of documents, held out for bits per byte
    sequence_length: int = Field(256, ge=2)
    isolate_documents: bool = False  # attention within documents only; V3 §4.1 lets it cross
    fim_rate: float = Field(0.0, ge=0, le=1)  # fill-in-the-middle, PSM (V3 §4.1; 0.1 there)
    workers: int = Field(2, ge=1)


class OptimizerSection(Section):
    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(3e-4, gt=0)  # AdamW (everything, or what Muon leaves)
    muon_lr: float = Field(0.02, gt=0)  # Muon, on matrices
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0)


class ScheduleSection(Section):
    """Learning rate as a factor of its peak: `v3` (warm-up, constant, cosine, constant tails), `cosine`, `wsd`."""

    name: Literal["v3", "cosine", "wsd", "constant"] = "wsd"
    warmup: float = Field(0.01, ge=0, le=1)  # fraction of the run
    decay: float = Field(0.2, ge=0, le=1)  # wsd: fraction spent falling to `final`
    final: float = Field(0.0, ge=0, le=1)  # factor at the end


class MTPSection(Section):
    weight: float = Field(0.3, ge=0)  # λ (V3 §4.2)
    final_weight: float = Field(0.1, ge=0)
    switch_at: float = Field(0.68, ge=0, le=1)  # fraction of the run: 10 T of 14.8 T tokens in V3


class BalanceSection(Section):
    bias_speed: float = Field(0.001, ge=0)  # γ; 0 turns bias balancing off
    bias_stop_at: float = Field(0.97, ge=0, le=1)  # fraction of the run after which γ = 0 (14.3 T of 14.8 T)
    sequence_loss: float = Field(0.0001, ge=0)  # α


class TrainSection(Section):
    steps: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)  # stop by the clock; schedules then follow time
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(8, ge=1)  # sequences an optimizer step
    batch_ramp: tuple[int, float] | None = None  # (first batch size, fraction of the run to reach batch_size)
    micro_batch: int | None = Field(None, ge=1)  # sequences a forward pass; None: the whole batch
    ema: float | None = Field(None, gt=0, lt=1)
    eval_every: int = Field(100, ge=1)
    save_every: int = Field(200, ge=1)
    keep: int = Field(2, ge=1)
    compile: bool = False
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_end(self) -> "TrainSection":
        if sum(x is not None for x in (self.steps, self.seconds, self.epochs)) != 1:
            raise ValueError("give exactly one of steps, seconds or epochs")
        return self


class Recipe(Section):
    """What every recipe has."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    out: str = "runs"  # the run lives in out/name
    seed: int = Field(0, ge=0)
    track: bool = False  # also log to trackio (local, wandb-compatible)

    @property
    def run_dir(self) -> Path:
        return Path(self.out) / self.name


class PretrainRecipe(Recipe):
    kind: Literal["pretrain"] = "pretrain"
    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    mtp: MTPSection = MTPSection()
    balance: BalanceSection = BalanceSection()
    train: TrainSection


class ChatDataSection(Section):
    path: str  # .jsonl(.gz) or .parquet with `messages`, or `prompt` and `completion`
    valid_fraction: float = Field(0.0, ge=0, lt=1)
    sequence_length: int = Field(512, ge=2)


class SFTRecipe(Recipe):
    kind: Literal["sft"] = "sft"
    model: ModelSection
    data: ChatDataSection
    optimizer: OptimizerSection = OptimizerSection(lr=1e-5)
    schedule: ScheduleSection = ScheduleSection(name="cosine", final=0.1)
    mtp: MTPSection = MTPSection()
    balance: BalanceSection = BalanceSection(bias_speed=0.0, sequence_loss=0.0)
    train: TrainSection


class EnvironmentSection(Section):
    """Problems from a reasoning-gym dataset (`name`, `config`) or a JSONL file of question/answer (`path`)."""

    name: str
    config: dict[str, Any] = {}
    path: str | None = None
    weight: float = Field(1.0, gt=0)
    prompt: str | None = None  # Python format over the problem's metadata; None: the question as generated


class RewardSection(Section):
    """Weights of the parts; each is logged apart."""

    accuracy: float = 1.0
    format: float = 1.0
    language: float = 0.0
    length: float = 0.0
    verdict: float = 0.0  # the model's own 'correct' verdicts being right
    target_language: str = "en"


class GRPOSection(Section):
    """Group relative policy optimisation (R1 §2.1); defaults are R1-Zero's (R1 supplement)."""

    group_size: int = Field(16, ge=2)
    questions_per_step: int = Field(32, ge=1)
    mini_batches: int = Field(1, ge=1)  # optimizer steps a rollout; 1 is on-policy
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    kl: float = Field(0.001, ge=0)
    refresh_reference: int = Field(400, ge=0)  # steps; 0: never
    normalise_std: bool = True
    average: Literal["sequence", "token"] = "sequence"
    drop_flat_groups: bool = False  # leave out groups whose rewards are all equal
    temperature: float = Field(1.0, gt=0)
    max_tokens: int = Field(256, ge=1)
    micro_tokens: int = Field(16384, ge=64)  # tokens a forward pass in training
    rollout_slots: int = Field(256, ge=1)  # sequences decoded at once


class RLRecipe(Recipe):
    kind: Literal["rl"] = "rl"
    model: ModelSection
    environments: list[EnvironmentSection] = Field(min_length=1)
    template: Literal["chat", "r1-zero", "plain"] = "chat"
    reward: RewardSection = RewardSection()
    grpo: GRPOSection = GRPOSection()
    optimizer: OptimizerSection = OptimizerSection(lr=3e-6, weight_decay=0.0)
    balance: BalanceSection = BalanceSection(bias_speed=0.0, sequence_loss=0.0)
    steps: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)
    warmup_steps: int = Field(0, ge=0)
    decay: float = Field(0.0, ge=0, le=1)  # share of the run at whose end the learning rate falls to 0
    save_every: int = Field(50, ge=1)
    keep: int = Field(2, ge=1)
    sample_every: int = Field(10, ge=1)
    eval_every: int = Field(0, ge=0)  # steps; 0: never
    eval_problems: int = Field(200, ge=1)  # a family, from the development split
    keep_start: bool = False  # release the start where the last evaluation found the model worse; needs eval_every

    @model_validator(mode="after")
    def _one_end(self) -> "RLRecipe":
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("give exactly one of steps or seconds")
        if self.keep_start and not self.eval_every:
            raise ValueError("keep_start compares evaluations, and eval_every is 0; set it too")
        return self


class DistillRecipe(Recipe):
    """Rejection sampling from a teacher, then SFT of a student (R1 §2.3.3, §2.4)."""

    kind: Literal["distill"] = "distill"
    teacher: str
    model: ModelSection  # the student
    environments: list[EnvironmentSection] = Field(min_length=1)
    template: Literal["chat", "r1-zero", "plain"] = "chat"
    reward: RewardSection = RewardSection()
    problems: int = Field(1000, ge=1)
    samples: int = Field(8, ge=1)
    keep_per_problem: int = Field(1, ge=1)
    temperature: float = Field(1.0, gt=0)
    max_tokens: int = Field(256, ge=1)
    sequence_length: int = Field(512, ge=2)
    optimizer: OptimizerSection = OptimizerSection(lr=1e-5)
    schedule: ScheduleSection = ScheduleSection(name="cosine", final=0.1)
    balance: BalanceSection = BalanceSection(bias_speed=0.0, sequence_loss=0.0)
    train: TrainSection


KINDS: dict[str, type[Recipe]] = {
    "pretrain": PretrainRecipe,
    "sft": SFTRecipe,
    "rl": RLRecipe,
    "distill": DistillRecipe,
}


def load_recipe(path: str | Path, kind: str, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe of one kind. Raises UserError with one sentence."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist; see recipes/ for ready-made ones") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"recipe {path} is not valid TOML: {e}") from None
    for word in overrides or []:
        _override(raw, word)
    found = raw.setdefault("kind", kind)
    if found != kind:
        raise UserError(f"recipe {path} is for 'rorqual {found}', not 'rorqual {kind}'")
    return parse_recipe(raw, kind, str(path))


def parse_recipe(raw: dict[str, Any], kind: str, source: str = "recipe") -> Recipe:
    """Check a recipe given as nested dictionaries."""
    try:
        return KINDS[kind].model_validate(raw)
    except ValidationError as e:
        raise UserError(_one_sentence(e, source, KINDS[kind])) from None


def _override(raw: dict[str, Any], word: str) -> None:
    key, sign, text = word.partition("=")
    if not sign or not key:
        raise UserError(f"override {word!r} is not of the form key=value, e.g. train.steps=100")
    try:
        value: Any = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    here = raw
    for name in parents:
        here = here.setdefault(name, {})
        if not isinstance(here, dict):
            raise UserError(f"override {word!r}: {name} is not a section")
    here[last] = value


def _one_sentence(error: ValidationError, source: str, recipe: type[Recipe]) -> str:
    first = error.errors()[0]
    where = ".".join(str(x) for x in first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        known = _fields_at(recipe, first["loc"][:-1])
        return f"{source}: field {where} is unknown; did you mean one of {', '.join(sorted(known))}?"
    if first["type"] == "missing":
        return f"{source}: field {where} is missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
    return f"{source}: {where}{shown}: {message[0].lower() + message[1:]}"


def _fields_at(model: Any, loc: tuple[Any, ...]) -> list[str]:
    """The fields of the section that `loc` leads to."""
    for name in loc:
        if isinstance(name, int):
            continue
        annotation = model.model_fields[name].annotation
        model = annotation if isinstance(annotation, type) else annotation.__args__[0]
    return list(model.model_fields)
