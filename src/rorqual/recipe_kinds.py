"""Recipes of each kind: their sections, and what may not stand together."""

from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import Field, model_validator

from rorqual.presets import REWARD_PRESETS, with_preset
from rorqual.rl_checks import check_open, check_rl
from rorqual.rl_sections import (
    Environments,
    FilterSection,
    GRPOSection,
    MixSection,
    OPDSection,
    RewardSection,
    RolloutsSection,
)
from rorqual.sections import (
    BalanceSection,
    ChatDataSection,
    Count,
    DataSection,
    DeviceName,
    ExistingTokenizer,
    FineTuningOptimizer,
    FineTuningSchedule,
    Length,
    LocalPath,
    LoRASection,
    ModelSection,
    MTPSection,
    NoBalance,
    OptimizerSection,
    PairDataSection,
    PairsSection,
    ParallelSection,
    PolicyMTPSection,
    Positive,
    PrecisionName,
    RecomputeName,
    RLOptimizer,
    ScheduleSection,
    Section,
    Share,
    Size,
    SpikesSection,
    Temperature,
    TokenizerSection,
    TrainSection,
)


class Recipe(Section):
    """Fields of every recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    out: LocalPath = "runs"  # the run's folder is out/name
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    track: bool = False  # also log to trackio (local, wandb-compatible)
    device: DeviceName = "auto"  # a GPU where PyTorch finds one for each process of a machine, else the CPU
    model: ModelSection  # the student in a distillation
    precision: PrecisionName | None = None  # of the products of linears in training; None: model.dtype's
    recompute: RecomputeName = "none"  # activations computed again in the backward pass (V3 §3.2.3), or whole layers

    @property
    def run_dir(self) -> Path:
        return Path(self.out) / self.name

    @model_validator(mode="after")
    def _compiled_as_it_is(self) -> Self:
        train: TrainSection | None = getattr(self, "train", None)
        for field, plain in (("precision", None), ("recompute", "none")):
            value = getattr(self, field)
            if train is not None and train.compile and value != plain:
                raise ValueError(
                    f"{field} = {value!r} with train.compile: torch.compile does not take it; leave one of them out"
                )
        parallel: ParallelSection | None = getattr(self, "parallel", None)
        if train is not None and train.compile and parallel is not None and parallel.processes > 1:
            raise ValueError(
                "parallel with train.compile: torch.compile does not take what processes send each other; leave one out"
            )
        return self


class PretrainRecipe(Recipe):
    kind: Literal["pretrain"] = "pretrain"
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    mtp: MTPSection = MTPSection()
    balance: BalanceSection = BalanceSection()
    train: TrainSection
    spikes: SpikesSection = SpikesSection()
    parallel: ParallelSection = ParallelSection()


class FineTuningRecipe(Recipe):
    """Fields of recipes that tune a model."""

    lora: LoRASection | None = None  # None: all weights are trained

    @model_validator(mode="after")
    def _adapters(self) -> Self:
        if self.lora is None:
            return self
        train: TrainSection | None = getattr(self, "train", None)
        parallel: ParallelSection | None = getattr(self, "parallel", None)
        optimizer: OptimizerSection = vars(self)["optimizer"]
        for what, given in (
            (f"precision = {self.precision!r}", self.precision is not None),
            ("train.compile", train is not None and train.compile),
            ("parallel of several processes", parallel is not None and parallel.processes > 1),
            ('optimizer.name = "muon"', optimizer.name == "muon"),
            ("model.config", self.model.path is None),
        ):
            if given:
                raise ValueError(f"lora with {what}: adapters are not trained so; leave one of them out")
        if "lr" not in optimizer.model_fields_set:  # what fits full fine-tuning is a tenth of what fits LoRA
            vars(self)["optimizer"] = optimizer.model_copy(update={"lr": 10 * optimizer.lr})
        return self


WORKED_SOLUTIONS = "worked-solutions"  # a teacher: solutions that rl/worked writes


class SupervisedRecipe(FineTuningRecipe):
    """Fields of recipes that learn from samples; the model may start from random weights."""

    tokenizer: ExistingTokenizer | None = None

    @property
    def tokenizer_path(self) -> str:
        """The directory with the model's tokenizer."""
        if self.model.path is not None:
            return self.model.path
        assert self.tokenizer is not None  # by the check below
        return self.tokenizer.path

    @model_validator(mode="after")
    def _one_tokenizer(self) -> Self:
        if self.model.path is not None and self.tokenizer is not None:
            raise ValueError(
                f"tokenizer.path = {self.tokenizer.path!r} with model.path: the model has its own; leave it out"
            )
        if self.model.path is None and self.tokenizer is None:
            taught = getattr(self, "teacher", WORKED_SOLUTIONS)
            if taught == WORKED_SOLUTIONS:
                raise ValueError(
                    "tokenizer.path is missing: with model.config there is no model to take a tokenizer from; set it "
                    "to a model's directory"
                )
            self.tokenizer = ExistingTokenizer(path=taught)  # the teacher's
        return self


class SFTRecipe(SupervisedRecipe):
    kind: Literal["sft"] = "sft"
    data: ChatDataSection
    optimizer: FineTuningOptimizer = FineTuningOptimizer()
    schedule: FineTuningSchedule = FineTuningSchedule()
    mtp: MTPSection = MTPSection()
    balance: NoBalance = NoBalance()
    train: TrainSection
    spikes: SpikesSection = SpikesSection()
    parallel: ParallelSection = ParallelSection()


class RewardRecipe(Recipe):
    """A reward model for helpfulness, trained on pairs of answers (R1 §2.3.4)."""

    kind: Literal["reward"] = "reward"
    data: PairDataSection = PairDataSection()
    pairs: PairsSection | None = None  # None: they are in data.path
    optimizer: FineTuningOptimizer = FineTuningOptimizer()
    schedule: FineTuningSchedule = FineTuningSchedule()
    train: TrainSection  # a batch is of pairs

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.data.path is None) == (self.pairs is None):
            raise ValueError("give either data.path (a file of pairs) or [pairs] (to make them), not both or neither")
        if self.train.compile:
            raise ValueError("train.compile: batches of pairs differ in length, and each would compile; leave it out")
        return self


class RLRecipe(FineTuningRecipe):
    kind: Literal["rl"] = "rl"
    environments: Environments
    template: Literal["chat", "r1-zero", "plain"] = "chat"
    reward: RewardSection = RewardSection()
    grpo: GRPOSection = GRPOSection()
    opd: OPDSection | None = None
    rollouts: RolloutsSection = RolloutsSection()
    optimizer: RLOptimizer = RLOptimizer()
    mtp: PolicyMTPSection = PolicyMTPSection()
    balance: NoBalance = NoBalance()
    steps: Count | None = None
    seconds: Positive | None = None
    warmup_steps: int = Field(default=0, ge=0, lt=1 << 31)
    decay: Share = 0.0  # fraction of the run, at its end, in which the learning rate decays to 0
    save_every: Count = 50
    keep: Count = 2
    sample_every: Count = 10
    eval_every: int = Field(default=0, ge=0, lt=1 << 31)  # steps; 0: never
    eval_problems: Count = 200  # per environment, of the dev split
    # The same bits in sampling and training: on-policy ratios are exactly 1 (docs/rl.md). FP32, on a CPU.
    exact: bool = False
    keep_start: bool = False  # release the initial model if the last evaluation is below the first; needs eval_every

    @property
    def rounds(self) -> bool:
        """Whether rollouts or updates are in fewer bits than `model.dtype`."""
        return self.grpo.rollout_weights is not None or self.precision is not None

    @property
    def differs(self) -> bool:
        """Whether the policy that samples is another than the one trained: it is rounded or stale."""
        return self.rounds or bool(self.rollouts.staleness)

    @property
    def measures_mismatch(self) -> bool:
        """Whether the log-probabilities of sampling and training are compared."""
        return self.differs or self.grpo.correction is not None

    @property
    def rewarded(self) -> bool:
        """Whether some part of the reward counts; without, distillation is all there is."""
        return not self.reward.rewards_nothing

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = cast(dict[str, Any], given)
        return fields | {"reward": with_preset(REWARD_PRESETS, fields.get("grpo"), fields.get("reward", {}))}

    @model_validator(mode="after")
    def _together(self) -> "RLRecipe":
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("give exactly one of steps or seconds")
        if self.steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps}: the run has {self.steps} steps; warm up in fewer")
        if self.keep_start and not self.eval_every:
            raise ValueError("keep_start needs evaluations, but eval_every is 0; set eval_every")
        if self.exact:
            self._check_exact()
        if self.grpo.rollout_weights in ("int8", "int4"):
            self._check_packed(self.grpo.rollout_weights)
        workers, questions = self.rollouts.workers or 1, self.grpo.questions_per_step
        if workers > questions:
            raise ValueError(
                f"rollouts.workers = {workers}: a step has only grpo.questions_per_step = {questions} groups to share "
                "among them; lower it"
            )
        names = [section.name for section in self.environments]
        check_rl(self.grpo, self.opd, names, self.differs, self.rewarded)
        check_open(self.environments, self.reward, self.opd is not None, bool(self.eval_every))
        return self

    def _check_exact(self) -> None:
        """Raises ValueError for what the exact mode does not compute."""
        for field, value, allowed, remedy in (
            ("model.dtype", self.model.dtype, ("float32",), 'it computes in FP32, so set model.dtype = "float32"'),
            ("device", self.device, ("auto", "cpu"), "it computes on a CPU, so leave device out"),
            ("precision", self.precision, (None,), "it rounds nothing, so leave precision out"),
            ("grpo.rollout_weights", self.grpo.rollout_weights, (None,), "it samples what is trained, so leave it out"),
        ):
            if value not in allowed:
                raise ValueError(f"exact = true with {field} = {value!r}: {remedy}")
        if self.lora is not None:
            raise ValueError("exact = true with lora: low-rank updates are not computed exactly; leave one of them out")

    def _check_packed(self, weights: str) -> None:
        """Raises ValueError for what rollouts from packed weights cannot do."""
        for given, field, why in (
            (self.precision is not None, "precision", "products of packed weights are not computed in FP8"),
            (self.rollouts.replay_routing, "rollouts.replay_routing", "packed weights run without recorded routers"),
            (self.device not in ("auto", "cpu"), f"device = {self.device!r}", "packed weights are for a CPU"),
        ):
            if given:
                raise ValueError(f"grpo.rollout_weights = {weights!r} with {field}: {why}; leave one of them out")


class DistillRecipe(SupervisedRecipe):
    """Rejection sampling from a teacher, then SFT of a student (R1 §2.3.3, §2.4)."""

    kind: Literal["distill"] = "distill"
    teacher: LocalPath  # a model, or "worked-solutions" (rl/worked)
    environments: Environments
    template: Literal["chat", "r1-zero", "plain"] = "chat"
    reward: RewardSection = RewardSection()
    problems: Count = 1000
    samples: Size = 8
    keep_per_problem: Count = 1
    filter: FilterSection = FilterSection()
    mix: list[MixSection] = Field(default=[])
    temperature: Temperature = 1.0
    max_tokens: Size = 256
    sequence_length: Length = 512
    optimizer: FineTuningOptimizer = FineTuningOptimizer()
    schedule: FineTuningSchedule = FineTuningSchedule()
    balance: NoBalance = NoBalance()
    train: TrainSection

    @model_validator(mode="after")
    def _enough_samples(self) -> "DistillRecipe":
        check_open(self.environments, self.reward, taught=False, evaluates=False)
        if self.keep_per_problem > self.samples:
            raise ValueError(
                f"keep_per_problem = {self.keep_per_problem}: only samples = {self.samples} are drawn; lower it"
            )
        return self
