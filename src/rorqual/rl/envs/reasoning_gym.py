"""The datasets of reasoning-gym as environments."""

import functools
import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from importlib import import_module
from typing import Any, cast

from rorqual.errors import UserError
from rorqual.extras import require
from rorqual.judge.judge import number_in
from rorqual.judge.notation import normalise, unwrap
from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs import countdown, graph_coloring, knights_knaves
from rorqual.rl.envs.environment import Environment, Problem, PromptFormat, integers, number_key, text_key
from rorqual.sandbox.checker import shared_checker

BLOCK = 1000  # candidates per dataset object: some datasets allocate memory by size
PROBE = 16  # problems sampled to decide whether numbers identify a dataset's problems, and whether they can be made
DECIMAL = re.compile(r"-?\d+(?:\.\d+)?")
TIMEOUT = 5.0  # seconds for a checker that evaluates the answer as code
MAKE_TIMEOUT = 60.0  # seconds for the first PROBE problems; on a busy machine imports take some ten of them

# Datasets whose checkers pass the answer to sympy's parse_expr or to eval, and the functions allowed in an answer.
EXPRESSIONS = {"simple_integration", "intermediate_integration", "polynomial_multiplication", "puzzle24"}
LITERALS = {"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"}
FUNCTIONS = {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh",
             "exp", "log", "ln", "sqrt", "Abs", "pi"}  # fmt: skip


class ReasoningGymEnvironment(Environment):
    """The dataset `section.name`, created with `section.config`."""

    def __init__(self, section: EnvironmentSection) -> None:
        super().__init__(section.name, section.weight)
        self.config = dict(section.config)
        for name in ("seed", "size"):
            if name in self.config:
                raise UserError(f"environment {section.name}: config.{name} follows from the run's seed; remove it")
        _check_cost(section.name, self.config)
        self._checker = _dataset(section.name, self.config, 0, BLOCK)
        self._block: tuple[tuple[int, int], Any] | None = None
        self._prompt = None
        if section.prompt is not None:
            entry = next(filter(None, (self._entry(0, i) for i in range(100))), None)
            if entry is None:
                raise UserError(f"environment {section.name}: its config yields no problem; widen it")
            self._prompt = PromptFormat(section.prompt, _fields(section.name, entry), section.name)

    def candidate(self, seed: int, index: int) -> Problem | None:
        entry = self._entry(seed, index)
        if entry is None:
            return None
        fields = _fields(self.family, entry)
        if self._prompt and not self._prompt.names <= fields.keys():
            return None  # in some datasets the fields differ among problems
        return Problem(
            question=self._prompt(fields) if self._prompt else entry["question"],
            answer="" if entry["answer"] is None else str(entry["answer"]),
            key=_key(self.family, entry),
            difficulty=_difficulty(self.family, entry["metadata"]),
            family=self.family,
            metadata=fields,
        )

    def check(self, problem: Problem, answer: str) -> float:
        """reasoning-gym's score of the answer, with its LaTeX or Markdown wrapping removed.

        Most checkers compare text, so a number equal to the reference is also checked in the reference's spelling.
        """
        spellings = [answer, normalise(answer) if self.family == "countdown" else unwrap(answer)]
        reference = problem.answer
        if DECIMAL.fullmatch(reference) and "/" not in normalise(answer) and number_in(answer) == number_in(reference):
            spellings.append(reference)
        return max(self._score(problem, spelling) for spelling in dict.fromkeys(spellings))

    def _score(self, problem: Problem, answer: str) -> float:
        """An answer that the checker would evaluate as code is filtered and checked in a separate process."""
        if self.family == "countdown":
            return countdown.score(answer, problem.metadata["numbers"], problem.metadata["target"])
        entry = {
            "question": problem.metadata["question"],
            "answer": problem.answer or None,
            "metadata": problem.metadata,
        }
        if self.family in EXPRESSIONS | LITERALS:
            safe = is_safe_expression if self.family in EXPRESSIONS else is_safe_literal
            if not safe(answer):
                return 0.0
            request = {"task": "gym", "name": self.family, "config": self.config, "answer": answer, "entry": entry}
            return shared_checker().call(request, TIMEOUT) or 0.0
        try:
            return float(self._checker.score_answer(answer, entry))
        except Exception:  # some checkers raise on a malformed answer
            return 0.0

    def _entry(self, seed: int, index: int) -> dict[str, Any] | None:
        block, place = divmod(index, BLOCK)
        base = int.from_bytes(hashlib.sha256(f"{seed}/{block}".encode()).digest()[:4], "big") // 2
        if self.family == "countdown":
            checker = self._checker
            wrapper = import_module("reasoning_gym.games.countdown").QUESTION_FORMAT_TEMPLATE
            return countdown.generate(checker.config, checker._prompt_templates, wrapper, base + place)
        if self._block is None or self._block[0] != (seed, block):
            self._block = (seed, block), _dataset(self.family, self.config, base, BLOCK)
        try:
            return self._block[1][place]
        except Exception:  # a failed attempt raises ValueError, IndexError, KeyError, … depending on the dataset
            return None


def _check_cost(name: str, config: dict[str, Any]) -> None:
    """Raises UserError where a problem takes for ever to make: a number of 10^30 digits, a tower of 40 disks.

    It is tried in the checker's process, whose start takes two seconds; so not for numbers near the dataset's defaults.
    """
    require("rl", "reasoning_gym")
    known = _datasets().get(name)
    defaults = {} if known is None else {f.name: f.default for f in fields(known[1])}
    if not any(_is_large(value, defaults.get(field)) for field, value in config.items()):
        return
    request = {"task": "make", "name": name, "config": config, "count": PROBE}
    if shared_checker().call(request, MAKE_TIMEOUT) is None:
        raise UserError(
            f"environment {name}: with config {config} {PROBE} problems take more than {MAKE_TIMEOUT:g} seconds, or "
            "too much memory; lower its numbers"
        )


def _is_large(value: object, default: object) -> bool:
    """Whether a number, or one in a list, is above twice the default, or above 10 where that is 0 or no number.

    The effort of some datasets doubles with every unit.
    """
    if isinstance(value, list | tuple):
        return any(_is_large(item, default) for item in cast("Iterable[object]", value))
    usual = abs(default) if isinstance(default, int | float) else 0
    return isinstance(value, int | float) and not abs(value) <= 2 * (usual or 5)


def _datasets() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # from its imports when they are first compiled
        return import_module("reasoning_gym.factory").DATASETS


def _dataset(name: str, config: dict[str, Any], seed: int, size: int) -> Any:
    datasets = _datasets()
    if name not in datasets or name == "composite":  # use several [[environments]] instead
        close = [n for n in sorted(datasets) if n[:4] == name[:4]] or ["countdown", "chain_sum"]
        raise UserError(
            f"environment {name!r} is not a dataset of reasoning-gym ({', '.join(close)} …); "
            f"name one, or set path to a JSONL file"
        )
    try:
        return import_module("reasoning_gym.factory").create_dataset(name, seed=seed, size=size, **config)
    except TypeError as e:
        known = sorted(f.name for f in fields(datasets[name][1]) if f.name not in ("seed", "size"))
        raise UserError(
            f"environment {name}: config {config} is not accepted ({e}); its fields are {', '.join(known)}"
        ) from None
    except (AssertionError, ValueError) as e:
        raise UserError(f"environment {name}: config {config} is refused by reasoning-gym: {e}") from None


def _fields(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Fields for a recipe's `prompt`: metadata, question, and compact text (`neighbors`, `claims`) where we have it."""
    fields = entry["metadata"] | {"question": entry["question"]}
    if name == "graph_color":
        return fields | {"neighbors": graph_coloring.neighbors(fields["puzzle"])}
    return fields | {"claims": knights_knaves.claims(fields)} if name == "knights_knaves" else fields


def _key(name: str, entry: dict[str, Any]) -> str:
    if name == "knights_knaves":
        return knights_knaves.key(entry["metadata"])
    if name == "countdown":
        return number_key(entry["metadata"]["numbers"])
    return number_key(integers(entry["question"])) if _numbers_identify(name) else text_key(entry["question"])


@functools.lru_cache
def _numbers_identify(name: str) -> bool:
    """Whether the multiset of integers identifies a problem: at most a quarter of the probed ones share one multiset.

    Probed with the dataset's default config, so that all its configs split alike.
    """
    dataset = _dataset(name, {}, 0, BLOCK)
    counts = Counter(number_key(integers(dataset[i]["question"])) for i in range(PROBE))
    return counts.most_common(1)[0][1] <= PROBE // 4


def _difficulty(name: str, metadata: dict[str, Any]) -> str:
    """The difficulty fields with a range of fewer than 10 values, e.g. "num_terms=3, num_digits=2"."""
    if name == "countdown":
        return f"numbers={len(metadata['numbers'])}"
    if name == "knights_knaves":
        return f"people={len(metadata['names'])}"
    parts: list[str] = []
    limits = metadata.get("difficulty")
    for field, limit in cast("dict[str, object]", limits).items() if isinstance(limits, dict) else ():
        value = metadata.get(field)
        match limit:
            case [int(least), int(most)] if isinstance(value, int) and most - least < 10:
                parts.append(f"{field}={value}")
            case _:
                pass
    return ", ".join(parts)


def is_safe_expression(answer: str) -> bool:
    """Only numbers, operators, single letters and FUNCTIONS: no attributes, other calls or strings."""
    names = re.findall(r"[A-Za-z_]+", answer)
    return (
        len(answer) <= 500
        and re.fullmatch(r"[0-9A-Za-z+\-*/^()., ]*", answer) is not None
        and re.search(r"\d{13}|\.\s*[A-Za-z]", answer) is None
        and all(len(n) == 1 or n in FUNCTIONS for n in names)
    )


def is_safe_literal(answer: str) -> bool:
    """Only text and lists of numbers and strings: without parentheses nothing can be called."""
    return len(answer) <= 5000 and re.fullmatch(r"[\w\s,\[\]'\"#-]*", answer) is not None and "__" not in answer
