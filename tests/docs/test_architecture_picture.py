"""docs/figures/architecture.svg is what its script draws, and names what there is."""

import importlib.util
import re

from helpers.pages import ROOT

specification = importlib.util.spec_from_file_location("make_architecture", ROOT / "docs" / "make_architecture.py")
make_architecture = importlib.util.module_from_spec(specification)
specification.loader.exec_module(make_architecture)


def words(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_the_picture_is_as_drawn():
    """Its words: coordinates may depend on the version of Matplotlib."""
    now = make_architecture.PICTURE.read_text(encoding="utf-8")
    assert words(now) == words(make_architecture.draw()), "run python docs/make_architecture.py"


def test_files_and_names_exist():
    package = ROOT / "src" / "rorqual"
    source = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    said = " ".join(line for _, lines, _ in make_architecture.TRAINING + make_architecture.SERVING for line in lines)
    for file in re.findall(r"[\w/]+\.py", said):
        assert list(package.rglob(file)), file
    for name in re.findall(r"\b(?:[A-Z][a-z]+[A-Z]\w+|Loader|Batch|Trainer|Optimizer|Scheduler)\b", said):
        assert re.search(rf"^class {name}\b", source, re.MULTILINE), name
