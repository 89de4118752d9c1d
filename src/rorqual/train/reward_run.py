"""Training of a reward model on pairs of answers, to its release (R1 §2.3.4)."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.checkpoint.huggingface import save_model
from rorqual.data.loader import Loader
from rorqual.data.preference_pairs import PairDataset, PairSplit
from rorqual.errors import UserError, file_error
from rorqual.files import read_json, write_text
from rorqual.model.reward_model import RewardModel
from rorqual.plan.cost import parameters
from rorqual.plan.ledger import Ledger
from rorqual.plan.reward_here import predict_reward
from rorqual.recipe import RewardRecipe
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.train.build_model import build_model
from rorqual.train.model_card import card
from rorqual.train.preference import PreferenceObjective, pair_scores
from rorqual.train.telemetry import Metric
from rorqual.train.trainer import Trainer
from rorqual.train.training_run import TrainingRun

RESULT = "reward.json"  # in the run's folder
MOST_MEASURED = 256  # training pairs, whose scores' mean and deviation are kept
THEN = "then continue with --resume"


@dataclass(frozen=True)
class PairResult:
    """On held-out pairs."""

    accuracy: float  # fraction whose better answer has the higher score; an equal one counts half
    loss: float  # nats per pair
    step: int


@dataclass
class RewardRun(TrainingRun):
    held_out: PairDataset | None = None
    found: PairResult | None = field(default=None)  # the newest

    def evaluate(self) -> None:
        if self.held_out is not None:
            self.found = self.result(self.held_out)

    def evaluated(self) -> dict[str, Metric]:
        if self.found is None or self.found.step != self.trainer.steps:
            return {}
        return {"valid_accuracy": self.found.accuracy, "valid_loss": self.found.loss}

    def score(self) -> float | None:
        return self.found.loss if self.found is not None and self.found.step == self.trainer.steps else None

    def state(self) -> dict[str, Any]:
        return super().state() | {"found": self.found and asdict(self.found)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.found = state["found"] and PairResult(**state["found"])

    @property
    def model(self) -> RewardModel:
        assert isinstance(self.trainer.model, RewardModel)
        return self.trainer.model

    def result(self, pairs: PairDataset) -> PairResult:
        better, worse = self.scores(pairs)
        right = (better > worse).double() + 0.5 * (better == worse).double()
        loss = -torch.nn.functional.logsigmoid((better - worse).double()).mean()
        return PairResult(float(right.mean()), float(loss), self.trainer.steps)

    @torch.no_grad()
    def scores(self, pairs: PairDataset, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Of the better and of the worse answers, by the weights to be released."""
        self.model.eval()
        found: list[tuple[Tensor, Tensor]] = []
        with self.trainer.released_weights():
            for batch in pairs.batches(self.section.micro_batch or self.section.batch_size, most):
                here = batch.to(self.trainer.device)
                hidden = self.model(here.inputs, here.positions, here.attention_mask)
                better, worse = pair_scores(self.model, hidden, here)
                found.append((better.cpu(), worse.cpu()))
        better, worse = zip(*found, strict=True)
        return torch.cat(better), torch.cat(worse)


def train_reward(
    recipe: RewardRecipe, run_dir: Path, tokenizer: Tokenizer, split: PairSplit, device: torch.device
) -> Path:
    """Train on the pairs, resuming from the newest checkpoint, and release the model; returns the run's folder.

    Raises as `TrainingRun.fit`.
    """
    model = RewardModel.of(build_model(recipe.model, tokenizer, recipe.seed))
    section, rows, length = recipe.train, len(split.train), float(split.train.sizes.mean())
    trainer = Trainer(
        model, recipe.optimizer, recipe.schedule, dtype=recipe.model.dtype, ema=section.ema,
        precision=recipe.precision, recompute=recipe.recompute, device=device, objective=PreferenceObjective,
    )  # fmt: skip
    loader = Loader([split.train], [1.0], recipe.seed)
    run = RewardRun(
        run_dir, section, trainer, recipe.track, loader=loader, held_out=split.valid,
        forecast=lambda: predict_reward(model.config, recipe, rows, length) if device.type == "cpu" else {},
    )  # fmt: skip
    run.fit()
    _release(recipe, run, tokenizer, split)
    return run_dir


def _release(recipe: RewardRecipe, run: RewardRun, tokenizer: Tokenizer, split: PairSplit) -> None:
    """Write model/, reward.json and ledger.json."""
    trainer, model, directory = run.trainer, run.model, run.run_dir / "model"
    measured = min(MOST_MEASURED, len(split.train)) + (0 if split.valid is None else len(split.valid))
    print(f"scoring {measured} pairs, for the scale of the scores and their accuracy", file=sys.stderr)
    scores = torch.cat(run.scores(split.train, MOST_MEASURED)).double()
    model.score_mean, model.score_std = float(scores.mean()), max(float(scores.std(correction=0)), 1e-6)
    held = None if split.valid is None else run.result(split.valid)
    tokenizer.pad_token, model.config = _padding(tokenizer, model)
    with trainer.released_weights():
        save_model(model, directory, tokenizer)
    trainer.close()
    result = {
        "pairs": len(split.train),
        "held_out": 0 if split.valid is None else len(split.valid),
        "dropped": split.dropped,
        "valid_accuracy": held and held.accuracy,
        "valid_loss": held and held.loss,
        "score_mean": model.score_mean,
        "score_std": model.score_std,
    }
    write_text(run.run_dir / RESULT, json.dumps(result, indent=1) + "\n", then=THEN)
    ledger = Ledger(run.run_dir, run.predicted, trainer.dtype, trainer.device.type)
    ledger.add(recipe.kind, tokens=trainer.tokens, flops=trainer.flops, seconds=run.seconds)
    ledger.joules = run.joules
    write_text(directory / "README.md", _card(recipe, run, result), then=THEN)
    ledger.write()


def _padding(tokenizer: Tokenizer, model: RewardModel) -> tuple[str | None, Any]:
    """A token with which transformers may pad, and the config that names it.

    It reads the score at the last token that is none of padding, so that padding must not end a conversation.
    """
    ends = {tokenizer.eos_token_id, *model.released.end_tokens}
    own = [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id]
    others = [number for number, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    found = next((number for number in [*own, *others] if number not in ends), None)
    name = None if found is None else tokenizer.convert_ids_to_tokens(found)
    return name, model.config.replace(pad_token_id=found)


def read_result(run_dir: Path) -> dict[str, Any]:
    """What a run wrote of its pairs. Raises UserError for a damaged or missing file."""
    path, then = run_dir / RESULT, "delete the run's model/, then continue with --resume"
    try:
        found = read_json(path, then)
    except FileNotFoundError as e:
        raise file_error(path, e, "read", then) from None
    if not isinstance(found, dict) or not {"pairs", "held_out", "valid_accuracy"} <= found.keys():
        raise UserError(f"{path} is damaged; {then}")
    return found


def described(result: Mapping[str, Any]) -> str:
    """The held-out accuracy, in a few words."""
    if result.get("valid_accuracy") is None:
        return f"{result['pairs']} pairs, none held out"
    return f"{100 * result['valid_accuracy']:.1f} % of {result['held_out']} held-out pairs right"


def _card(recipe: RewardRecipe, run: RewardRun, result: Mapping[str, Any]) -> str:
    trainer, config = run.trainer, run.model.config
    source = recipe.data.path
    if recipe.pairs is not None:
        source = f"answers of {recipe.pairs.model} to {recipe.pairs.prompts}, against worse twins made by rule"
    rows = {
        "architecture": run.model.config_dict()["architectures"][0],
        "parameters": f"{parameters(config)[0] + config.hidden_size:,}",
        "pairs": f"{result['pairs']:,} of {source}",
        "training tokens": f"{trainer.tokens:,}",
        "compute": f"{trainer.flops:.3g} FLOP in {run.seconds:,.0f} seconds",
        "accuracy": described(result),
        "scores of training answers": f"mean {result['score_mean']:.4g}, deviation {result['score_std']:.4g}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    text = f"""A reward model from `{recipe.model.path}` by Rorqual (`rorqual reward`), seed {recipe.seed}: a higher
score for the better of two answers (−log σ(r_chosen − r_rejected)). It is read at the last token of a conversation.

| | |
|---|---|
{table}
"""
    use = f"""`[reward.model] path = "{run.run_dir}/model"` in a recipe for `rorqual rl`, or
`AutoModelForSequenceClassification.from_pretrained` in transformers."""
    return card(recipe, run.run_dir, [config.model_type, "reward-model"], text, "text-classification", use)
