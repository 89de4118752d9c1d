"""Compact text of reasoning-gym's graph_color: each vertex with its neighbors of smaller number."""

from typing import Any


def before(puzzle: dict[str, Any]) -> dict[int, list[int]]:
    """Vertex → its neighbors of smaller number."""
    return {v: sorted(min(edge) for edge in puzzle["edges"] if max(edge) == v) for v in puzzle["vertices"]}


def neighbors(puzzle: dict[str, Any]) -> str:
    """The graph as text: 0,1(0),2(0,1),3(1)."""
    return ",".join(f"{v}({','.join(map(str, of))})" if of else str(v) for v, of in before(puzzle).items())
