"""The HTML that all pages share: a frame without scripts, sections, tiles and tables. Text is escaped here."""

from collections.abc import Iterable, Sequence
from html import escape

from rorqual.report.style import STYLE

Cell = str | tuple[str, str]  # of a table; the second text is shown in grey brackets


def document(title: str, body: str, more_style: str = "") -> str:
    """A whole page; `body` is HTML."""
    return (
        f'<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">\n'
        f'<meta name=color-scheme content="light dark"><title>{escape(title)} · Rorqual</title>\n'
        f"<style>{STYLE}{more_style}</style>\n<main>{body}</main></html>\n"
    )


def section(title: str, content: str) -> str:
    """Nothing without content, which is HTML."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n" if content else ""


def tiles(found: Iterable[tuple[str, str]]) -> str:
    """Headline numbers: (value, what it is)."""
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in found)
    return f"<div class=tiles>{cells}</div>" if cells else ""


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{_row(header, row)}</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _row(header: Sequence[str], row: Sequence[Cell]) -> str:
    """Cells that know their column, for pages that show them below each other on a phone."""
    pairs = zip(header, row, strict=True)
    return "".join(f'<td data-label="{escape(column)}">{_cell(cell)}</td>' for column, cell in pairs)


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return escape(cell)
    return f"{escape(cell[0])} <small>({escape(cell[1])})</small>"
