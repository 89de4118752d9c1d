"""Memory and time of a training step by precision, recomputation and moments, measured.

The V3-style model of fp8_loss.py. Each form runs in a process of its own. "kept": what a forward pass allocates and
does not free, by PyTorch's record, of which a token's share is the difference between two batches. "peak": the most
that a whole training step has allocated at one time, by the same record, and by the operating system the most that the
process had resident, above what it had before the model was built. State: the bytes of weights, masters and moments
that are there after a step, and of gradients before it. Step times of the forms are taken in turns, in one process.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import arguments, fastest, program, report, take_turns
from fp8_loss import SIZES
from rorqual.data.loader import Batch
from rorqual.model import ModelConfig, Transformer
from rorqual.recipe import BalanceSection, MTPSection, OptimizerSection, ScheduleSection
from rorqual.train import set_seed
from rorqual.train.trainer import Trainer

LENGTH = 256
ROUNDS = 5
FORMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "fp8": {"precision": "fp8"},
    "fp8, v3": {"precision": "fp8", "recompute": "v3"},
    "fp8, full": {"precision": "fp8", "recompute": "full"},
    "fp8, v3, bfloat16 moments": {"precision": "fp8", "recompute": "v3", "moments": "bfloat16"},
    "fp8, v3, 8bit moments": {"precision": "fp8", "recompute": "v3", "moments": "8bit"},
}


def config(layers: int) -> ModelConfig:
    sizes: dict[str, Any] = SIZES | {"num_hidden_layers": layers}
    return ModelConfig(model_type="deepseek_v3", vocab_size=4096, **sizes)


def trainer_of(form: str, dtype: str, layers: int) -> Trainer:
    how = dict(FORMS[form])
    section = OptimizerSection(lr=1e-3, weight_decay=0.1, moments=how.pop("moments", "float32"))
    set_seed(0)
    model = Transformer(config(layers))
    return Trainer(
        model, section, ScheduleSection(name="constant", warmup=0), MTPSection(), BalanceSection(), dtype=dtype,
        notify=lambda _: None, **how,
    )  # fmt: skip


def batch_of(rows: int) -> Batch:
    ids = torch.randint(0, 4096, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(rows))
    positions = torch.arange(LENGTH).expand(rows, LENGTH)
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(rows, LENGTH), positions, None)


def recorded() -> Any:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def kept(trainer: Trainer, rows: int) -> int:
    """Bytes that a forward pass leaves allocated."""
    batch = batch_of(rows)
    trainer.model.train()
    with recorded() as profile, trainer.activations.kept():
        hidden = trainer.model(batch.inputs)
        states = [hidden, *trainer.model.mtp_hidden_states(hidden, batch.inputs)]
    assert states[-1].requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.events())


def peak(trainer: Trainer, rows: int) -> int:
    """The most bytes that a training step has allocated above what is there before it."""
    with recorded() as profile:
        trainer.step([batch_of(rows)], 0.5)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        total += event["args"]["Bytes"]
        most = max(most, total)
    return most


def resident(field: str) -> int:
    """Linux only."""
    found = re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def measure(form: str, dtype: str, layers: int, rows: int) -> dict[str, float]:
    small = trainer_of(form, dtype, 2)
    small.step([batch_of(1)], 0.5)  # libraries load their code at first use
    del small
    before = resident("VmRSS")
    trainer = trainer_of(form, dtype, layers)
    for _ in range(2):
        trainer.step([batch_of(rows)], 0.5)
    process = resident("VmHWM") - before
    state = trainer.optimizer.state_bytes()
    count = sum(p.numel() for p in trainer.model.parameters())
    deeper = trainer_of(form, dtype, layers + 1)
    tokens = rows // 2 * LENGTH
    own = kept(trainer, rows) - kept(trainer, rows - rows // 2)
    return {
        "parameters": count,
        "weights": sum(p.nbytes for p in trainer.model.parameters()) / count,
        "masters": state.masters / count,
        "gradients": state.gradients / count,
        "moments": state.moments / count,
        "kept": own / tokens,
        "kept_by_layer": (kept(deeper, rows) - kept(deeper, rows - rows // 2) - own) / tokens,
        "peak": peak(trainer, rows),
        "resident": process,
    }


def in_its_own_process(form: str, dtype: str, layers: int, rows: int) -> dict[str, Any]:
    code = "import json, sys, fp8_memory; print(json.dumps(fp8_memory.measure(*json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps([form, dtype, layers, rows])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    print(f"{form}, {dtype}: measured", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def seconds(trainer: Trainer, batch: Batch) -> float:
    start = time.perf_counter()
    trainer.step([batch], 0.5)
    return time.perf_counter() - start


def main() -> None:
    args = arguments(__doc__)
    layers, rows, rounds = (2, 2, 1) if args.quick else (SIZES["num_hidden_layers"], 8, ROUNDS)
    forms = ["baseline", "fp8, v3, 8bit moments"] if args.quick else list(FORMS)
    # Bytes do not depend on how fast the processor is; emulated BF16 takes long, so its batch is smaller.
    sizes = {dtype: rows if dtype == fastest() else min(rows, 4) for dtype in ("float32", "bfloat16")}
    found = {
        dtype: {form: in_its_own_process(form, dtype, layers, size) for form in forms} for dtype, size in sizes.items()
    }
    trainers, batch = {form: trainer_of(form, fastest(), layers) for form in forms}, batch_of(rows)
    times = take_turns({f: lambda f=f: seconds(trainers[f], batch) for f in forms}, rounds + 1)
    ratios: dict[str, float] = {}
    tables: list[tuple[str, list[str], list[list[Any]]]] = []
    for dtype, forms_of in found.items():
        base = forms_of["baseline"]
        rows_of: list[list[Any]] = []
        for form, m in forms_of.items():
            rows_of.append([
                form, *(f"{m[k]:.2f}" for k in ("weights", "masters", "gradients", "moments")),
                f"{m['kept_by_layer']:.0f}", f"{m['kept']:.0f}", f"{m['kept'] / base['kept'] - 1:+.1%}",
                m["peak"] / 1e6, m["resident"] / 1e6,
            ])  # fmt: skip
            if form != "baseline":
                name = form.replace(", ", "-").replace(" ", "-")
                ratios[f"kept/{dtype}-{name}"] = m["kept"] / base["kept"]
                ratios[f"peak/{dtype}-{name}"] = m["peak"] / base["peak"]
        tables.append((
            f"{dtype}: bytes a parameter; bytes a token that a MoE layer and the whole network keep; MB of a step of "
            f"{sizes[dtype] * LENGTH} tokens",
            ["", "weights", "masters", "gradients", "moments", "a layer", "network", "", "peak", "process"], rows_of,
        ))  # fmt: skip
    medians = {form: statistics.median(found_[1:]) for form, found_ in times.items()}
    ratios |= {
        f"step-seconds/{form.replace(', ', '-').replace(' ', '-')}": medians[form] / medians["baseline"]
        for form in forms[1:]
    }
    tables.append((
        f"Seconds of a step of {rows * LENGTH} tokens, {fastest()}", ["", "median", "of the baseline's"],
        [[form, medians[form], f"{medians[form] / medians['baseline']:.2f}"] for form in forms],
    ))  # fmt: skip
    figures = {"bytes": found, "tokens": {d: n * LENGTH for d, n in sizes.items()}, "step_seconds": times}
    report("fp8_memory", args, ratios, figures, tables, ["torch"])


if __name__ == "__main__":
    program(main)
