"""reasoning-gym's graph_color in few words: every vertex with those of its neighbors that come before it."""

from typing import Any


def before(puzzle: dict[str, Any]) -> dict[int, list[int]]:
    """Of every vertex, its neighbors with a smaller number."""
    return {v: sorted(min(edge) for edge in puzzle["edges"] if max(edge) == v) for v in puzzle["vertices"]}


def neighbors(puzzle: dict[str, Any]) -> str:
    """The whole graph: 0,1(0),2(0,1),3(1)."""
    return ",".join(f"{v}({','.join(map(str, of))})" if of else str(v) for v, of in before(puzzle).items())
