"""math-verify as a second judge: it finds the answer in a reply, and compares it, by itself."""

from collections.abc import Sequence

from rorqual.extras import require
from rorqual.rl.envs.environment import Problem
from rorqual.sandbox.checker import shared_checker

TIMEOUT = 10.0  # seconds a reply; longer counts as wrong


def by_math_verify(problems: Sequence[Problem], texts: Sequence[str]) -> list[bool]:
    """Its verdict of each completion. Raises MissingExtra where it is not installed."""
    require("eval", "math_verify")
    verdicts: list[bool] = []
    for problem, text in zip(problems, texts, strict=True):
        said = text.rpartition("</think>")[2] if "</think>" in text else "" if "<think>" in text else text
        request = {"task": "reply", "gold": problem.answer, "reply": said}
        verdicts.append(bool(shared_checker().call(request, TIMEOUT)))
    return verdicts
