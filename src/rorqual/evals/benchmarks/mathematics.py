"""Mathematics with a final answer: AIME, MATH-500 and GSM8K.

The prompt is the one that DeepSeek-R1's release recommends for mathematics (its README, "Usage Recommendations"). The
published judges compare with a normalised string (MATH), an integer (AIME) or the number after #### (GSM8K): ours
(docs/judging.md) accepts what they accept, and equal values in another form.
"""

from collections.abc import Sequence

from rorqual.errors import UserError
from rorqual.evals.benchmarks.benchmark import Benchmark
from rorqual.evals.benchmarks.sources import HubData, Row
from rorqual.evals.second_reading import by_math_verify
from rorqual.judge.extract_answer import read_answer
from rorqual.judge.judge import final_answer, same_answer
from rorqual.rl.envs.environment import Problem

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


class Mathematics(Benchmark):
    """A question, and a final answer compared by its value."""

    judge = "final answer, by value"
    second_judge = "math-verify"
    question_field: tuple[str, ...] = ("problem", "question")
    answer_field: tuple[str, ...] = ("answer",)
    level_field: str | None = None

    def problem(self, where: str, row: Row, seed: int) -> Problem:
        question = self.text(where, row, *self.question_field)
        answer = final_answer(self.text(where, row, *self.answer_field))
        if not answer:
            raise UserError(f"{where}: field {self.answer_field[0]} has no final answer; correct it")
        level = row.get(self.level_field, "") if self.level_field else ""
        return self.made(where, f"{question}\n{INSTRUCTION}", answer, "" if level is None else level)

    def answer(self, problem: Problem, prompt: str, text: str) -> str | None:
        return read_answer(text, problem.answer)

    def score(self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]) -> list[bool]:
        return [a is not None and same_answer(p.answer, a) for p, a in zip(problems, answers, strict=True)]

    def second_score(
        self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]
    ) -> list[bool]:
        return by_math_verify(problems, texts)


class AIME24(Mathematics):
    """American Invitational Mathematics Examination 2024, I and II: 30 problems with integers from 0 to 999."""

    name, hub = "aime24", HubData("HuggingFaceH4/aime_2024", split="train")
    question_field, answer_field = ("problem", "Problem", "question"), ("answer", "Answer")


class AIME25(AIME24):
    """The same examination, 2025."""

    name, hub = "aime25", HubData("yentinglin/aime_2025", split="train")


class MATH500(Mathematics):
    """500 problems of MATH (arXiv 2103.03874), chosen by Lightman et al. (arXiv 2305.20050); levels 1 to 5."""

    name, hub, level_field = "math500", HubData("HuggingFaceH4/MATH-500"), "level"


class GSM8K(Mathematics):
    """1319 word problems of primary school (arXiv 2110.14168); the answer follows ####."""

    name, hub = "gsm8k", HubData("openai/gsm8k", "main")
    question_field = ("question",)
