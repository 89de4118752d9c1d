"""The figures of a report, each with a title and a caption."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from rorqual.report.charts import THEMES, Theme, errorbars, grouped_bars, lines, save
from rorqual.report.run_record import Part, Run, is_number


@dataclass(frozen=True)
class Picture:
    """A drawn figure; light and dark: PNG files; part: name of the `Part` it belongs to, None: the whole run."""

    part: str | None
    title: str
    caption: str
    light: Path
    dark: Path


@dataclass(frozen=True)
class Curve:
    """Metrics by step. `keys`: metric → label; `prefix`: also all metrics with this prefix; `scale`: factor.

    `kind`: of the runs whose curve of this name it is; None: all others'.
    """

    name: str
    title: str
    caption: str
    unit: str
    keys: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    scale: float = 1.0
    smooth: bool = True
    from_zero: bool = True  # whether the axis starts at zero
    kind: str | None = None


PERCENT = 100.0
CURVES = (
    Curve(
        "dev",
        "Accuracy on the development set",
        "pass@1 on held-out problems during the run. It should rise and stay up; a late fall means that the policy "
        "has diverged.",
        "pass@1, %", prefix="eval_", scale=PERCENT, smooth=False,
    ),
    Curve(
        "reward",
        "Reward by part",
        "Mean over all answers of a step. Accuracy should rise; if only the format rises, the model learned the "
        "format and not the task.",
        "mean reward", keys=(("reward", "total"),), prefix="reward_", from_zero=False,
    ),
    Curve(
        "length",
        "Length of answers",
        "Tokens per answer. It grows where longer thinking helps; growth up to max_tokens at flat accuracy is "
        "padding.",
        "tokens", keys=(("length", "length"),),
    ),
    Curve(
        "entropy",
        "Entropy of the policy",
        "Per token. A slow fall is learning; a collapse to zero ends exploration.",
        "nats per token", keys=(("entropy", "entropy"),), from_zero=False,
    ),
    Curve(
        "verdicts",
        "Self-verification",
        "How often the model marks its last candidate correct (✓), and the precision of that. Falling precision with "
        "more marks means that it learns to mark wrong answers.",
        "%", keys=(("claimed", "self-verified"), ("verdict_precision", "verifier precision")), scale=PERCENT,
    ),
    Curve(
        "signal",
        "Samples without gradient",
        "Zero-std groups have the same reward for all answers and give no gradient; truncated answers reached "
        "max_tokens; clipped tokens moved too far in one update. All three should stay low.",
        "%",
        keys=(
            ("zero_std_groups", "zero-std groups"), ("truncated", "truncated"),
            ("clip_fraction", "clipped tokens"),
        ),
        scale=PERCENT,
    ),
    Curve(
        "kl",
        "Distance from the reference model",
        "KL divergence per token. It rises as the model changes; a sudden jump is a warning.",
        "nats per token", keys=(("kl", "KL"),),
    ),
    Curve(
        "mismatch",
        "Mismatch of rollouts",
        "How far the policy that samples is from the one that is trained, where they differ. It should stay small; "
        "where it grows, importance weights are cut or masked (grpo.correction), and gradients are biased.",
        "nats per token", keys=(("mismatch_logprob", "difference in log-probability"), ("mismatch_kl", "KL")),
    ),
    Curve(
        "loss",
        "Loss",
        "Training cross-entropy per token, and of the token after next (MTP) where the model predicts it. It falls "
        "fast, then slowly; a lasting spike means divergence.",
        "nats per token", keys=(("loss", "next token"), ("mtp_loss", "token after next (MTP)")), from_zero=False,
    ),
    Curve(
        "loss",
        "Loss",
        "−log σ(score of the better answer − that of the worse one). It is 0.69 for a model that cannot tell them "
        "apart.",
        "nats per pair", keys=(("loss", "training"), ("valid_loss", "held out")), kind="reward",
    ),
    Curve(
        "bits-per-byte",
        "Held-out bits per byte",
        "Cross-entropy on held-out text, independent of the tokenizer. Rising while the training loss falls means "
        "overfitting.",
        "bits per byte", keys=(("valid_bpb", "held out"),), smooth=False, from_zero=False,
    ),
    Curve(
        "pair-accuracy",
        "Held-out pairs",
        "Fraction of the pairs whose better answer has the higher score of the reward model. 0.5 is chance.",
        "fraction", keys=(("valid_accuracy", "held out"),), smooth=False, from_zero=False,
    ),
    Curve(
        "maxvio",
        "Expert load balance by layer",
        "MaxVio: load of the busiest expert over the mean, minus 1, in each MoE layer. Bias balancing should bring "
        "every layer near 0 and keep it there.",
        "MaxVio", prefix="max_vio_per_layer",
    ),
    Curve(
        "lr",
        "Learning rate",
        "As set by the schedule, to read the other curves.",
        "rate", keys=(("lr", "learning rate"),), smooth=False,
    ),
    Curve(
        "grad-norm",
        "Gradient norm",
        "Before clipping. It should be steady; unbounded growth precedes divergence.",
        "norm", keys=(("grad_norm", "gradient norm"),),
    ),
    Curve(
        "speed",
        "Speed",
        "Thousand tokens per second in training and in generation. A dip means that another program used the machine.",
        "thousand tokens/s",
        keys=(("tokens_per_second", "training"), ("rollout_tokens_per_second", "generation")), scale=1e-3,
    ),
    Curve(
        "utilisation",
        "Utilisation",
        "FLOP/s over the measured matmul peak of this machine. Higher is better.",
        "% of the measured peak", keys=(("utilisation", "utilisation"),), scale=PERCENT,
    ),
)  # fmt: skip


def draw_all(run: Run, folder: Path) -> list[Picture]:
    """Draw the figures that the run has data for, each in a light and a dark version (NAME.png, NAME-dark.png)."""
    folder.mkdir(exist_ok=True)
    pictures = []
    plans: list[tuple[str | None, str, str, str, Callable[[Axes, Theme], bool]]] = [
        (None, "stages", "Accuracy by stage",
         "pass@1 on held-out problems after each stage, with 95 % intervals. Intervals that do not overlap mark a "
         "real gain.", lambda axes, theme: _stages(run, axes, theme)),
        (None, "thinking", "Accuracy by thinking budget",
         "The final model, with `</think>` forced after N thinking tokens. A rising curve means that longer thinking "
         "helps; where it is flat, it does not.", lambda axes, theme: _thinking(run, axes, theme)),
        (None, "difficulty", "Accuracy by difficulty",
         "The final model, from easy to hard problems.",
         lambda axes, theme: _difficulty(run, axes, theme)),
    ]  # fmt: skip
    for part in run.parts:
        prefix = part.name.replace("/", "-") + "-" if part.name else ""
        plans += [(part.name, prefix + c.name, c.title, c.caption, _curve(part, c)) for c in _curves_of(part.kind)]
    for owner, name, title, caption, plot in plans:
        files = [folder / f"{name}{suffix}.png" for suffix in ("", "-dark")]
        if all(save(plot, theme, file) for theme, file in zip(THEMES, files, strict=True)):
            pictures.append(Picture(owner, title, caption, *files))
    return pictures


def _curves_of(kind: str) -> list[Curve]:
    own = {curve.name for curve in CURVES if curve.kind == kind}
    return [curve for curve in CURVES if curve.kind == kind or (curve.kind is None and curve.name not in own)]


def _curve(part: Part, curve: Curve) -> Callable[[Axes, Theme], bool]:
    def plot(axes: Axes, theme: Theme) -> bool:
        if curve.name == "maxvio":
            series = _layers(part) or {"mean": part.series("max_vio")}
        else:
            series = {label: part.series(key) for key, label in curve.keys}
            named = dict(curve.keys)
            series |= {
                key.removeprefix(curve.prefix).replace("_", " "): part.series(key)
                for key in part.keys(curve.prefix)
                if curve.prefix and key not in named
            }
        series = {label: (x, [curve.scale * v for v in y]) for label, (x, y) in series.items() if len(x) > 1}
        if not series:
            return False
        lines(axes, theme, series, smooth=curve.smooth, ordered=curve.name == "maxvio")
        axes.set_xlabel("step")
        axes.set_ylabel(curve.unit)
        if curve.from_zero:
            axes.set_ylim(bottom=0)
        return True

    return plot


def _layers(part: Part) -> dict[str, tuple[list[float], list[float]]]:
    series: dict[str, tuple[list[float], list[float]]] = {}
    for line in part.lines:
        values = line.get("max_vio_per_layer")
        for layer, value in enumerate(values if isinstance(values, list) else []):
            if is_number(value):
                steps, heights = series.setdefault(f"layer {layer + 1}", ([], []))
                steps.append(float(line["step"]))
                heights.append(float(value))
    return series


def _stages(run: Run, axes: Axes, theme: Theme) -> bool:
    bars = {family: run.results(family) for family in run.families}
    if not any(bars.values()):
        return False
    stages = list(dict.fromkeys(name for results in bars.values() for name, _ in results))
    grouped_bars(axes, theme, stages, {family: {n: _point(r) for n, r in results} for family, results in bars.items()})
    axes.set_ylabel("pass@1, %")
    return True


def _thinking(run: Run, axes: Axes, theme: Theme) -> bool:
    curves = {
        family: [
            (p["budget"], *_point(p)) for p in points if is_number(p.get("budget")) and is_number(p.get("pass_at_1"))
        ]
        for family, points in (run.summary.get("thinking_curve") or {}).items()
    }
    curves = {family: sorted(points) for family, points in curves.items() if points}
    if not curves:
        return False
    errorbars(axes, theme, curves)
    axes.set_xlabel("thinking budget, tokens")
    axes.set_ylabel("pass@1, %")
    return True


def _difficulty(run: Run, axes: Axes, theme: Theme) -> bool:
    groups = {
        family: {
            f"{family}: {level}" if len(run.families) > 1 else level: _point(result)
            for level, result in levels.items()
            if is_number(result.get("pass_at_1"))
        }
        for family, levels in run.difficulties.items()
    }
    names = [name for bars in groups.values() for name in bars]
    if len(names) < 2:
        return False
    grouped_bars(axes, theme, names, groups, sideways=True)
    axes.set_xlabel("pass@1, %")
    return True


def _point(result: dict) -> tuple[float, float, float]:
    """pass@1 and its interval in percent."""
    value = result["pass_at_1"]
    low, high = result.get("interval") or (value, value)
    return PERCENT * value, PERCENT * low, PERCENT * high
