"""Multiple choice: GPQA-Diamond, MMLU and MMLU-Pro."""

import random
import re
from collections.abc import Sequence
from typing import cast

from rorqual.errors import UserError
from rorqual.evals.benchmarks.benchmark import Benchmark, reply
from rorqual.evals.benchmarks.sources import HubData, Row
from rorqual.judge.extract_answer import read_answer
from rorqual.judge.judge import same_answer
from rorqual.rl.envs.environment import Problem

LETTERS = "ABCDEFGHIJ"
# simple-evals, common.py (QUERY_TEMPLATE_MULTICHOICE), which R1 was evaluated with (R1, supplement).
INSTRUCTION = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering."
)
ANSWER = re.compile(r"Answer[ \t]*:[ \t]*\$?([A-D])\$?(?![a-z])", re.IGNORECASE)
MARKUP = re.compile(
    r"\*\*|__|\$|\\boxed|\\text|\\mathrm|\\mathbf|[{}]|\\\(|\\\)"
)  # removed before, as simple-evals does
# TIGER-Lab/MMLU-Pro, cot_prompt_lib/initial_prompt.txt and compute_accuracy.py: the readings in their order.
PRO_INSTRUCTION = (
    "The following are multiple choice questions (with answers) about {subject}. Think step by step and then finish "
    'your answer with "the answer is (X)" where X is the correct letter choice.'
)
PRO_ANSWERS = (
    re.compile(r"answer is \(?([A-J])\)?"),
    re.compile(r".*[aA]nswer:\s*([A-J])"),
    re.compile(r"\b[A-J]\b(?!.*\b[A-J]\b)", re.DOTALL),
)


class Choice(Benchmark):
    """A question with lettered choices."""

    judge = "letter after Answer:"
    second_judge = "rorqual's answer extraction"

    def answer(self, problem: Problem, prompt: str, text: str) -> str | None:
        said = reply(text)
        found = ANSWER.search(MARKUP.sub("", said)) if said else None
        return found[1].upper() if found else None

    def score(self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]) -> list[bool]:
        return [p.answer == a for p, a in zip(problems, answers, strict=True)]

    def second_score(
        self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]
    ) -> list[bool]:
        """The answer as for any question, compared with the letter and with the choice's own words."""
        verdicts: list[bool] = []
        for problem, text in zip(problems, texts, strict=True):
            said = read_answer(text, problem.answer)
            wanted = (problem.answer, cast("list[str]", problem.metadata["choices"])[LETTERS.index(problem.answer)])
            verdicts.append(said is not None and any(same_answer(w, said) for w in wanted))
        return verdicts

    def lettered(self, where: str, question: str, choices: Sequence[object], right: int, subject: object) -> Problem:
        """A problem in simple-evals' format. right: index of the correct choice."""
        texts = [str(choice).strip() for choice in choices]
        if len(texts) != 4 or not 0 <= right < 4:
            raise UserError(f"{where}: {self.name} has 4 choices and an answer among them, not {len(texts)}")
        listed = "\n".join(f"{letter}) {text}" for letter, text in zip(LETTERS, texts, strict=False))
        asked = f"{INSTRUCTION}\n\n{question.strip()}\n\n{listed}"
        return self.made(where, asked, LETTERS[right], subject, choices=texts)


class GPQADiamond(Choice):
    """198 questions of graduate level (arXiv 2311.12022). The order of the choices follows from the seed."""

    name, hub = "gpqa-diamond", HubData("Idavidrein/gpqa", "gpqa_diamond", "train")

    def problem(self, where: str, row: Row, seed: int) -> Problem:
        question, correct = self.text(where, row, "Question"), self.text(where, row, "Correct Answer")
        choices = [correct, *(self.text(where, row, f"Incorrect Answer {i}") for i in (1, 2, 3))]
        order = random.Random(f"{seed}/{question}").sample(range(4), 4)
        return self.lettered(where, question, [choices[i] for i in order], order.index(0), "")


class MMLU(Choice):
    """14 042 questions of 57 subjects (arXiv 2009.03300), without examples, as in simple-evals."""

    name, hub = "mmlu", HubData("cais/mmlu", "all")
    columns = ("question", "A", "B", "C", "D", "answer")  # of the published .csv files, one a subject

    def problem(self, where: str, row: Row, seed: int) -> Problem:
        question = self.text(where, row, "question", "Question")
        choices = row["choices"] if row.get("choices") else [self.field(where, row, letter) for letter in "ABCD"]
        answer = self.text(where, row, "answer", "Answer").strip()
        right = int(answer) if answer.isdecimal() else LETTERS.find(answer) if len(answer) == 1 else -1
        subject = row.get("subject") or row.get("Subject") or ""
        return self.lettered(where, question, choices, right, subject)


class MMLUPro(Choice):
    """12 032 questions with up to 10 choices (arXiv 2406.01574); its prompt without the examples, as for R1."""

    name, hub = "mmlu-pro", HubData("TIGER-Lab/MMLU-Pro")
    judge = 'letter after "answer is"'

    def problem(self, where: str, row: Row, seed: int) -> Problem:
        question, subject = self.text(where, row, "question"), row.get("category") or ""
        options, answer = self.field(where, row, "options"), self.text(where, row, "answer")
        options = [str(option).strip() for option in options if option != "N/A"] if isinstance(options, list) else []
        if not 2 <= len(options) <= len(LETTERS) or answer not in LETTERS[: len(options)]:
            raise UserError(f"{where}: options is no list of up to 10 choices with {answer!r} among them; correct it")
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))
        asked = (
            f"{PRO_INSTRUCTION.format(subject=subject or 'various subjects')}\n\n\n"
            f"Question:\n{question}\nOptions:\n{listed}\nAnswer: Let's think step by step."
        )
        return self.made(where, asked, answer, subject, choices=options)

    def answer(self, problem: Problem, prompt: str, text: str) -> str | None:
        said = reply(text) or ""
        for form in PRO_ANSWERS:
            if found := form.search(said):
                return found[found.re.groups]
        return None
