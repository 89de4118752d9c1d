"""rorqual ledger."""

from pathlib import Path
from typing import Annotated

import typer

from rorqual import strict_json
from rorqual.cli.options import AsJson, expand_path, within


def ledger(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="the folder of a run, or of several")],
    price: Annotated[
        float | None, typer.Option(callback=within(0, 10**6), help="$ an hour of this machine, to sum up money")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List and sum up what runs took, with the error of each prediction and the share within their intervals."""
    from dataclasses import asdict

    from rorqual.plan.ledger import read_accounts

    accounts = read_accounts(expand_path(runs))
    scored = [a.inside for a in accounts if a.inside is not None]
    outer = [a for a in accounts if not a.counted]
    total: dict[str, float] = {name: sum(getattr(a, name) for a in outer) for name in ("tokens", "flops", "seconds")}
    if known := [a.joules for a in outer if a.joules is not None]:
        total["joules"] = sum(known)
    if price is not None:
        total["cost_usd"] = total["seconds"] / 3600 * price
    if as_json:
        rows = [asdict(a) | {"error": a.error, "inside": a.inside} for a in accounts]
        share = sum(scored) / len(scored) if scored else None
        print(strict_json.dumps({"runs": rows, "total": total, "within_interval": share}))
        return
    from rich.table import Table

    from rorqual.console import output
    from rorqual.plan.quantity import quantity

    table = Table("run", "stages", "tokens", "FLOP", "time", "of peak", "predicted", "error", "within", box=None)
    for a in accounts:
        said = "–" if a.predicted is None else f"{quantity(a.predicted)} {a.unit}"
        error = "–" if a.error is None else f"{a.error:+.0%}"
        within_it = {None: "–", True: "yes", False: "no"}[a.inside]
        table.add_row(
            a.run, ", ".join(a.kinds), quantity(a.tokens), quantity(a.flops), _time(a.seconds), f"{a.utilisation:.0%}",
            said, error, within_it,
        )  # fmt: skip
    table.add_row("in all", "", quantity(total["tokens"]), quantity(total["flops"]), _time(total["seconds"]))
    console = output()
    console.print(table)
    if scored:
        console.print(f"{sum(scored)} of {len(scored)} predictions held: the run lay within their 80 % interval.")
    if known:
        console.print(f"{total['joules'] / 3.6e6:.3g} kWh of the processors in {len(known)} of {len(outer)} runs.")
    if price is not None:
        console.print(f"${total['cost_usd']:.2f} at ${price:g} an hour.")


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}"
