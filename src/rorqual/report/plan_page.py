"""The page of a plan: one HTML file without scripts, of one stage or of a pipeline's stages."""

from collections.abc import Sequence
from html import escape

from rorqual.plan.cost import cache_bytes_per_token, mtp_parameters, parameters
from rorqual.plan.pipeline_plan import added
from rorqual.plan.plan_text import PARTS
from rorqual.plan.quantity import quantity
from rorqual.plan.stage import DAY, HOUR, Estimate, StagePlan
from rorqual.plan.training_plan import said
from rorqual.report.formatting import count, percent
from rorqual.report.markup import Cell, document, section, table, tiles
from rorqual.report.plan_bars import Row, Segment, stacked, with_intervals
from rorqual.report.plan_style import MEMORY_COLOURS, PART_COLOURS, PLAN_STYLE
from rorqual.report.run_record import TITLES
from rorqual.report.schedule_picture import schedule_picture

KINDS = TITLES | {"distill": "Distillation", "eval": "Evaluation", "serve": "Service"}
LEAST = 5e-4  # of the whole, from which on a part is shown


def plan_page(title: str, stages: Sequence[StagePlan]) -> str:
    """The page as HTML; it needs no other file, and all text is escaped.

    Stages of the kind serve are shown as a day of service, apart from the sums of the others.
    """
    lead = "Predicted before the start. Four of five runs should end within the brackets and whiskers."
    top = f"<h1>{escape(title)}</h1><p class=lead>{lead}</p>{_headline(stages)}{_overview(stages)}"
    body = f"<header>{top}</header>\n{_money(stages)}{''.join(map(_stage, stages))}"
    return document(title, body, PLAN_STYLE)


def _split(stages: Sequence[StagePlan]) -> tuple[list[StagePlan], list[StagePlan]]:
    """Stages with an end, and services."""
    return [s for s in stages if s.kind != "serve"], [s for s in stages if s.kind == "serve"]


def _headline(stages: Sequence[StagePlan]) -> str:
    ending, services = _split(stages)
    found: list[tuple[str, str]] = []
    if ending:
        seconds = added([s.seconds for s in ending])
        found += [_tile("time", _time(seconds)), _tile("chip hours", _counted(added([s.chip_hours for s in ending])))]
        priced = [s.cost for s in ending if s.cost is not None]
        if priced:
            some = "" if len(priced) == len(ending) else f"cost of {len(priced)} of {len(ending)} stages"
            found.append(_tile(some or "cost", _dollars(added(priced))))
        else:
            found.append(("no price", "cost: give that of an hour of a chip with --price"))
    for plan in services:
        of = f" of {plan.name}" if len(stages) > 1 else ""
        day = plan.cost and _dollars(plan.cost)
        found.append((f"{plan.chips} chips", f"serve {count(plan.figures['users'])} users at a time{of}"))
        found.append(_tile(f"cost of a day{of}", day) if day else _tile(f"chip hours a day{of}", (_hours(plan), "")))
    return tiles(found)


def _tile(what: str, value: tuple[str, str]) -> tuple[str, str]:
    return value[0], f"{what} ({value[1]})" if value[1] else what


def _overview(stages: Sequence[StagePlan]) -> str:
    """One row a stage, and their sum."""
    ending, services = _split(stages)
    rows = [_row(plan) for plan in ending]
    note = ""
    if len(ending) > 1:
        costs = [plan.cost for plan in ending if plan.cost is not None]
        cost = _dollars(added(costs)) if costs else "–"
        hours = added([plan.chip_hours for plan in ending])
        rows.append(["in all", "", "", "", "", _time(added([s.seconds for s in ending])), _counted(hours), cost])
        note = "Stages follow one another. Ends of their intervals are added, since they share errors of calibration."
        if 0 < len(costs) < len(ending):
            note += " The sum of the cost leaves out stages without a price."
    rows += [_row(plan) for plan in services]
    if services and ending:
        note += " A service is shown for a day, and is in no sum."
    head = ["stage", "kind", "parameters", "chips", "tokens", "time", "chip hours", "cost"]
    below = f"<p class=note>{note.strip()}</p>" if note else ""
    return f"<h3>Stages</h3><div class=overview>{table(head, rows)}</div>{below}"


def _row(plan: StagePlan) -> list[Cell]:
    whole, active = parameters(plan.config)
    size: Cell = (count(whole), f"{count(active)} active") if active < whole else count(whole)
    service = plan.kind == "serve"
    return [
        plan.name or plan.kind,
        _kind(plan),
        size,
        (f"{plan.chips:,}", plan.chip.name),
        count(plan.tokens),
        "a day" if service else _time(plan.seconds),
        _hours(plan) if service else _counted(plan.chip_hours),
        _dollars(plan.cost) if plan.cost else "–",
    ]


def _money(stages: Sequence[StagePlan]) -> str:
    ending, services = _split(stages)
    groups = [
        ("", [_bar(s, s.cost, _dollars(s.cost)) for s in ending if s.cost]),
        ("Chip hours of stages without a price",
         [_bar(s, s.chip_hours, _counted(s.chip_hours)) for s in ending if not s.cost]),
        ("A day of service", [_bar(s, s.cost, _dollars(s.cost)) for s in services if s.cost]),
        ("Chip hours of a day of service, without a price",
         [_bar(s, s.chip_hours, _counted(s.chip_hours)) for s in services if not s.cost]),
    ]  # fmt: skip
    drawn = "".join(f"{f'<h3>{title}</h3>' if title else ''}{with_intervals(rows)}" for title, rows in groups if rows)
    prices = dict.fromkeys(_price(plan) for plan in stages if plan.price is not None)
    notes = "".join(f"<p class=note>{escape(price)}</p>" for price in prices)
    return section("Cost by stage", drawn + notes)


def _bar(plan: StagePlan, value: Estimate, words: tuple[str, str]) -> Row:
    return Row(plan.name or plan.kind, value, *words)


def _price(plan: StagePlan) -> str:
    source = plan.chip.price_source if plan.price == plan.chip.price else ""
    return f"{plan.chip.name}: ${plan.price:g} an hour of a chip{f' ({source})' if source else ''}."


def _stage(plan: StagePlan) -> str:
    name = f"{plan.name}: {_kind(plan).lower()}" if plan.name else _kind(plan)
    parts = [
        _facts(plan),
        _service(plan) if plan.kind == "serve" else "",
        f"<h3>Where the time {'of the chips ' if plan.kind == 'serve' else ''}goes</h3>{_parts(plan)}",
        _memory(plan),
        _layouts(plan),
        schedule_picture(plan),
        "<h3>Assumptions</h3><ul>" + "".join(f"<li>{escape(a)}</li>" for a in plan.assumptions) + "</ul>"
        if plan.assumptions
        else "",
    ]
    return section(name, "".join(parts))


def _facts(plan: StagePlan) -> str:
    whole, active = parameters(plan.config)
    more = mtp_parameters(plan.config)
    found = {
        "chips": f"{plan.chips:,} × {plan.chip.name}",
        "parameters": f"{count(whole)}, {count(active)} active"
        + (f", {count(more)} for multi-token prediction" if more else ""),
        "tokens a day" if plan.kind == "serve" else "tokens of answers" if plan.kind in ("rl", "eval") else "tokens":
        count(plan.tokens),
    }  # fmt: skip
    if plan.flops_per_token:
        found["compute"] = (
            f"{quantity(plan.flops_per_token, 'FLOP')} a token, {plan.tokens * plan.flops_per_token:.3g} FLOP in all"
        )
    steps, each = plan.figures.get("steps"), plan.figures.get("seconds_a_step")
    if steps:
        found["steps"] = f"{steps:,.0f}"
        if isinstance(each, dict):
            found["steps"] += ", " + ", ".join(f"{_seconds(seconds)} at the {when}" for when, seconds in each.items())
        elif each:
            found["steps"] += f" of {_seconds(each)}"
    if rate := plan.figures.get("tokens_per_second"):
        found["speed"] = f"{count(rate)} tokens/s, {count(rate / plan.chips)} a chip"
    found["KV cache"] = f"{cache_bytes_per_token(plan.config):,} bytes a token of context in 16 bits"
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in found.items())
    return f"<dl class=facts>{cells}</dl>"


def _parts(plan: StagePlan) -> str:
    whole = sum(plan.parts.values())
    segments = [
        Segment(
            PARTS.get(part, part), seconds, PART_COLOURS.get(part, "c7"), percent(seconds / whole),
            "" if plan.kind == "serve" else _seconds(seconds),
        )
        for part, seconds in plan.parts.items() if seconds > LEAST * whole
    ]  # fmt: skip
    return stacked(segments, sum(s.value for s in segments), "Time")


def _memory(plan: StagePlan) -> str:
    capacity, used = plan.chip.memory, sum(plan.memory.values())
    segments = [
        Segment(use, size, MEMORY_COLOURS.get(use, "c7"), quantity(size, "B"), percent(size / capacity))
        for use, size in plan.memory.items() if size > 0
    ]  # fmt: skip
    words = f"{quantity(used, 'B')} of {quantity(capacity, 'B')}"
    if used > capacity:
        words = f"<b class=wrong>{words}: {quantity(used - capacity, 'B')} more than there is</b> (framed)"
    return f"<h3>Memory of a chip</h3><p class=note>{words}</p>{stacked(segments, capacity, 'Memory')}"


def _layouts(plan: StagePlan) -> str:
    if plan.layout is None:
        return ""
    if not plan.rejected:
        return f"<h3>Layout</h3><p>{escape(said(plan.layout))}</p>"
    best = f"{plan.figures['seconds_a_step']:.3g} s"
    rows: list[Sequence[Cell]] = [[said(plan.layout), best, "the fastest"]]
    rows += [[said(other.layout), f"{other.seconds:.3g} s", other.why] for other in plan.rejected]
    return f"<h3>Layout</h3><div class=wrapped>{table(['layout', 'a step', 'why slower'], rows)}</div>"


def _service(plan: StagePlan) -> str:
    found = plan.figures
    into, out = found["prefill"], found["decode"]
    rows: list[Sequence[Cell]] = [
        ["chips that it keeps busy", f"{into['chips']:.3g}", f"{out['chips']:.3g}"],
        ["tokens/s of a chip", *(f"{x['tokens_per_second_chip']:,.0f}" for x in (into, out))],
    ]
    if plan.price is not None:
        dollars = (found["usd_per_million_input_tokens"], found["usd_per_million_output_tokens"])
        rows.append(["$ a million tokens", *(f"{x:.3g}" for x in dollars)])
    rows.append(["users at a time", "", f"{found['users']:,.0f}, {found['tokens_per_second_user']:.3g} tokens/s each"])
    rows.append(["an instance", "", f"{found['chips_of_an_instance']} chips, {out['batch']:.4g} sequences"])
    if "margin" in found:
        rows.append(["income a day", "", f"${count(found['income_usd_a_day'])}, margin {found['margin']:.0%}"])
    return f"<h3>Speed and price</h3>{table(['', 'prefill', 'decode'], rows)}"


def _kind(plan: StagePlan) -> str:
    return KINDS.get(plan.kind, plan.kind.capitalize())


def _time(seconds: Estimate) -> tuple[str, str]:
    """Such as ("55.1 days", "48.5 to 62.6")."""
    unit, size = _unit(seconds.value)
    value, low, high = (_figure(x / size) for x in (seconds.value, seconds.low, seconds.high))
    return f"{value} {unit}", f"{low} to {high}"


def _unit(seconds: float) -> tuple[str, float]:
    """The unit to say a time in, and its seconds."""
    units = ("days", DAY), ("hours", HOUR), ("minutes", 60.0)
    return next((found for found in units if seconds >= 2 * found[1]), ("seconds", 1.0))


def _seconds(seconds: float) -> str:
    unit, size = _unit(seconds)
    return f"{_figure(seconds / size)} {unit}"


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _counted(value: Estimate) -> tuple[str, str]:
    return count(value.value), f"{count(value.low)} to {count(value.high)}"


def _dollars(value: Estimate) -> tuple[str, str]:
    return f"${count(value.value)}", f"${count(value.low)} to ${count(value.high)}"


def _hours(plan: StagePlan) -> str:
    return count(plan.chip_hours.value)
