"""The report page: one HTML file without scripts."""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from rorqual.report.formatting import count, duration, flops, opening, percent, with_interval
from rorqual.report.markup import Cell, document, section, table, tiles
from rorqual.report.plots import Picture
from rorqual.report.run_record import Part, Run, is_number, stage_name


def render(run: Run, pictures: Sequence[Picture]) -> str:
    """The page as HTML; all text from the run is escaped."""
    name = escape(run.path.resolve().name)
    body = [
        f"<header><h1>{name}</h1><p class=lead>{escape(opening(run))}</p>",
        f"{_warnings(run)}{_tiles(run)}{_chat(run)}</header>",
        section("Results", _stage_tables(run) + _figures(pictures, None)),
        section("Samples before and after", _samples(run)),
        *(
            section(part.title, _figures(pictures, part.name) + _logged_sample(part) + _notes(part))
            for part in run.parts
        ),
        section("Cost", _ledger(run)),
        section("Reproduction", _recipes(run)),
    ]
    return document(run.path.resolve().name, "".join(body))


def _tiles(run: Run) -> str:
    """The headline numbers."""
    model, found = run.summary.get("model") or {}, []
    if is_number(seconds := run.summary.get("total_seconds")):
        found.append((duration(seconds), "total time"))
    if is_number(total := model.get("total", model.get("parameters_total"))):
        active = model.get("active", model.get("parameters_active"))
        found.append((count(total), f"parameters, {count(active)} active per token" if active else "parameters"))
    if tokens := sum(s["tokens"] for s in run.stages if is_number(s.get("tokens"))):
        found.append((count(tokens), "tokens in all stages"))
    for family in run.families[:2]:
        results = run.released(family)
        first, last = results[0]["pass_at_1"], results[-1]["pass_at_1"]
        since = f", from {percent(first)}" if len(results) > 1 else ""
        found.append((percent(last), f"pass@1 on {family}{since}"))
    return tiles(found)


def _warnings(run: Run) -> str:
    """The notes of the summary, above all figures."""
    return "".join(f"<p><b>Note:</b> {escape(str(note))}</p>" for note in run.summary.get("notes") or [])


def _chat(run: Run) -> str:
    command = run.summary.get("chat_command")
    return f"<p>Talk to it: <code class=command>{escape(str(command))}</code></p>" if command else ""


def _stage_tables(run: Run) -> str:
    tables = []
    for family in run.families:
        results = run.results(family)
        rows = [
            [
                name,
                with_interval(result, "pass_at_1", "interval"),
                with_interval(result, "cons_at_k", "cons_interval"),
                percent(result.get("pass_at_k")),
                percent(result.get("verified_share")),
                percent(result.get("verdict_precision")),
            ]
            for name, result in results
        ]
        last = results[-1][1]
        k = last.get("k", "k")
        header = ["stage", "pass@1", f"cons@{k}", f"pass@{k}", "self-verified", "verifier precision"]
        problems = f" on {last['problems']} held-out problems" if "problems" in last else ""
        tables.append(f"<h3>{escape(family)}{escape(problems)}</h3>{table(header, rows)}{_gains(run, family)}")
    if not tables:
        return ""
    legend = (
        "<p class=note>pass@1: fraction of single answers that are correct. cons@k: correct by majority vote of k "
        "answers. pass@k: problems with at least one correct answer among k. Self-verified: answers whose last "
        "candidate the model marked ✓; verifier precision: fraction of candidates marked ✓ that are correct. Brackets "
        "are 95 % bootstrap intervals over problems.</p>"
    )
    return "".join(tables) + legend


def _gains(run: Run, family: str) -> str:
    """Gain of each stage, paired by problem, from the summary's gains[stage][family] = {gain, interval}."""
    texts = []
    for stage, gains in (run.summary.get("gains") or {}).items():
        found = gains.get(family) or {}
        if is_number(found.get("gain")):
            low, high = found.get("interval") or (found["gain"], found["gain"])
            points = f"{100 * found['gain']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
            texts.append(f"{stage_name({'name': stage})} {points}")
    return f"<p>Gain in pass@1, paired by problem: {escape('; '.join(texts))}.</p>" if texts else ""


def _figures(pictures: Sequence[Picture], part: str | None) -> str:
    cells = "".join(
        f"<figure><picture><source media='(prefers-color-scheme: dark)' srcset='{_data(p.dark)}'>"
        f"<img src='{_data(p.light)}' alt='{escape(p.title)}' width=736 height=464></picture>"
        f"<figcaption><b>{escape(p.title)}.</b> {escape(p.caption)}</figcaption></figure>"
        for p in pictures
        if p.part == part
    )
    return f"<div class=figures>{cells}</div>" if cells else ""


def _data(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def _samples(run: Run) -> str:
    cells = []
    for sample in run.summary.get("samples") or []:
        texts = "".join(
            f"<div><h4>{title}</h4><pre>{_marked(str(sample[key]))}</pre></div>"
            for key, title in (("before", "Before"), ("after", "After"))
            if sample.get(key) is not None
        )
        question = f"<p class=question><span>{escape(str(sample.get('family', '')))}</span> "
        question += f"{escape(str(sample.get('question', '')))}</p>"
        cells.append(f"<article>{question}<div class=pair>{texts}</div></article>")
    return "".join(cells)


def _marked(text: str) -> str:
    """Escaped text, with self-verification marks coloured and tags in grey."""
    text = escape(text.strip())
    text = re.sub("✓", "<i class=right>✓</i>", text)
    text = re.sub("✗", "<i class=wrong>✗</i>", text)
    return re.sub(r"(&lt;/?(?:think|answer)&gt;)", r"<i class=tag>\1</i>", text)


def _logged_sample(part: Part) -> str:
    """The last sample text in the metrics."""
    found = [line for line in part.lines if isinstance(line.get("sample"), str)]
    if not found:
        return ""
    return f"<h3>An answer at step {found[-1]['step']}</h3><pre>{_marked(found[-1]['sample'])}</pre>"


def _notes(part: Part) -> str:
    if not part.notes:
        return ""
    shown = "".join(f"<li>{escape(note)}</li>" for note in part.notes[-20:])
    return f"<h3>Notes</h3><ul>{shown}</ul>"


def _ledger(run: Run) -> str:
    """Measured tokens, FLOPs, time and utilisation of each stage, beside the predicted ones."""
    rows, machine = [], {}
    ledgers = {"": run.ledgers[""]} if "" in run.ledgers else run.ledgers
    for part, ledger in ledgers.items():
        machine = ledger.get("machine") or machine
        stages, predicted = ledger.get("stages") or {}, ledger.get("predicted") or {}
        accounts = list(stages.items())
        if len(stages) > 1 and ledger.get("total"):
            accounts.append(("total", ledger["total"]))
        for name, account in accounts:
            forecast = predicted.get(name)
            if not isinstance(forecast, dict):  # predicted for the whole run
                forecast = predicted if name == "total" or len(stages) == 1 else {}
            rows.append([name if part in ("", name) else f"{part}: {name}", *_account(account, forecast)])
    if not rows:
        return ""
    caption = "<p class=note>In grey brackets: predicted by the planner. Utilisation: FLOP/s over the measured matmul "
    caption += "peak of this machine.</p>"
    facts = [str(machine[key]) for key in ("processor", "accelerator") if machine.get(key)]
    if cores := machine.get("threads") or machine.get("cores"):
        facts.append(f"{cores} cores in use")
    if is_number(peak := machine.get("matrix_peak_flops")):
        facts.append(f"measured peak {flops(peak)}/s")
    where = f"<p class=note>Machine: {escape(', '.join(facts))}.</p>" if facts else ""
    header = ["stage", "time", "tokens", "FLOPs", "utilisation"]
    return table(header, rows) + caption + where


def _account(account: dict[str, Any], forecast: dict[str, Any]) -> list[Cell]:
    cells: list[Cell] = []
    for key, shown in (("seconds", duration), ("tokens", count), ("flops", flops), ("utilisation", percent)):
        value, expected = account.get(key), forecast.get(key)
        text = shown(value) if is_number(value) else "–"
        cells.append((text, shown(expected)) if is_number(expected) else text)
    return cells


def _recipes(run: Run) -> str:
    texts = {"recipe.toml": run.recipe} if run.recipe else {}
    texts |= {f"{part.name}/recipe.toml": part.recipe for part in run.parts if part.name and part.recipe}
    seed = f"<p>Seed {escape(str(run.summary['seed']))}.</p>" if "seed" in run.summary else ""
    return seed + "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>" for name, text in texts.items()
    )
