"""Pipeline schedules side by side: four processes run the same layers with 1F1B, ZB1P and DualPipeV in turn.

Bubbles can only be measured where every process has a core of its own. On fewer cores a shim takes the place of the
computing: each action sleeps for a fixed time a layer, as long as it would compute, and while its tokens travel to
experts and back, which only another micro-batch's computing can hide. All else is real: processes, messages, order,
turns. The figures say which of the two was run; --mode sleep or compute chooses.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from common import arguments, program, report
from rorqual.data.loader import Batch
from rorqual.errors import UserError
from rorqual.kernels.cross_entropy import linear_cross_entropy
from rorqual.model import ModelConfig, Transformer
from rorqual.model.moe import Routing
from rorqual.parallel.courier import Courier
from rorqual.parallel.mesh import build_mesh
from rorqual.parallel.pipeline import Pipeline
from rorqual.plan.schedule import SCHEDULES, Action, Kind
from rorqual.plan.simulate import Timeline, Times, simulate
from rorqual.sections import ParallelSection

RANKS = 4
NAMES = {"1f1b": "1f1b", "zb1p": "zero-bubble", "dualpipev": "dualpipev"}


@dataclass(frozen=True)
class Sizes:
    """Of a run. compute: milliseconds that each of F, I and W sleeps for a layer; travel: that F and I do beside, half
    for dispatch and half for combine. V3 §3.2.1 has about as much of one as of the other.
    """

    layers: int = 8
    hidden: int = 192
    length: int = 256
    micro_batches: int = 16
    rounds: int = 7
    compute: float = 10.0
    travel: float = 10.0


QUICK = Sizes(hidden=32, length=16, micro_batches=8, rounds=2)


class Asleep:
    """The shim: sleeps in place of an action's computing, and makes zeros."""

    def __init__(self, pipeline: Pipeline, sizes: Sizes, batch: Batch) -> None:
        self.pipeline, self.sizes = pipeline, sizes
        self.zeros = torch.zeros(*batch.inputs.shape, sizes.hidden)

    def __call__(self, action: Action, given: list[Tensor]) -> list[Tensor]:
        kinds: str = "IW" if action.kind == "B" else action.kind
        for kind in kinds:
            for _ in self.pipeline.layers[action.stage]:
                if kind == "W":
                    time.sleep(self.sizes.compute / 1e3)
                    continue
                for _ in range(2):
                    time.sleep(self.sizes.compute / 2e3)
                    self.pipeline.courier.submit(time.sleep, self.sizes.travel / 2e3).result()
        return [self.zeros for _ in self.pipeline.flow.made(action)]


class Loss:
    """Cross-entropy."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def losses(self, hidden: Tensor, batch: Batch, routing: list[Routing]) -> Tensor:
        flat, targets, weights = (t.flatten(0, 1) for t in (hidden, batch.targets, batch.weights))
        return linear_cross_entropy(flat, self.model.head_weight, targets, weights)

    def auxiliary(self, routing: list[Routing], batch: Batch) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Found:
    """What one run showed: its steps on all ranks, and the median seconds of its actions."""

    timeline: Timeline
    times: dict[tuple[str, int], float]

    def simulated(self, name: str, micro_batches: int) -> Timeline:
        """The schedule with the measured times of its actions."""
        schedule = SCHEDULES[name](RANKS, micro_batches)
        stages = range(schedule.stages)
        F, B, I, W = ([self.times.get((kind, stage), 0.0) for stage in stages] for kind in get_args(Kind))  # noqa: E741
        pairs = [self.times.get(("FB", stage), F[stage] + B[stage]) for stage in stages]
        return simulate(schedule, Times(F, B, I, W, pairs if name == "dualpipev" else None))


# -- in the processes


def serve(rank: int, folder: str, to: Connection, sizes: Sizes, asleep: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    store = dist.FileStore(str(Path(folder) / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh, courier = build_mesh(ParallelSection(pipeline=RANKS)), Courier()
    batches = [_batch(sizes, number) for number in range(sizes.micro_batches)]
    pipelines: dict[str, Pipeline] = {}
    for name in SCHEDULES:
        torch.manual_seed(0)
        model = Transformer(_config(sizes)).train()
        pipelines[name] = Pipeline(model, mesh, courier, name, sizes.micro_batches)
    for _ in range(1 + sizes.rounds):  # the first, which warms up, is left out
        for name, pipeline in pipelines.items():
            mesh.pipeline.barrier("start of a run")
            begin = time.perf_counter()
            if asleep:
                work = Asleep(pipeline, sizes, batches[0])
                pipeline.last_timeline = pipeline.execute(pipeline.flow, work, batches)
            else:
                pipeline.run(batches, Loss(pipeline.model), lambda model=pipeline.model: model.zero_grad())
            to.send((name, begin, pipeline.last_timeline.spans[0], pipeline.measured_times()))
    courier.close()
    dist.destroy_process_group()


def _config(sizes: Sizes) -> ModelConfig:
    hidden = sizes.hidden
    return ModelConfig(
        model_type="deepseek_v3", vocab_size=32, hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=sizes.layers, num_attention_heads=4, q_lora_rank=hidden // 2, kv_lora_rank=hidden // 4,
        qk_nope_head_dim=hidden // 8, qk_rope_head_dim=hidden // 8, v_head_dim=hidden // 8, n_routed_experts=8,
        n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=hidden // 2, first_k_dense_replace=0,
        max_position_embeddings=sizes.length,
    )  # fmt: skip


def _batch(sizes: Sizes, number: int) -> Batch:
    tokens = torch.randint(0, 32, (1, sizes.length + 1), generator=torch.Generator().manual_seed(number))
    weights = torch.full((1, sizes.length), 1 / sizes.length)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, torch.arange(sizes.length).unsqueeze(0), None)


# -- in this one


def measure(sizes: Sizes, asleep: bool, limit: float) -> dict[str, list[Found]]:
    """Runs by schedule. Raises UserError where a process ends early or none answers within `limit` seconds."""
    context = multiprocessing.get_context("fork")  # without importing torch again; nothing has computed here yet
    found: dict[str, list[Found]] = {name: [] for name in SCHEDULES}
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(RANKS)]
        processes = [
            context.Process(target=serve, args=(rank, folder, to, sizes, asleep), daemon=True)
            for rank, (_, to) in enumerate(pipes)
        ]
        for process, (_, to) in zip(processes, pipes, strict=True):
            process.start()
            to.close()
        try:
            for _ in range((1 + sizes.rounds) * len(SCHEDULES)):
                answers = [_answer(ours, rank, limit) for rank, (ours, _) in enumerate(pipes)]
                first = min(begin for _, begin, _, _ in answers)  # the clock is that of all processes
                spans = tuple(
                    tuple((begin - first + a, begin - first + b) for a, b in own) for _, begin, own, _ in answers
                )
                times = {key: seconds for *_, own in answers for key, seconds in own.items()}
                found[answers[0][0]].append(Found(Timeline(spans), times))
        finally:
            for process in processes:
                process.kill()
                process.join()
    return {name: runs[1:] for name, runs in found.items()}


def _answer(pipe: Any, rank: int, limit: float) -> Any:
    try:
        if pipe.poll(limit):
            return pipe.recv()
    except EOFError:
        raise UserError(f"rank {rank} ended early; its own output, above, says why") from None
    raise UserError(f"rank {rank} gave no answer within {limit:g} s; raise --turn-limit")


def compared(found: dict[str, list[Found]], micro_batches: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Ratios, and figures by schedule."""
    lengths = {name: [run.timeline.length for run in runs] for name, runs in found.items()}
    ratios = {f"dualpipev/{NAMES[name]}": _ratio(lengths[name], lengths["dualpipev"]) for name in ("1f1b", "zb1p")}
    figures: dict[str, Any] = {}
    for name, runs in found.items():
        simulated = [run.simulated(name, micro_batches) for run in runs]
        figures[name] = {
            "seconds": statistics.median(lengths[name]),
            "rounds": lengths[name],
            "bubble": statistics.median(run.timeline.bubble_share for run in runs),
            "bubble_simulated": statistics.median(timeline.bubble_share for timeline in simulated),
            "action_seconds": {f"{kind}{stage}": seconds for (kind, stage), seconds in sorted(runs[-1].times.items())},
        }
    measured, expected = (sum(each[key] for each in figures.values()) for key in ("bubble", "bubble_simulated"))
    return ratios | {"bubble-measured/simulated": measured / expected}, figures


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def main() -> None:
    args = arguments(__doc__, mode="auto")
    cores = os.cpu_count() or 1
    if args.mode not in ("auto", "sleep", "compute"):
        raise UserError(f"--mode {args.mode}: choose auto, sleep or compute")
    asleep = args.mode == "sleep" or (args.mode == "auto" and cores < RANKS)
    sizes = QUICK if args.quick else Sizes()
    ratios, figures = compared(measure(sizes, asleep, args.turn_limit), sizes.micro_batches)
    figures |= {"mode": "sleep" if asleep else "compute", "cores": cores, "processes": RANKS, "sizes": asdict(sizes)}
    if asleep:
        without = replace(sizes, travel=0.0)
        plain, more = compared(measure(without, asleep, args.turn_limit), sizes.micro_batches)
        figures["without_travel"] = more | {"ratios": plain}
    columns = ["schedule", "seconds", "bubble %", "simulated %"]
    rows = [
        [name, figures[name]["seconds"], 100 * figures[name]["bubble"], 100 * figures[name]["bubble_simulated"]]
        for name in SCHEDULES
    ]
    what = "sleeping in place of computing" if asleep else "computing"
    if not asleep and cores < RANKS:
        what += f" on {cores} cores, which shows no bubbles"
    title = f"{sizes.layers} layers, {sizes.micro_batches} micro-batches on {RANKS} ranks, {what}"
    report("pipeline", args, ratios, figures, [(title, columns, rows)], ["torch"])


if __name__ == "__main__":
    program(main)
