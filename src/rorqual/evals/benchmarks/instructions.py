"""The 25 verifiable instructions of IFEval (arXiv 2311.07911, table 1), each as a function of a response.

Written from the paper and the behaviour of the published verifiers. Two parts of those are not used: NLTK's sentence
splitter, whose data are a pickle (`sentences` splits by rules), and NLTK's words (`words_in_capitals`).
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from rorqual.extras import require

Arguments = Mapping[str, Any]
# (response, arguments of the instruction) → whether it is followed
Verifier = Callable[[str, Arguments], bool]

ABBREVIATIONS = {
    "mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "etc", "e.g", "i.e", "cf", "fig", "no", "inc", "ltd",
    "co", "corp", "gen", "col", "capt", "lt", "sgt", "rep", "sen", "gov", "approx", "dept", "est", "u.s", "u.k", "ph.d",
    "a.m", "p.m", "al", "ave", "blvd", "mt",
}  # fmt: skip
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def sentences(text: str) -> int:
    """How many sentences a text has: they end in . ! or ? before white space, but not after an abbreviation."""
    count = 0
    start = 0
    for end in re.finditer(r"[.!?]+[\"'”’)\]]*(?=\s|$)", text):
        last = text[start : end.start()].split()
        word = last[-1].lstrip("(\"'“[") if last else ""
        more = text[end.end() :].strip()
        initial = len(word) == 1 and word.isupper() and word != "I"
        if end[0] == "." and more and (word.lower() in ABBREVIATIONS or initial):
            continue
        count += bool(text[start : end.end()].strip())
        start = end.end()
    return count + bool(text[start:].strip())


def words_in_capitals(text: str) -> int:
    """Words whose letters are all capital, as I and A are."""
    return sum(word.isupper() for word in re.findall(r"[^\s.,;:!?()\[\]{}\"“”`…]+", text))


def language(text: str) -> str | None:
    """The language that langdetect, the published judge's library, finds; None where it finds none."""
    require("eval", "langdetect")
    import langdetect

    langdetect.DetectorFactory.seed = 0  # it draws features at random otherwise
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return None


def related(count: int, relation: str, wanted: int) -> bool:
    """`relation` is "less than" or "at least"."""
    return count < wanted if relation == "less than" else count >= wanted


def _frequency(text: str, given: Arguments) -> bool:
    found = len(re.findall(re.escape(given["keyword"]), text, re.IGNORECASE))
    return related(found, given["relation"], given["frequency"])


def _language(text: str, given: Arguments) -> bool:
    found = language(text)
    return found is None or found == given["language"]


def _paragraphs(text: str, given: Arguments) -> bool:
    """Paragraphs are separated by ***; only the first and the last may be empty, and do not count then."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if not all(part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == given["num_paragraphs"]


def _first_word(text: str, given: Arguments) -> bool:
    """Paragraphs are separated by empty lines here."""
    parts = text.split("\n\n")
    count, nth = sum(bool(part.strip()) for part in parts), given["nth_paragraph"]
    if nth > count or not (words := parts[nth - 1].split()):
        return False
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'), maxsplit=1)[0]
    return count == given["num_paragraphs"] and word.lower() == given["first_word"].lower()


def _postscript(text: str, given: Arguments) -> bool:
    marker = given["postscript_marker"]
    forms = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    form = forms[marker] if marker in forms else re.escape(marker.lower())
    return re.search(form, text.lower()) is not None


def _bullets(text: str, given: Arguments) -> bool:
    starred = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    return len(starred) + len(re.findall(r"^\s*-.*$", text, re.MULTILINE)) == given["num_bullets"]


def _highlights(text: str, given: Arguments) -> bool:
    single = [part.strip("*") for part in re.findall(r"\*[^\n\*]*\*", text)]
    double = [part.removeprefix("**").removesuffix("**") for part in re.findall(r"\*\*[^\n\*]*\*\*", text)]
    return sum(bool(part.strip()) for part in single + double) >= given["num_highlights"]


def _sections(text: str, given: Arguments) -> bool:
    return len(re.findall(rf"\s?{re.escape(given['section_spliter'])}\s?\d+\s?", text)) >= given["num_sections"]


def _json(text: str, given: Arguments) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, given: Arguments) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str, given: Arguments) -> bool:
    parts = text.split("******")
    full = [part.strip() for part in parts if part.strip()]
    return all(part.strip() for part in parts[1:-1]) and len(full) == 2 and full[0] != full[1]


def _in_english(text: str) -> bool:
    return language(text) in (None, "en")


VERIFIERS: dict[str, Verifier] = {
    "keywords:existence": lambda t, a: all(re.search(re.escape(word), t, re.IGNORECASE) for word in a["keywords"]),
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": lambda t, a: (
        not any(re.search(rf"\b{re.escape(word)}\b", t, re.IGNORECASE) for word in a["forbidden_words"])
    ),
    "keywords:letter_frequency": lambda t, a: related(
        t.lower().count(a["letter"].lower()), a["let_relation"], a["let_frequency"]
    ),
    "language:response_language": _language,
    "length_constraints:number_sentences": lambda t, a: related(sentences(t), a["relation"], a["num_sentences"]),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda t, a: related(
        len(re.findall(r"\w+", t)), a["relation"], a["num_words"]
    ),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda t, a: len(re.findall(r"\[.*?\]", t)) >= a["num_placeholders"],
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda t, a: any(said in t for said in CONSTRAINED),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda t, a: t.strip().lower().startswith(a["prompt_to_repeat"].strip().lower()),
    "startend:end_checker": lambda t, a: t.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower()),
    "startend:quotation": lambda t, a: len(t.strip()) > 1 and t.strip()[0] == t.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda t, a: related(
        words_in_capitals(t), a["capital_relation"], a["capital_frequency"]
    ),
    "change_case:english_capital": lambda t, a: t.isupper() and _in_english(t),
    "change_case:english_lowercase": lambda t, a: t.islower() and _in_english(t),
    "punctuation:no_comma": lambda t, a: "," not in t,
}  # fmt: skip
# The arguments that each needs.
NEEDS: dict[str, tuple[str, ...]] = {
    "keywords:existence": ("keywords",),
    "keywords:frequency": ("keyword", "relation", "frequency"),
    "keywords:forbidden_words": ("forbidden_words",),
    "keywords:letter_frequency": ("letter", "let_relation", "let_frequency"),
    "language:response_language": ("language",),
    "length_constraints:number_sentences": ("relation", "num_sentences"),
    "length_constraints:number_paragraphs": ("num_paragraphs",),
    "length_constraints:number_words": ("relation", "num_words"),
    "length_constraints:nth_paragraph_first_word": ("num_paragraphs", "nth_paragraph", "first_word"),
    "detectable_content:number_placeholders": ("num_placeholders",),
    "detectable_content:postscript": ("postscript_marker",),
    "detectable_format:number_bullet_lists": ("num_bullets",),
    "detectable_format:number_highlighted_sections": ("num_highlights",),
    "detectable_format:multiple_sections": ("section_spliter", "num_sections"),
    "combination:repeat_prompt": ("prompt_to_repeat",),
    "startend:end_checker": ("end_phrase",),
    "change_case:capital_word_frequency": ("capital_relation", "capital_frequency"),
}
# Those that ask for a language.
LANGUAGES = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}
