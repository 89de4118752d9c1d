"""Synthetic reasoning documents for pre-training from scratch: problems with chains of thought.

A document is a question, a chain of thought and an answer, in the format of the later RL and chat. As in natural text,
quality varies: some documents reason in small steps, verify, find an error and correct it; some give up early; some
answer without thinking. Their arithmetic is correct except for errors that a later check finds. Which behaviour pays is
left for RL to find.
"""

import functools
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rorqual.files import write_text
from rorqual.rl.envs import graph_coloring
from rorqual.rl.envs.environment import Environment, Problem

RIGHT, WRONG = "✓", "✗"
LARGEST = 699  # bound of all intermediate results: covers sums of seven two-digit numbers with a small vocabulary
MAX_ATTEMPTS = 3  # to color a graph


@dataclass(frozen=True)
class Document:
    problem: Problem
    thinking: str
    answer: str

    @property
    def completion(self) -> str:
        return f"<think>{self.thinking}</think><answer>{self.answer}</answer>"


# -- countdown: reach a target with a few numbers, by trying and checking


def attempts(numbers: tuple[int, ...]) -> dict[str, int]:
    """All ways to combine sorted numbers by +, - and * with intermediate results from 0 to LARGEST.

    Steps as written in the thinking, e.g. 8*3=24,24-1=23 (larger operand first) → their final value.
    """
    return _few_attempts(numbers) if len(numbers) <= 3 else _attempts(numbers)  # those of four are too many to cache


def _attempts(numbers: tuple[int, ...]) -> dict[str, int]:
    found = {}
    for i, j in itertools.combinations(range(len(numbers)), 2):
        small, large = numbers[i], numbers[j]
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        for op, result in (("+", large + small), ("-", large - small), ("*", large * small)):
            if result > LARGEST:
                continue
            step = f"{large}{op}{small}={result}"
            if not rest:
                found[step] = result
                continue
            for steps, value in attempts(tuple(sorted([*rest, result]))).items():
                found[f"{step},{steps}"] = value
    return found


_few_attempts = functools.lru_cache(1 << 14)(_attempts)


def expression(steps: str) -> str:
    """The steps as one expression, for the answer: 8*3=24,24-1=23 → 8*3-1."""
    made: dict[str, list[tuple[str, bool]]] = defaultdict(list)  # result → (expression, whether it is a sum)
    result = ""
    for step in steps.split(","):
        calculation, result = step.split("=")
        left, op, right = re.split(r"([+*-])", calculation)
        (left, left_sum), (right, right_sum) = [made[n].pop() if made[n] else (n, False) for n in (left, right)]
        left = f"({left})" if left_sum and op == "*" else left
        right = f"({right})" if right_sum and op != "+" else right
        made[result].append((f"{left}{op}{right}", op != "*"))
    return made[result][0][0]


def countdown_document(problem: Problem, rng: Random) -> Document:
    """Verified attempts in random order; most documents reach the target, some give up before."""
    target = problem.metadata["target"]
    every = attempts(tuple(sorted(problem.metadata["numbers"])))
    right = [steps for steps, value in every.items() if value == target]
    wrong = [steps for steps, value in every.items() if value != target]
    tried: list[str] = []
    for _ in range(min(len(wrong), int(rng.expovariate(1 / 3.0)))):
        # People's wrong attempts come close: half of them are the nearest to the target of three.
        draw = rng.sample(wrong, min(len(wrong), 3 if rng.random() < 0.5 else 1))
        pick = min(draw, key=lambda steps: abs(every[steps] - target))
        wrong.remove(pick)
        tried.append(pick)
    lines = [f"{steps} {WRONG}\n" for steps in tried]
    if right and not (tried and rng.random() < 0.35):
        solution = rng.choice(right)
        lines.append(f"{solution} {RIGHT}\n")
        return Document(problem, "".join(lines), expression(solution))
    if not tried:
        tried = [rng.choice(list(every))]
        lines = [f"{tried[0]} {WRONG}\n"]
    return Document(problem, "".join(lines), expression(tried[-1]))


# -- chain_sum: a sum and difference of several numbers


def chain_document(problem: Problem, rng: Random) -> Document:
    """Without thinking, step by step, or step by step with a check in another order that finds errors."""
    words = problem.metadata["expression"].split()
    terms = [int(words[0])] + [int(n) if op == "+" else -int(n) for op, n in zip(words[1::2], words[2::2], strict=True)]
    answer = str(sum(terms))
    way = rng.random()
    if way < 0.45:
        return Document(problem, "", answer)
    if way < 0.75:
        return Document(problem, _chain(terms) + "\n", answer)
    lines = []
    if rng.random() < 0.3:
        lines += [_chain(terms, slip=rng.choice((-10, -1, 1, 10))), f"{_chain(_reordered(terms))} {WRONG}\n"]
    lines += [_chain(terms), f"{_chain(_reordered(terms))} {RIGHT}\n"]
    return Document(problem, "\n".join(lines), answer)


def _reordered(terms: list[int]) -> list[int]:
    """Positive terms first, then negative ones."""
    return sorted(terms, key=lambda t: t < 0)


def _chain(terms: list[int], slip: int = 0) -> str:
    """12+7=19,19-4=15; `slip` is added to the last result."""
    total, parts = terms[0], []
    for i, term in enumerate(terms[1:], start=2):
        result = total + term + (slip if i == len(terms) else 0)
        parts.append(f"{total}{'+' if term >= 0 else '-'}{abs(term)}={result}")
        total = result
    return ",".join(parts)


# -- graph_color: one of three colors for every vertex, neighbors apart


def graph_document(problem: Problem, rng: Random) -> Document:
    """Without thinking, or vertex by vertex with a random free color, again after a dead end; some give up there."""
    puzzle = problem.metadata["puzzle"]
    before = graph_coloring.before(puzzle)
    if rng.random() < 0.3:
        return Document(problem, "", _as_json(problem.metadata["possible_answer"]))
    lines = []
    while True:
        colors, dead = _color(before, puzzle["color_options"], rng)
        lines.append(f"{_coloring(before, colors)} {WRONG if dead else RIGHT}\n")
        if not dead:
            return Document(problem, "".join(lines), _as_json(colors))
        if rng.random() < 0.35 or len(lines) == MAX_ATTEMPTS:
            guess = {v: colors.get(v) or rng.choice(puzzle["color_options"]) for v in before}
            return Document(problem, "".join(lines), _as_json(guess))


def _color(before: dict[int, list[int]], options: list[int], rng: Random) -> tuple[dict[int, int], bool]:
    """(colors up to the first vertex without a free color, whether there was one)."""
    colors: dict[int, int] = {}
    for vertex, neighbors in before.items():
        free = [c for c in options if c not in {colors[n] for n in neighbors}]
        if not free:
            return colors, True
        colors[vertex] = rng.choice(free)
    return colors, False


def _coloring(before: dict[int, list[int]], colors: dict[int, int]) -> str:
    """0=2,1(0=2)=1,2(0=2,1=1)=3; at a dead end the last vertex has no color."""
    parts = []
    for vertex in itertools.islice(before, len(colors) + 1):
        known = ",".join(f"{n}={colors[n]}" for n in before[vertex])
        parts.append(f"{vertex}{f'({known})' if known else ''}{f'={colors[vertex]}' if vertex in colors else ''}")
    return ",".join(parts)


def _as_json(colors: dict[int, int]) -> str:
    return json.dumps(colors, separators=(",", ":"))


WRITERS: dict[str, Callable[[Problem, Random], Document]] = {
    "countdown": countdown_document,
    "chain_sum": chain_document,
    "graph_color": graph_document,
}


# Bounded: models may write numbers that are too long for Python's int().
STEP = re.compile(r"(-?[0-9]{1,9})([+*-])([0-9]{1,9})=(-?[0-9]{1,9})")
COLOR = "[0-9]{1,3}=[0-9]{1,3}"
VERTEX = re.compile(rf"([0-9]{{1,3}})(?:\(({COLOR}(?:,{COLOR})*)\))?(?:=([0-9]{{1,3}}))?")  # 2(0=2,1=1)=3


def line_is_right(problem: Problem, line: str) -> bool | None:
    """Whether a line of thinking marked ✓ is correct: all steps are true and they solve the problem.

    None for a line that is not a list of steps.
    """
    if problem.family == "graph_color":
        return _coloring_is_right(problem.metadata["puzzle"], line.strip())
    texts = line.strip().split(",")
    steps = [step for text in texts if (step := STEP.fullmatch(text))]
    if len(steps) < len(texts):
        return None
    values = [(int(a), op, int(b), int(result)) for a, op, b, result in (step.groups() for step in steps)]
    if any({"+": a + b, "-": a - b, "*": a * b}[op] != result for a, op, b, result in values):
        return False
    if problem.family == "chain_sum":
        return values[-1][3] == int(problem.answer)
    unused = list(problem.metadata["numbers"])
    for a, _, b, result in values:
        for operand in (a, b):
            if operand not in unused:
                return False
            unused.remove(operand)
        unused.append(result)
    return unused == [problem.metadata["target"]]


def _coloring_is_right(puzzle: dict[str, Any], line: str) -> bool | None:
    texts = re.split(r",(?![^()]*\))", line)
    parts = [part for text in texts if (part := VERTEX.fullmatch(text))]
    if len(parts) < len(texts):
        return None
    colors: dict[int, int] = {}
    for vertex, known, color in (part.groups() for part in parts):
        pairs = [pair.split("=") for pair in known.split(",")] if known else []
        if color is None or int(vertex) in colors or any(colors.get(int(n)) != int(c) for n, c in pairs):
            return False
        colors[int(vertex)] = int(color)
    apart = all(colors.get(a) != colors.get(b) for a, b in puzzle["edges"])
    return apart and sorted(colors) == puzzle["vertices"] and set(colors.values()) <= set(puzzle["color_options"])


def documents(problems: list[Problem], count: int, seed: int) -> Iterator[Document]:
    """`count` documents over the problems; those of one problem are consecutive, with different wrong attempts."""
    rng = Random(seed)
    for i in range(count):
        problem = problems[i * len(problems) // count]
        yield WRITERS[problem.family](problem, rng)


def write_documents(
    path: Path, environments: list[Environment], counts: list[int], problems: list[int], seed: int
) -> int:
    """Write a shuffled .jsonl corpus of `counts[i]` documents over `problems[i]` training problems of environment i.

    Their format is the `plain` template (rl/prompts.py). Returns the number of documents.
    """
    rng = Random(seed)
    texts = []
    for environment, count, distinct in zip(environments, counts, problems, strict=True):
        chosen = environment.problems("train", distinct, seed)
        for document in documents(chosen, count, rng.getrandbits(32)):
            texts.append(f"{document.problem.question}\n{document.completion}")
    rng.shuffle(texts)
    write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return len(texts)
