"""Reasoning documents for pre-training a small model from nothing: problems with worked solutions.

A document is a question, a chain of thought and an answer, in the chat format that reinforcement learning and chat
use later. As in text that people write, quality varies: some documents think in small steps, check, find a wrong turn
and correct it; some give up early; some answer without thinking. None says something false about arithmetic except
for slips that a check then finds. What pays off is left for reinforcement learning to discover.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rorqual.reason.problems import Environment, Problem

RIGHT, WRONG = "✓", "✗"
LARGEST = 699  # no step goes above: chains of seven two-digit numbers stay below, and a small vocabulary is cheap


@dataclass(frozen=True)
class Document:
    problem: Problem
    thinking: str
    answer: str

    @property
    def completion(self) -> str:
        return f"<think>{self.thinking}</think><answer>{self.answer}</answer>"


# -- countdown: reach a target with three numbers, by trying and checking


@dataclass(frozen=True)
class Attempt:
    steps: str  # as written while thinking, e.g. 3*8=24,24-1=23
    expression: str  # as answered, e.g. 3*8-1
    value: int


def attempts(numbers: list[int]) -> list[Attempt]:
    """Every way of joining three numbers by +, - and * without a negative or too large number on the way."""
    found: dict[str, Attempt] = {}
    for i in range(3):
        c = numbers[i]
        a, b = sorted((numbers[j] for j in range(3) if j != i), reverse=True)
        for first, x in ((f"{a}+{b}", a + b), (f"{a}-{b}", a - b), (f"{a}*{b}", a * b)):
            if x > LARGEST:
                continue
            inner = first if "*" in first else f"({first})"
            ways = [
                (f"{x}+{c}", f"{first}+{c}", x + c),
                (f"{x}-{c}", f"{first}-{c}", x - c),
                (f"{c}-{x}", f"{c}-{inner}", c - x),
                (f"{x}*{c}", f"{inner}*{c}", x * c),
            ]
            for second, expression, value in ways:
                if 0 <= value <= LARGEST:
                    steps = f"{first}={x},{second}={value}"
                    found.setdefault(steps, Attempt(steps, expression, value))
    return list(found.values())


def countdown_document(problem: Problem, rng: Random) -> Document:
    """Tries in random order, each checked; most documents find the target, some give up before."""
    target = problem.metadata["target"]
    every = attempts(problem.metadata["numbers"])
    right = [a for a in every if a.value == target]
    wrong = [a for a in every if a.value != target]
    rng.shuffle(wrong)
    # A try that misses by little is the kind a person makes: half of the wrong turns are the nearest of three.
    tried: list[Attempt] = []
    while wrong:
        draw = wrong[-3:] if rng.random() < 0.5 else wrong[-1:]
        pick = min(draw, key=lambda a: abs(a.value - target))
        wrong.remove(pick)
        tried.append(pick)
    length = min(len(tried), int(rng.expovariate(1 / 3.0)))
    tried = tried[:length]
    lines = [f"{a.steps} {WRONG}\n" for a in tried]
    if right and not (tried and rng.random() < 0.35):
        solution = rng.choice(right)
        lines.append(f"{solution.steps} {RIGHT}\n")
        return Document(problem, "".join(lines), solution.expression)
    if not tried:
        tried = [rng.choice(every)]
        lines = [f"{tried[0].steps} {WRONG}\n"]
    return Document(problem, "".join(lines), tried[-1].expression)


# -- chain_sum: a sum and difference of several numbers


def chain_document(problem: Problem, rng: Random) -> Document:
    """At once, step by step, or step by step with a second reckoning in another order that finds slips."""
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
    """What is added first, then what is taken away."""
    return sorted(terms, key=lambda t: t < 0)


def _chain(terms: list[int], slip: int = 0) -> str:
    """12+7=19,19-4=15; a slip spoils the last result."""
    total, parts = terms[0], []
    for i, term in enumerate(terms[1:], start=2):
        result = total + term + (slip if i == len(terms) else 0)
        parts.append(f"{total}{'+' if term >= 0 else '-'}{abs(term)}={result}")
        total = result
    return ",".join(parts)


WRITERS: dict[str, Callable[[Problem, Random], Document]] = {
    "countdown": countdown_document,
    "chain_sum": chain_document,
}


STEP = re.compile(r"(-?\d+)([+*-])(\d+)=(-?\d+)")


def line_is_right(problem: Problem, line: str) -> bool | None:
    """Whether a line of thinking that was marked right is: every step true, and the problem solved by it.

    None for what is not a line of steps.
    """
    steps = [STEP.fullmatch(step) for step in line.strip().split(",")]
    if not all(steps):
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


def documents(problems: list[Problem], count: int, seed: int) -> Iterator[Document]:
    """`count` documents over the problems, each problem again with other wrong turns when they run out."""
    rng = Random(seed)
    for i in range(count):
        problem = problems[i % len(problems)]
        yield WRITERS[problem.family](problem, rng)


def write_documents(
    path: Path, environments: list[Environment], counts: list[int], problems: list[int], seed: int
) -> int:
    """Write a shuffled .jsonl corpus of `counts[i]` documents over `problems[i]` training problems of environment i.

    Their form is that of the `plain` template (reason/prompts.py). Returns the number of documents.
    """
    rng = Random(seed)
    texts = []
    for environment, count, distinct in zip(environments, counts, problems, strict=True):
        chosen = environment.problems("train", distinct, seed)
        for document in documents(chosen, count, rng.getrandbits(32)):
            texts.append(f"{document.problem.question}\n{document.completion}")
    rng.shuffle(texts)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return len(texts)
