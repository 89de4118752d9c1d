"""Extract the Python function from a completion. The text is only parsed here, never run."""

import ast
import re
import textwrap
from collections.abc import Iterator

OPENING = re.compile(r"(.*?)(`{3,}|~{3,})[ \t]*(\{?\.?[\w+#.-]*\}?)[^`\n]*")
PYTHON = {"", "python", "python3", "py", "py3", "python2", "python-3", "ipython", "python3.11", "python3.12"}
# Where a base model's continuation ends the function (Codex paper, §2.1).
STOPS = re.compile(r"\n(?:class |def |#|if |print\(|@|```|~~~|<)")
CODE = re.compile(r"(?:import|from|def|async def|class)\s|@\w")
LONGEST = 100_000  # characters that are parsed


def function(prompt: str, text: str, name: str) -> str:
    """A program that defines `name`, from HumanEval's `prompt` (imports, helpers, the function's head and docstring).

    Of fenced blocks (CommonMark §4.5) it is the last that defines `name`, with the definitions of the blocks before it;
    if none does, the last that continues the prompt. Without a fence it is the function where it begins a line, else
    the continuation of the prompt. Statements that only try the function out (asserts, prints, a main block) are
    removed: the benchmark has its own tests. Thinking is skipped; an unclosed one gives no function.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ").lstrip("\ufeff")
    if "<think>" in text and "</think>" not in text:
        return ""
    text = text.rpartition("</think>")[2]
    blocks = list(_blocks(text))
    head = prompt[: prompt.rindex(f"def {name}(")]
    defines = re.compile(rf"^(?:def\s+{name}\s*\(|{name}\s*(?::[^=\n]*)?=)", re.MULTILINE)
    last = max((i for i, block in enumerate(blocks) if defines.search(block)), default=None)
    if last is not None:
        before = [_definitions(block, name) for block in blocks[:last] if _parses(block)]
        return "\n".join([head, *before, _definitions(blocks[last], name)])
    if blocks:
        bodies = [code for block in reversed(blocks) if (code := _continued(prompt, block)) is not None]
        return bodies[0] if bodies else prompt + blocks[-1]
    if defines.search(text):
        return head + "\n" + _definitions(_from_prose(text), name)
    stop = STOPS.search(text)
    body = text[: stop.start()] if stop else text
    return _continued(prompt, body) or prompt + body


def _blocks(text: str) -> Iterator[str]:
    """The contents of fenced blocks that may be Python, dedented by the indentation of their fence."""
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        match = OPENING.fullmatch(lines[at])
        at += 1
        if match is None:
            continue
        before, fence, language = match.groups()
        indent = before if before.isspace() else ""
        closing = re.compile(rf"(.*?){fence[0]}{{{len(fence)},}}\s*")
        content = []
        while at < len(lines):
            line = lines[at]
            at += 1
            if ended := closing.fullmatch(line):
                content += [ended[1]] if ended[1].strip() else []
                break
            content.append(line.removeprefix(indent))
        if language.strip("{}.").lower() in PYTHON:
            yield (
                textwrap.dedent("\n".join(content) + "\n") if _begins_definition(content) else "\n".join(content) + "\n"
            )


def _begins_definition(lines: list[str]) -> bool:
    """Whether the first line begins a definition, so that its indentation is the whole block's."""
    first = next((line for line in lines if line.strip()), "")
    return CODE.match(first.strip()) is not None


def _definitions(code: str, name: str) -> str:
    """Code without the top-level statements that only try `name` out; unchanged where it does not parse."""
    tree = _parsed(code)
    if tree is None:
        return code
    kept, lines = [], code.split("\n")
    for node in tree.body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        if not _tries_out(node, name):
            kept.append("\n".join(lines[first - 1 : node.end_lineno]))
    return "\n".join(kept) + "\n"


def _tries_out(node: ast.stmt, name: str) -> bool:
    """Whether a top-level statement only calls, tests or prints."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Import() | ast.ImportFrom():
            return False
        case ast.Assert():
            return True
        case ast.Assign(targets=[ast.Name(id=target)]) | ast.AnnAssign(target=ast.Name(id=target)) if target == name:
            return False
    used = {found.id for found in ast.walk(node) if isinstance(found, ast.Name)}
    return bool(used & {name, "print", "input", "__name__", "doctest", "unittest"})


def _continued(prompt: str, body: str) -> str | None:
    """The prompt with the body, re-indented where needed; None where nothing parses."""
    body = body.strip("\n")
    shifted = textwrap.indent(textwrap.dedent(body), "    ")
    for code in (prompt + body + "\n", prompt + shifted + "\n", prompt + "    " + body.lstrip() + "\n"):
        if body.strip() and _parses(code) and (code != prompt + body + "\n" or body[:1].isspace()):
            return code
    return None


def _from_prose(text: str) -> str:
    """The lines of code from the first one to where prose begins again."""
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if CODE.match(line) or re.match(r"\w+\s*=", line))
    end = start
    while end < len(lines) and (not lines[end] or lines[end][0] in " \t)]}#@" or _begins(lines[end])):
        end += 1
    return "\n".join(lines[start:end]) + "\n"


def _begins(line: str) -> bool:
    return CODE.match(line) is not None or re.match(r"\w+\s*(?::[^=]*)?=(?!=)", line) is not None


def _parses(code: str) -> bool:
    return _parsed(code) is not None


def _parsed(code: str) -> ast.Module | None:
    if len(code) > LONGEST:
        return None
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
