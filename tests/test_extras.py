"""Which packages are needed for what, and the sentence where one is missing."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rorqual.checkpoint.gguf_import import import_model
from rorqual.errors import UserError
from rorqual.extras import EXTRAS, require

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HERE = {"rorqual", "build", "jaxtyping"}  # jaxtyping: only where tests have imported it (rorqual/shapes.py)
# Of what we depend on, and brought by it.
BROUGHT = {
    "huggingface_hub": "transformers",
    "starlette": "fastapi",
    "mpmath": "torch",  # by way of sympy
    "triton": "torch",  # of builds for GPUs
    "pydantic_core": "pydantic",
}


def names(requirements):
    return {re.match(r"[\w-]+", text)[0].replace("-", "_") for text in requirements}


def imported():
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                yield file, module.partition(".")[0]


def test_every_import_is_a_dependency_or_in_an_extra():
    known = names(PROJECT["dependencies"]) | {package for packages in EXTRAS.values() for package in packages}
    for file, module in imported():
        if module not in sys.stdlib_module_names and module not in HERE:
            assert BROUGHT.get(module, module) in known, f"{file}: {module}"


def test_the_table_is_that_of_the_project():
    extras = PROJECT["optional-dependencies"]
    assert {extra: set(packages) for extra, packages in EXTRAS.items()} == {
        extra: names(extras[extra]) for extra in EXTRAS
    }
    assert len(PROJECT["dependencies"]) <= 10


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("rorqual.extras.find_spec", lambda name: None if name == "gradio" else object())
    require("rl")
    with pytest.raises(UserError, match=r"gradio is missing; run: pip install 'rorqual\[serve\]'"):
        require("serve")


def test_a_model_is_loaded_and_generates_without_any_extra(tmp_path):
    import_model("smollm2", smollm2 := tmp_path / "smollm2")
    blocked = sorted({package for packages in EXTRAS.values() for package in packages})
    code = f"""
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocked())
from rorqual.engine import Engine, SamplingParams
params = SamplingParams(temperature=0, max_tokens=4)
print(Engine({str(smollm2)!r}).generate(["The capital of France is"], params)[0].text)
assert "torch._dynamo" not in sys.modules, "it takes seconds to import, and is for torch.compile"
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "Paris" in found.stdout
