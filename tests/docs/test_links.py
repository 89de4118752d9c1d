"""Links and file names in the documentation lead somewhere."""

import re

import pytest

from helpers.pages import PAGES, ROOT, identify, prose, spans

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)+\.(?:py|md|toml|cpp|h|sh|json|png|svg)|[\w-]+/(?:[\w-]+/)+")
MADE = ("runs/", "models/", "checkpoints/", "my/", "figures/", "student/", "tokenizer/")  # by a run
BASES = ("", "src/rorqual/", "docs/")


def slug(heading: str) -> str:
    """As GitHub and MkDocs make it."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", text))


def headings(page):
    return {slug(line.lstrip("#")) for line in prose(page).splitlines() if re.match(r"#+ ", line)}


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_fences_close(page):
    """Text right after the marks of a closing fence does not close it: the rest of the page would be code."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            assert not inside or line == "```", f"{identify(page)}, line {number}: {line} does not close the block"
            inside = not inside
    assert not inside, f"{identify(page)}: its last block is not closed"


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_links_lead_to_files_and_headings(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page if not name else (page.parent / name).resolve()
        assert path.exists(), f"{identify(page)}: {target} does not exist"
        if anchor:
            assert anchor in headings(path), f"{identify(page)}: {target}: there is no such heading"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=identify)
def test_files_that_are_named_exist(page):
    for span in spans(page):
        if not PATH.fullmatch(span) or span.startswith(MADE) or "NAME" in span or "step-N" in span:
            continue
        assert any((ROOT / base / span).exists() for base in BASES), f"{identify(page)}: `{span}` does not exist"


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_lines_are_at_most_120_characters(page):
    long = [line for line in prose(page).splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long, f"{identify(page)}: {long[0]}"


def test_the_readme_is_short():
    for name in ("README.md", "README.fr.md"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 120


def test_the_glossary_has_thirty_terms():
    glossary = prose(ROOT / "CONTRIBUTING.md").split("## Glossary")[1].split("\n## ")[0]
    assert len(re.findall(r"^- \*\*", glossary, re.MULTILINE)) == 30


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/*.md"):
        assert re.search(rf"\b{page.name}$", text, re.MULTILINE), f"mkdocs.yml: {page.name} is not in nav"


def test_old_page_names_are_gone():
    for folder in ("src", "benchmarks", "recipes", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".toml", ".md") and "docs/" in (text := path.read_text()):
                for name in re.findall(r"docs/[\w-]+\.md", text):
                    assert (ROOT / name).exists(), f"{path.relative_to(ROOT)}: {name} does not exist"
