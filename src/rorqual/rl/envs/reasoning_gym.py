"""Every dataset of reasoning-gym as an environment."""

import functools
import hashlib
import re
import warnings
from collections import Counter
from typing import Any

from rorqual.errors import UserError
from rorqual.judge.judge import number_in
from rorqual.judge.notation import plain, unwrap
from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs import countdown, graph_coloring, knights_knaves
from rorqual.rl.envs.environment import Environment, Problem, PromptFormat, integers, number_key, text_key
from rorqual.sandbox.checker import shared_checker

BLOCK = 1000  # candidates of one dataset object: some allocate by size, none needs more
PROBE = 16  # problems looked at to see whether numbers tell a dataset's problems apart
DECIMAL = re.compile(r"-?\d+(?:\.\d+)?")
TIMEOUT = 5.0  # seconds for a checker that evaluates the answer

# Checkers that pass the answer to sympy's parse_expr or to eval, and what they may be shown.
EXPRESSIONS = {"simple_integration", "intermediate_integration", "polynomial_multiplication", "puzzle24"}
LITERALS = {"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"}
FUNCTIONS = {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh",
             "exp", "log", "ln", "sqrt", "Abs", "pi"}  # fmt: skip


class ReasoningGymEnvironment(Environment):
    """The dataset `section.name` with the fields of `section.config`."""

    def __init__(self, section: EnvironmentSection) -> None:
        super().__init__(section.name, section.weight)
        self.config = dict(section.config)
        for name in ("seed", "size"):
            if name in self.config:
                raise UserError(f"environment {section.name}: config.{name} is set by the run's seed; remove it")
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
            return None  # some datasets do not give every problem the same fields
        return Problem(
            question=self._prompt(fields) if self._prompt else entry["question"],
            answer="" if entry["answer"] is None else str(entry["answer"]),
            key=_key(self.family, entry),
            difficulty=_difficulty(self.family, entry["metadata"]),
            family=self.family,
            metadata=fields,
        )

    def check(self, problem: Problem, answer: str) -> float:
        """reasoning-gym's score, whatever the answer is wrapped in.

        Most of its checkers compare text: a number that equals the right one is checked as the right one is written.
        """
        spellings = [answer, plain(answer) if self.family == "countdown" else unwrap(answer)]
        right = problem.answer
        if DECIMAL.fullmatch(right) and "/" not in plain(answer) and number_in(answer) == number_in(right):
            spellings.append(right)
        return max(self._score(problem, spelling) for spelling in dict.fromkeys(spellings))

    def _score(self, problem: Problem, answer: str) -> float:
        """What a checker would evaluate is filtered and checked in a process of its own."""
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
        except Exception:  # some checkers raise on an answer of the wrong shape
            return 0.0

    def _entry(self, seed: int, index: int) -> dict[str, Any] | None:
        block, place = divmod(index, BLOCK)
        base = int.from_bytes(hashlib.sha256(f"{seed}/{block}".encode()).digest()[:4], "big") // 2
        if self.family == "countdown":
            from reasoning_gym.games.countdown import QUESTION_FORMAT_TEMPLATE

            checker = self._checker
            return countdown.generate(checker.config, checker._prompt_templates, QUESTION_FORMAT_TEMPLATE, base + place)
        if self._block is None or self._block[0] != (seed, block):
            self._block = (seed, block), _dataset(self.family, self.config, base, BLOCK)
        try:
            return self._block[1][place]
        except Exception:  # how the datasets say that an attempt failed: ValueError, IndexError, KeyError, …
            return None


def _dataset(name: str, config: dict[str, Any], seed: int, size: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of what it imports, where that is compiled for the first time
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

    if name not in DATASETS or name == "composite":  # several [[environments]] do what composite does
        close = [n for n in sorted(DATASETS) if n[:4] == name[:4]] or ["countdown", "chain_sum"]
        raise UserError(
            f"environment {name!r} is not a dataset of reasoning-gym ({', '.join(close)} …); "
            f"name one, or give path for a JSONL file"
        )
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **config)
    except TypeError as e:
        known = sorted(set(DATASETS[name][1].__dataclass_fields__) - {"seed", "size"})
        raise UserError(
            f"environment {name}: config {config} is not accepted ({e}); its fields are {', '.join(known)}"
        ) from None
    except (AssertionError, ValueError) as e:
        raise UserError(f"environment {name}: config {config} is refused by reasoning-gym: {e}") from None


def _fields(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """What a recipe's `prompt` may name: metadata, question, and of knights_knaves its `claims` in few words."""
    fields = entry["metadata"] | {"question": entry["question"]}
    if name == "graph_color":
        return fields | {"neighbors": graph_coloring.neighbors(fields["puzzle"])}
    return fields | {"claims": knights_knaves.claims(fields)} if name == "knights_knaves" else fields


def _key(name: str, entry: dict[str, Any]) -> str:
    if name == "knights_knaves":
        return knights_knaves.key(entry["metadata"])
    if name == "countdown":
        return number_key(entry["metadata"]["numbers"])
    return number_key(integers(entry["question"])) if _told_by_numbers(name) else text_key(entry["question"])


@functools.lru_cache
def _told_by_numbers(name: str) -> bool:
    """False where numbers belong to the wording: more than a quarter of the dataset's problems share one multiset.

    Looked up at the dataset's default config, so that every config of it splits alike.
    """
    dataset = _dataset(name, {}, 0, BLOCK)
    counts = Counter(number_key(integers(dataset[i]["question"])) for i in range(PROBE))
    return counts.most_common(1)[0][1] <= PROBE // 4


def _difficulty(name: str, metadata: dict[str, Any]) -> str:
    """What varies between the config's limits and is small enough to group by, e.g. "num_terms=3, num_digits=2"."""
    if name == "countdown":
        return f"numbers={len(metadata['numbers'])}"
    if name == "knights_knaves":
        return f"people={len(metadata['names'])}"
    parts = []
    limits = metadata.get("difficulty")
    for field, limit in limits.items() if isinstance(limits, dict) else ():
        value = metadata.get(field)
        ranged = isinstance(limit, list | tuple) and len(limit) == 2 and all(isinstance(x, int) for x in limit)
        if ranged and isinstance(value, int) and limit[1] - limit[0] < 10:
            parts.append(f"{field}={value}")
    return ", ".join(parts)


def is_safe_expression(answer: str) -> bool:
    """Numbers, operators, single letters and known functions: no attribute, call by name or string gets through."""
    names = re.findall(r"[A-Za-z_]+", answer)
    return (
        len(answer) <= 500
        and re.fullmatch(r"[0-9A-Za-z+\-*/^()., ]*", answer) is not None
        and re.search(r"\d{13}|\.\s*[A-Za-z]", answer) is None
        and all(len(n) == 1 or n in FUNCTIONS for n in names)
    )


def is_safe_literal(answer: str) -> bool:
    """Text and lists of numbers and strings: without parentheses nothing can be called."""
    return len(answer) <= 5000 and re.fullmatch(r"[\w\s,\[\]'\"#-]*", answer) is not None and "__" not in answer
