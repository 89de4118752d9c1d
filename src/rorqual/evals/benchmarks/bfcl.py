"""Berkeley Function-Calling Leaderboard: single-turn calls in Python, and none where no function fits."""

import ast
import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from rorqual.data.chat_messages import read_messages, read_tools
from rorqual.data.chat_template import ChatTemplate
from rorqual.data.tool_formats import FORMATS, as_object
from rorqual.errors import UserError
from rorqual.evals.benchmarks.benchmark import Benchmark, reply
from rorqual.evals.benchmarks.call_check import Call, calls_match
from rorqual.evals.benchmarks.sources import HubData, Row, Rows, read_rows
from rorqual.rl.envs.environment import Problem
from rorqual.rl.prompts import Template
from rorqual.tokenizer_protocol import Tokenizer

CATEGORIES = (
    "simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance",
)  # fmt: skip
# JSON schema's names of the published types (bfcl_eval/constants/type_mappings.py).
SCHEMA = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
FILE = re.compile(r"(?:BFCL|gorilla_openfunctions)_v\d+_(?:test_)?(.+?)\.jsonl?")


class BFCL(Benchmark):
    """The categories simple (Python), multiple, parallel, parallel multiple and irrelevance, with their live ones.

    The functions are given through the model's chat template, in JSON schema and with _ for the dots of their names, as
    BFCL gives them to models with function calling; messages are the published ones. data: the package's folder
    `data`, or one of its files beside a folder `possible_answer`.
    """

    name, package = "bfcl", "bfcl_eval"
    hub = HubData("gorilla-llm/Berkeley-Function-Calling-Leaderboard", files="*BFCL_v*.json")
    judge = "accepted calls (AST)"
    second_judge = "the same calls, written as Python"

    def __init__(self, data: str | None = None, categories: object = None) -> None:
        super().__init__(data)
        chosen = [categories] if isinstance(categories, str) else categories or list(CATEGORIES)
        for category in chosen if isinstance(chosen, list) else [chosen]:
            if category not in CATEGORIES:
                raise UserError(f"bfcl: category {category!r} is unknown; use {', '.join(CATEGORIES)}")
        self.categories = cast("list[str]", chosen)

    def packaged(self) -> Rows:
        found = find_spec("bfcl_eval")
        if found is None or found.origin is None:
            raise UserError(
                "bfcl: the Python package bfcl_eval, which carries its data, is missing; run: pip install --no-deps "
                f"bfcl-eval (it needs old versions of numpy and others, but only for its own program), or {self.remedy}"
            )
        return self.local(str(Path(found.origin).with_name("data")))

    def local(self, path: str) -> Rows:
        files = sorted(Path(path).glob("*BFCL_v*.json")) if os.path.isdir(path) else [Path(path)]
        found = [(file, _category(file)) for file in files]
        if os.path.isdir(path) and not any(category in self.categories for _, category in found):
            raise UserError(f"{path} has no BFCL_v*_CATEGORY.json of {', '.join(self.categories)}; give BFCL's folder")
        for file, category in sorted(found, key=lambda pair: CATEGORIES.index(pair[1]) if pair[1] in CATEGORIES else 0):
            if category in self.categories:
                yield from self._category_rows(file, category)
            elif not os.path.isdir(path):
                raise UserError(f"{file} is no file of BFCL's categories {', '.join(self.categories)}; keep its name")

    def _category_rows(self, file: Path, category: str) -> Rows:
        accepted: dict[str, Any] = {}
        if "irrelevance" not in category:
            beside = file.parent / "possible_answer" / file.name
            if not beside.is_file():
                raise UserError(f"{beside} does not exist; the accepted calls of {file.name} are published there")
            for where, row in read_rows(str(beside)):
                accepted[self.text(where, row, "id")] = self.field(where, row, "ground_truth")
        for where, row in read_rows(str(file)):
            name = self.text(where, row, "id")
            if "irrelevance" not in category and name not in accepted:
                raise UserError(f"{where}: possible_answer has no {name}; give both files of one version")
            yield where, {**row, "category": category, "ground_truth": accepted.get(name, [])}

    def problem(self, where: str, row: Row, seed: int) -> Problem:
        turns, functions = self.field(where, row, "question"), self.field(where, row, "function")
        if not (isinstance(turns, list) and len(turns) == 1) or not isinstance(functions, list):
            raise UserError(f"{where}: question is no list of one turn, or function no list; give the published file")
        for function in functions:
            if not isinstance(function, dict) or not isinstance(function.get("parameters"), dict):
                raise UserError(f"{where}: a function has no parameters; give the published file")
        functions = [{**f, "name": _name(self.text(where, f, "name"))} for f in functions]
        accepted = [{_name(n): values for n, values in call.items()} for call in row["ground_truth"]]
        asked = json.dumps([turns[0], functions], ensure_ascii=False)
        return self.made(
            where, asked, json.dumps(accepted), row["category"], messages=turns[0], functions=functions,
            accepted=accepted,
        )  # fmt: skip

    def prompt(self, problem: Problem, tokenizer: Tokenizer, template: Template) -> str:
        if template != "chat":
            raise UserError(f"template = {template!r}: bfcl gives functions through a chat template; use chat")
        functions = cast("list[dict[str, Any]]", problem.metadata["functions"])
        tools = [{"type": "function", "function": {**f, "parameters": schema(f["parameters"])}} for f in functions]
        messages = read_messages(problem.metadata["messages"], f"{problem.where}: question")
        return ChatTemplate(tokenizer).render(messages, read_tools(tools, f"{problem.where}: function"))

    def answer(self, problem: Problem, prompt: str, text: str) -> str | None:
        """The calls as JSON, [] where there are none."""
        said = reply(text)
        return None if said is None else json.dumps(read_calls(said, _names(problem)), ensure_ascii=False)

    def score(self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]) -> list[bool]:
        return [a is not None and _right(p, json.loads(a)) for p, a in zip(problems, answers, strict=True)]

    def second_score(
        self, problems: Sequence[Problem], texts: Sequence[str], answers: Sequence[str | None]
    ) -> list[bool]:
        """Calls as BFCL asks models without function calling for them, `[name(parameter=value)]`, else as before."""
        verdicts: list[bool] = []
        for problem, text, answer in zip(problems, texts, answers, strict=True):
            written = python_calls(reply(text) or "")
            calls = json.loads(answer or "[]") if written is None else written
            verdicts.append(answer is not None and _right(problem, calls))
        return verdicts


def _right(problem: Problem, calls: Sequence[Sequence[Any]]) -> bool:
    accepted = cast("list[dict[str, Any]]", problem.metadata["accepted"])
    functions = cast("list[dict[str, Any]]", problem.metadata["functions"])
    made: list[Call] = [(_name(name), arguments) for name, arguments in calls]
    return not made if "irrelevance" in problem.difficulty else calls_match(made, accepted, functions)


def read_calls(text: str, names: set[str]) -> list[tuple[str, dict[str, Any]]]:
    """The calls of a reply, in whichever of the known formats it has; those of unknown functions count too."""
    for form in FORMATS:
        starts = [at for mark in form.opens if (at := text.find(mark)) >= 0]
        if form.bare and text.lstrip()[:1] != "{" and "<|python_tag|>" not in text:
            continue
        at, found = min(starts, default=-1), []
        while at >= 0 and (read := form.read(text[at:], names)) is not None:
            found += read[0]
            following = [n for mark in form.opens if (n := text.find(mark, at + read[1])) >= 0]
            at = min(following, default=-1)
        if found:
            return [(call.name, as_object(call.arguments) or {}) for call in found]
    return []


def python_calls(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """The calls of a reply that is a Python list of them; None where it is not."""
    text = re.sub(r"^```\w*\n|\n?```$", "", text.strip()).strip()
    try:
        body = ast.parse(text if text.startswith("[") else f"[{text}]", mode="eval").body
        if not isinstance(body, ast.List) or not body.elts:
            return None
        return [_written(call) for call in body.elts]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _written(call: ast.expr) -> tuple[str, dict[str, Any]]:
    """A call with keyword arguments that are literals. Raises ValueError for anything else."""
    if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
        raise ValueError("no call with keyword arguments")
    return _name(ast.unparse(call.func)), {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}


def schema(described: Mapping[str, Any]) -> dict[str, Any]:
    """A published parameter description as JSON schema."""
    out = copy.deepcopy(dict(described))
    kind = out.get("type", "string")
    out["type"] = SCHEMA.get(kind, kind)
    if kind == "float":
        out["format"] = "float"
        out["description"] = f"{out.get('description', '')} This is a float type value.".strip()
    if isinstance(out.get("properties"), dict):
        out["properties"] = {name: schema(inner) for name, inner in out["properties"].items()}
    if isinstance(out.get("items"), dict):
        out["items"] = schema(out["items"])
    return out


def _category(file: Path) -> str:
    found = FILE.fullmatch(file.name)
    category = found[1] if found else ""
    return "simple_python" if category == "simple" else category  # its name before version 4


def _name(name: str) -> str:
    return name.replace(".", "_")


def _names(problem: Problem) -> set[str]:
    return {str(f["name"]) for f in cast("list[dict[str, Any]]", problem.metadata["functions"])}
