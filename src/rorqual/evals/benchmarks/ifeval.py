"""IFEval: instructions that a program can verify (arXiv 2311.07911)."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

from rorqual.errors import UserError
from rorqual.evals.benchmarks.benchmark import Benchmark, Parts, reply
from rorqual.evals.benchmarks.instructions import LANGUAGES, NEEDS, VERIFIERS
from rorqual.evals.benchmarks.sources import HubData, Row
from rorqual.extras import require
from rorqual.rl.envs.environment import Problem


class IFEval(Benchmark):
    """541 prompts, verbatim, with 25 kinds of instructions.

    pass@1 is prompt_level_strict: all instructions of a prompt are followed. Beside it the three other published
    metrics: a loose reading also takes the response without its first line, its last line and its asterisks, in every
    combination; at the level of instructions each counts by itself. A truncated response is verified too, as published.
    """

    name, hub = "ifeval", HubData("google/IFEval", split="train")
    judge = "all instructions, strictly"
    second_judge = "all instructions, loosely"

    def problem(self, where: str, row: Row, seed: int) -> Problem:
        prompt, kinds = self.text(where, row, "prompt"), self.field(where, row, "instruction_id_list")
        given = self.field(where, row, "kwargs")
        if not isinstance(kinds, list) or not isinstance(given, list) or len(kinds) != len(given) or not kinds:
            raise UserError(f"{where}: instruction_id_list and kwargs are no lists of one length; correct them")
        arguments: list[dict[str, Any]] = []
        for kind, some in zip(kinds, given, strict=True):
            if kind not in VERIFIERS:
                raise UserError(f"{where}: instruction {kind!r} is none of IFEval's 25; correct it")
            if kind in LANGUAGES:
                require("eval", "langdetect")
            arguments.append({k: v for k, v in dict(some or {}).items() if v is not None})
            if missing := [name for name in NEEDS.get(kind, ()) if name not in arguments[-1]]:
                raise UserError(f"{where}: kwargs of {kind} has no {missing[0]}; add it")
        return self.made(where, prompt, "", "", kinds=kinds, arguments=arguments)

    def answer(self, problem: Problem, prompt: str, text: str) -> str | None:
        """None: responses do not vote."""
        return None

    def score(self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]) -> list[bool]:
        return [all(followed(p, t, loose=False)) for p, t in zip(problems, texts, strict=True)]

    def second_score(
        self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]
    ) -> list[bool]:
        return [all(followed(p, t, loose=True)) for p, t in zip(problems, texts, strict=True)]

    def parts(self, problem: Problem, text: str) -> Parts:
        strict, loose = followed(problem, text, loose=False), followed(problem, text, loose=True)
        return {
            "inst_level_strict_acc": (sum(strict), len(strict)),
            "prompt_level_loose_acc": (int(all(loose)), 1),
            "inst_level_loose_acc": (sum(loose), len(loose)),
        }


def followed(problem: Problem, text: str, loose: bool) -> list[bool]:
    """Whether each instruction of a prompt is followed. An empty response follows none."""
    kinds = cast("list[str]", problem.metadata["kinds"])
    given = cast("list[Mapping[str, Any]]", problem.metadata["arguments"])
    readings = _readings(reply(text) or "", loose)
    return [
        any(VERIFIERS[kind](reading, some) for reading in readings) for kind, some in zip(kinds, given, strict=True)
    ]


@lru_cache(maxsize=64)
def _readings(response: str, loose: bool) -> tuple[str, ...]:
    """The texts of which one has to follow an instruction."""
    if not loose:
        return (response,) if response.strip() else ()
    lines = response.split("\n")
    cut = (response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])))
    return tuple(text for text in dict.fromkeys([*cut, *(text.replace("*", "") for text in cut)]) if text.strip())
