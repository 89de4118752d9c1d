"""A plan as tables for a terminal."""

from collections.abc import Callable

from rich import box
from rich.console import RenderableType
from rich.table import Table

from rorqual.plan.calibrations import HERE
from rorqual.plan.cost import cache_bytes_per_token, mtp_parameters, parameters
from rorqual.plan.pipeline_plan import PipelinePlan
from rorqual.plan.quantity import quantity
from rorqual.plan.stage import DAY, HOUR, Estimate, StagePlan
from rorqual.plan.training_plan import said

PARTS = {
    "products": "products with weights",
    "attention": "attention",
    "memory": "memory traffic",
    "tensor": "tensor- or context-parallel sums",
    "launches": "launching kernels, longer than they compute",
    "travel": "tokens on their way to experts",
    "bubble": "bubble of the pipeline",
    "sums": "sums over ranks",
    "update": "update of the weights",
    "rollout": "rollouts",
    "tail": "rollouts, with less than half of the answers open",
    "log_probabilities": "log-probabilities, old and of the reference",
    "weights": "weights to the engine, and switching",
    "sampling": "the teacher's answers",
    "kept": "activations, kept for the backward pass",
    "logits": "logits and their loss",
    "parameters": "update of the weights",
    "layers": "launches of layers",
    "experts": "launches of experts",
}


def tables(plan: StagePlan) -> list[RenderableType]:
    found: list[RenderableType] = [_summary(plan), _time(plan), _memory(plan)]
    if plan.kind == "serve":
        found.insert(1, _service(plan))
    elif plan.layout is not None and plan.rejected:
        found.append(_layouts(plan))
    return [*found, "\n".join(f"· {sentence}" for sentence in plan.assumptions)]


def pipeline_tables(plan: PipelinePlan) -> list[RenderableType]:
    chips = list(dict.fromkeys(stage.chip.name for stage in plan.stages))
    table = _grid("stage", "chips", "tokens", "time", "chip hours", "cost")
    for number, stage in enumerate(plan.stages, 1):
        service = stage.kind == "serve"
        count = f"{stage.chips:,}" if len(chips) == 1 else f"{stage.chips:,} × {stage.chip.name}"
        table.add_row(
            stage.name or f"stage {number}, {stage.kind}", count, quantity(stage.tokens) + " a day" * service,
            "a day" if service else time_said(stage.seconds, False), quantity(stage.chip_hours.value),
            _dollars(stage.cost),
        )  # fmt: skip
    table.add_section()
    name = "in all" if len(plan.trained) == len(plan.stages) else "before serving"
    table.add_row(
        name, "", "", time_said(plan.seconds, False), quantity(plan.chip_hours.value), _dollars(plan.cost)
    )  # fmt: skip
    low, high = quantity(plan.chip_hours.low), quantity(plan.chip_hours.high)
    ends = f"80 %: {low} to {high} chip hours"
    if plan.cost is not None:
        ends += f", ${quantity(plan.cost.low)} to ${quantity(plan.cost.high)}"
    # What several stages assume is said once.
    said_by: dict[str, list[str]] = {}
    for stage in plan.stages:
        for sentence in stage.assumptions:
            said_by.setdefault(sentence, []).append(stage.name or stage.kind)
    every = [f"· {sentence}" if len(names) > 2 else f"· {', '.join(names)}: {sentence}"
             for sentence, names in said_by.items()]  # fmt: skip
    return [f"{plan.name}, on {', '.join(chips)}", table, ends, "", "\n".join(every)]


def _dollars(cost: Estimate | None) -> str:
    return "no price" if cost is None else f"${quantity(cost.value)}"


def _summary(plan: StagePlan) -> Table:
    total, active = parameters(plan.config)
    more = mtp_parameters(plan.config)
    grid = _grid("", "")
    grid.add_row("parameters", f"{quantity(total)}, {quantity(active)} active" +
                 (f", and {quantity(more)} for multi-token prediction" if more else ""))  # fmt: skip
    grid.add_row("chips", f"{plan.chips} × {plan.chip.name}" if plan.chip.family != HERE else plan.chip.name)
    if plan.kind == "serve":
        grid.add_row("output", f"{quantity(plan.tokens)} tokens a day")
    else:
        what = "answers, in tokens" if plan.kind in ("rl", "eval") else "tokens"
        each = plan.flops_per_token
        grid.add_row(what, quantity(plan.tokens) + (f", {quantity(each, 'FLOP')} each in training, "
                     f"{quantity(plan.tokens * each, 'FLOP')} in all" if each else ""))  # fmt: skip
        grid.add_row("time", f"{time_said(plan.seconds)}, {_range(plan.chip_hours, quantity)} chip hours")
    if plan.kind == "serve" and plan.cost is not None:
        grid.add_row("cost", f"{_range(plan.cost, money)} a day at ${plan.price:g} an hour of a chip")
    elif plan.cost is not None:
        grid.add_row("cost", f"{_range(plan.cost, money)} at ${plan.price:g} an hour of a chip")
    else:
        grid.add_row("cost", "give the price of an hour of a chip with --price")
    if plan.energy_kwh is not None:
        grid.add_row("energy", f"{quantity(1000 * plan.energy_kwh, 'Wh')}{' a day' * (plan.kind == 'serve')}, "
                     f"with chips at their {plan.chip.watts:g} W")  # fmt: skip
    grid.add_row("KV cache", f"{cache_bytes_per_token(plan.config):,} bytes a token of context in 16 bits")
    return grid


def _service(plan: StagePlan) -> Table:
    found = plan.figures
    table = _grid("", "prefill", "decode")
    into, out = found["prefill"], found["decode"]
    table.add_row("chips that it keeps busy", f"{into['chips']:.3g}", f"{out['chips']:.3g}")
    table.add_row("tokens/s of a chip", *(f"{x['tokens_per_second_chip']:,.0f}" for x in (into, out)))
    if plan.price is not None:
        dollars = (found["usd_per_million_input_tokens"], found["usd_per_million_output_tokens"])
        table.add_row("$ a million tokens", *(f"{x:.3g}" for x in dollars))
    table.add_row("users at a time", "", f"{found['users']:,.0f}, {found['tokens_per_second_user']:.3g} tokens/s each")
    table.add_row("an instance", "", f"{found['chips_of_an_instance']} chips, {out['batch']:.4g} sequences")
    if "margin" in found:
        table.add_row("income a day", "", f"{money(found['income_usd_a_day'])}, margin {found['margin']:.0%}")
    return table


def _time(plan: StagePlan) -> Table:
    table = _grid("time goes to", "share")
    whole = sum(plan.parts.values())
    for part, seconds in plan.parts.items():
        if seconds > 5e-4 * whole:
            table.add_row(PARTS.get(part, part), f"{seconds / whole:.1%} {'█' * round(30 * seconds / whole)}")
    return table


def _memory(plan: StagePlan) -> Table:
    table = _grid("memory of a chip", "bytes")
    for use, size in plan.memory.items():
        if size:
            table.add_row(use, f"{quantity(size, 'B')} {'█' * round(30 * size / plan.chip.memory)}")
    table.add_row("in all", f"{quantity(sum(plan.memory.values()), 'B')} of {quantity(plan.chip.memory, 'B')}")
    return table


def _layouts(plan: StagePlan) -> Table:
    assert plan.layout is not None
    table = _grid("layout", "a step", "why slower")
    table.add_row(said(plan.layout), f"{plan.figures['seconds_a_step']:.3g} s", "the fastest")
    for other in plan.rejected:
        table.add_row(said(other.layout), f"{other.seconds:.3g} s", other.why)
    return table


def _grid(*columns: str) -> Table:
    return Table(*columns, box=box.SIMPLE if any(columns) else None, show_header=any(columns), pad_edge=False)


def money(dollars: float) -> str:
    return f"${dollars:,.0f}" if dollars >= 100 else f"${dollars:.2f}"


def time_said(seconds: Estimate, interval: bool = True) -> str:
    """Such as "55 (48 to 63) days"; 80 % of runs should lie within."""
    for unit, size in (("days", DAY), ("hours", HOUR), ("minutes", 60.0), ("seconds", 1.0)):
        if seconds.value >= 2 * size or unit == "seconds":
            found = seconds.times(1 / size)
            return f"{_range(found, lambda x: f'{x:.3g}') if interval else f'{found.value:.3g}'} {unit}"
    raise AssertionError


def _range(value: Estimate, show: Callable[[float], str]) -> str:
    return f"{show(value.value)} ({show(value.low)} to {show(value.high)})"
