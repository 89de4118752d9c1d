"""Small Python functions to write, judged by tests in the sandbox: `name = "programs"`.

A problem is a sentence composed of a choice of numbers, what is done with each, and what is made of them: "Write a
Python function f(numbers) that returns the sum of the squares of the even numbers." There are 1568.
"""

from dataclasses import dataclass
from random import Random

from rorqual.recipe import EnvironmentSection
from rorqual.rl.envs.code_tests import passes, read_program
from rorqual.rl.envs.environment import Environment, Problem, text_key

CASES = 6  # tests of a problem


@dataclass(frozen=True)
class Part:
    words: str
    code: str  # Python, of n (a number), or of chosen (a list)


CHOICES = [
    Part("the numbers", ""),
    Part("the even numbers", "n % 2 == 0"),
    Part("the odd numbers", "n % 2 == 1"),
    Part("the positive numbers", "n > 0"),
    Part("the negative numbers", "n < 0"),
    *(Part(f"the numbers greater than {k}", f"n > {k}") for k in range(2, 10)),
    *(Part(f"the numbers less than {k}", f"n < {k}") for k in range(2, 10)),
    *(Part(f"the multiples of {k}", f"n % {k} == 0") for k in range(3, 10)),
]
EACH = [
    Part("", "n"),
    Part("the squares of ", "n * n"),
    Part("the doubles of ", "2 * n"),
    Part("the absolute values of ", "abs(n)"),
    *(Part(f"{k} times ", f"{k} * n") for k in range(3, 7)),
]
RESULTS = [  # {} stands for what they are made of
    Part("the sum of {}", "sum(chosen)"),
    Part("a list of {}", "chosen"),
    Part("a sorted list of {}", "sorted(chosen)"),
    Part("a list of {}, from the last to the first", "chosen[::-1]"),
    Part("the largest of {}, or 0 where there are none", "max(chosen, default=0)"),
    Part("the smallest of {}, or 0 where there are none", "min(chosen, default=0)"),
    Part("how many different values there are among {}", "len(set(chosen))"),
]


class Programs(Environment):
    remedy = "give its section a file of problems with tests"

    def __init__(self, section: EnvironmentSection) -> None:
        super().__init__(section.name, section.weight)

    def candidate(self, seed: int, index: int) -> Problem:
        rng = Random(f"programs/{seed}/{index}")
        choice, each, result = rng.choice(CHOICES), rng.choice(EACH), rng.choice(RESULTS)
        name = rng.choice(("f", "solve", "compute", "work_out"))
        what = result.words.format(each.words + choice.words)
        question = (
            f"Write a Python function `{name}(numbers)` that takes a list of whole numbers and returns {what}. "
            "Give only the code of the function as the answer."
        )
        code = solution(name, choice, each, result)
        return Problem(
            question=question,
            answer=code,
            key=text_key(what),
            difficulty="",
            family=self.family,
            metadata={"tests": _tests(name, code, rng), "parts": [choice, each, result], "name": name},
        )

    def read(self, problem: Problem, text: str) -> str | None:
        """The program in a completion."""
        return read_program(text)

    def check(self, problem: Problem, answer: str) -> float:
        return float(passes(answer, problem.metadata["tests"]))


def solution(name: str, choice: Part, each: Part, result: Part) -> str:
    condition = f" if {choice.code}" if choice.code else ""
    return f"def {name}(numbers):\n    chosen = [{each.code} for n in numbers{condition}]\n    return {result.code}"


def _tests(name: str, code: str, rng: Random) -> list[str]:
    scope: dict[str, object] = {}
    exec(code, scope)  # our own sentence of code
    function = scope[name]
    lists = [[], *([rng.randint(-12, 20) for _ in range(rng.randint(1, 9))] for _ in range(CASES - 1))]
    assert callable(function)
    return [f"assert {name}({numbers}) == {function(list(numbers))!r}" for numbers in lists]
