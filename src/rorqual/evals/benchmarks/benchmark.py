"""What all published benchmarks share: their data, and problems chosen by a seed."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from rorqual.errors import UserError
from rorqual.evals.benchmarks.sources import HubData, Row, Rows, hub_folder, hub_rows, is_hub_name, read_rows
from rorqual.rl.envs.environment import Problem
from rorqual.rl.prompts import Template, prompt_text
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.unicode_checks import whole_inside

# Of one completion: published metrics beside pass@1, each as (points, out of how many).
Parts = dict[str, tuple[int, int]]


class Benchmark(ABC):
    """A published benchmark as a task (`evals.tasks.Task`). `Problem.question` is the user's message.

    data: a local path in the published format, or a name on the Hub; by default the package that carries the data where
    there is one, else the published name on the Hub. Raises UserError, with file and line, for data that are not of
    this format.
    """

    name: str
    judge: str  # in a few words, for tables
    second_judge: str  # what `rorqual eval --audit` compares it with
    hub: HubData | None
    package: str | None = None  # an extra's package with the data
    columns: tuple[str, ...] = ()  # of a .csv file without a line of names
    attempts: int = 1  # pass@k with this k is the published score
    split: str = "all"

    def __init__(self, data: str | None = None) -> None:
        self.data = data
        self._rows: list[tuple[str, Row]] | None = None

    @abstractmethod
    def problem(self, where: str, row: Row, seed: int) -> Problem:
        """The problem of a row. seed: of what is random in it, such as the order of choices."""

    @abstractmethod
    def answer(self, problem: Problem, prompt: str, text: str) -> str | None:
        """The answer that a finished completion votes for; None where it has none."""

    @abstractmethod
    def score(self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]) -> list[bool]:
        """Whether each completion solves its problem, by the published judge."""

    @abstractmethod
    def second_score(
        self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]
    ) -> list[bool]:
        """The same by `second_judge`."""

    def problems(self, n: int, seed: int) -> list[Problem]:
        """All in the data's order, or a random `n` of them chosen by `seed`."""
        rows = self.rows()
        chosen = rows if n >= len(rows) else random.Random(seed).sample(rows, n)
        return [self.problem(where, row, seed) for where, row in chosen]

    def prompt(self, problem: Problem, tokenizer: Tokenizer, template: Template) -> str:
        return prompt_text(problem.question, template, tokenizer)

    def parts(self, problem: Problem, text: str) -> Parts:
        """Published metrics of a completion beside pass@1."""
        return {}

    def rows(self) -> list[tuple[str, Row]]:
        """All rows of the data, with file and line. They are read once."""
        if self._rows is None:
            rows = list(self.wanted(self.read()))
            if not rows:
                raise UserError(f"{self.source} has no problem for {self.name}; give its published data")
            for where, row in rows:
                if not whole_inside(dict(row)):
                    raise UserError(f"{where} contains a lone surrogate (half a character); correct it")
            self._rows = rows
        return self._rows

    def wanted(self, rows: Rows) -> Iterable[tuple[str, Row]]:
        """The rows that belong to the benchmark."""
        return rows

    def read(self) -> Rows:
        """The rows of `data`, of the package or of the Hub, whichever comes first."""
        if self.data is not None and not is_hub_name(self.data):
            return self.local(self.data)
        if self.data is None and self.package is not None:
            return self.packaged()
        hub = self.hub if self.data is None else HubData(self.data, split=self.hub.split if self.hub else "test")
        if hub is None:
            raise UserError(self.remedy)
        remedy = self.remedy
        return hub_rows(hub, remedy) if hub.files is None else self.local(str(hub_folder(hub, remedy)))

    def local(self, path: str) -> Rows:
        """The rows of a file, or of a folder where the benchmark is published as one."""
        return read_rows(path, self.columns)

    def packaged(self) -> Rows:
        """The rows that the package carries."""
        raise NotImplementedError

    @property
    def source(self) -> str:
        """Where the data are read from."""
        return self.data or self.package or (self.hub.name if self.hub else "")

    @property
    def remedy(self) -> str:
        return f"give a local file of the published data: --data {self.name}=PATH"

    def field(self, where: str, row: Row, *names: str) -> Any:
        """The value of the first of `names` that a row has; never null. Raises UserError where it has none."""
        for name in names:
            if row.get(name) is not None:
                return row[name]
        raise UserError(
            f"{where}: field {names[0]} is missing (there are {', '.join(sorted(map(str, row)))}); "
            f"{self.name} reads the published format{f' of {self.hub.name}' if self.hub else ''}"
        )

    def text(self, where: str, row: Row, *names: str) -> str:
        """The same, as text."""
        value = self.field(where, row, *names)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise UserError(f"{where}: field {names[0]} is a {type(value).__name__}, not text; correct it")
        if not str(value).strip():
            raise UserError(f"{where}: field {names[0]} is empty; add it")
        return str(value)

    def made(self, where: str, question: str, answer: str, difficulty: object = "", **metadata: object) -> Problem:
        """A problem of this benchmark."""
        return Problem(question, answer, question, str(difficulty), self.name, where, metadata)


def reply(text: str) -> str | None:
    """What follows the thinking; None where thinking has begun and not ended."""
    thinking, closed, rest = text.partition("</think>")
    if closed:
        return rest.strip()
    return None if "<think>" in thinking else text.strip()
