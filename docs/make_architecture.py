"""Draws figures/architecture.svg: python docs/make_architecture.py"""

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

PICTURE = Path(__file__).parent / "figures" / "architecture.svg"
FONTS = "'DejaVu Sans', Verdana, Arial, sans-serif"  # of the first, where a browser has it
COLORS = {"data": "#dbe9f6", "model": "#fde7c8", "train": "#dff0d8", "engine": "#e8def2", "serve": "#f8dcdc"}
WIDTH, HEIGHT, GAP = 16.6, 11.0, 3.6  # of a box in a row, and between two; the picture is 120 wide
SMALL: dict[str, Any] = {"fontsize": 8.2, "color": "#333", "va": "center"}
# Title, lines below it, color.
TRAINING = [
    ("Documents", ["data/corpus.py", "data/heldout.py"], "data"),
    ("Tokens", ["tokenizer.py", "token_shards.py"], "data"),
    ("Packed rows", ["data/packing.py", "Loader → Batch"], "data"),
    ("Forward", ["Transformer", "[B, T] → [B, T, D]"], "model"),
    ("Loss", ["kernels/", "cross_entropy.py"], "train"),
    ("Update", ["Trainer, Optimizer", "balance.py"], "train"),
]
SERVING = [
    ("HTTP request", ["AuthMiddleware", "build_app"], "serve"),
    ("Prompt", ["ModelService", "chat template"], "serve"),
    ("Queue", ["EngineThread", "open, 429 if full"], "serve"),
    ("Schedule", ["Scheduler", "BlockManager"], "engine"),
    ("Forward", ["ModelRunner", "PagedKVCache"], "engine"),
    ("Sample, text", ["SamplingStep", "detokenizer.py"], "engine"),
]
NETWORK = (
    "One network, one model directory",
    [
        "model/: embedding · MLA or GQA · SwiGLU or mixture of experts · multi-token modules · head",
        "kernels/: PyTorch reference, compiled CPU kernels · precision/: int8, int4",
    ],
    "model",
)


def box(ax: Axes, x: float, y: float, width: float, height: float, content: tuple[str, list[str], str]) -> None:
    title, lines, color = content
    style = "round,pad=0,rounding_size=0.9"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=COLORS[color], ec="#444", lw=1))
    middle, top = x + width / 2, y + height
    ax.text(middle, top - 2.6, title, ha="center", va="center", fontsize=10.5, fontweight="bold", color="#111")
    for i, line in enumerate(lines):
        ax.text(middle, top - 5.6 - 2.5 * i, line, ha="center", **SMALL)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    look = {"arrowstyle": "-|>", "lw": 1.4, "color": "#333", "shrinkA": 0, "shrinkB": 0} | style
    ax.annotate("", xy=end, xytext=start, arrowprops=look)


def row(ax: Axes, y: float, heading: str, boxes: list[tuple[str, list[str], str]]) -> list[float]:
    """Boxes joined by arrows from left to right; their middles."""
    ax.text(1, y + HEIGHT + 3.1, heading, fontsize=12, fontweight="bold", va="center")
    starts = [1 + i * (WIDTH + GAP) for i in range(len(boxes))]
    for i, (x, content) in enumerate(zip(starts, boxes, strict=True)):
        box(ax, x, y, WIDTH, HEIGHT, content)
        if i:
            arrow(ax, (x - GAP, y + HEIGHT / 2), (x, y + HEIGHT / 2))
    return [x + WIDTH / 2 for x in starts]


def draw() -> str:
    """The picture as SVG, with its text as text."""
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rorqual", "font.family": "DejaVu Sans"}):
        fig, ax = plt.subplots(figsize=(12, 5.6))
        ax.set_xlim(0, 120)
        ax.set_ylim(0, 56)
        ax.axis("off")
        middles = row(ax, 40, "Training: text → loss", TRAINING)
        box(ax, 20, 23.5, 80, 9.5, NETWORK)
        arrow(ax, (middles[3], 40), (middles[3], 33))
        arrow(ax, (middles[5], 40), (99.2, 33))
        ax.text(107.2, 36.2, "weights", ha="left", **SMALL)
        row(ax, 6, "Serving: request → answer", SERVING)
        arrow(ax, (middles[4], 23.5), (middles[4], 17))
        arrow(ax, (middles[5], 6), (middles[3], 6), connectionstyle="bar,fraction=-0.055")
        ax.text(88.9, 4.9, "next token, until stop or length", ha="center", **{**SMALL, "fontsize": 7.6})
        grey = {"color": "#999", "lw": 1.1, "ls": "--"}
        arrow(ax, (108, 6), (middles[0], 6), connectionstyle="bar,fraction=-0.0465", **grey)
        label = "TokenDelta → responses.py → JSON or server-sent events"
        ax.text(40, 1.0, label, ha="center", bbox={"fc": "white", "ec": "none", "pad": 1.5}, **SMALL)
        svg = io.StringIO()
        fig.savefig(svg, bbox_inches="tight", pad_inches=0.08, metadata={"Date": None}, facecolor="white")
        plt.close(fig)
    return svg.getvalue().replace("'DejaVu Sans'", FONTS)


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
