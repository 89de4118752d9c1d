"""Where the answer stands in what a model wrote. Rewards, evaluations and curves all read it here.

Only what follows the thinking counts: thinking that was begun must be ended, once. There the answer is the first of:
what stands in `<answer>…</answer>`, of which there must be exactly one; the last \\boxed{…}, with those joined to it by
"and", "or" or a comma; what follows the last ####; what follows the last "the answer is" or "Answer:"; and, in a reply
that names none, the last number or formula where the right answer is one, the text in bold in the last line, or the
reply itself where it is hardly longer than the right answer. Several numbers joined by "or", "and" or "to" are one
answer, and not any of them.
"""

import re

from rorqual.judge.judge import NUMBER, final_answer, is_mathematics, is_value
from rorqual.judge.notation import boxes, unwrap
from rorqual.judge.units import SCALES

END = 2000  # characters of a reply in which an answer without a tag is looked for
OPEN, CLOSE = "<think>", "</think>"
BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
JOINED = re.compile(r"[\s$\\()]*(?:,|;|,?\s*\b(?:and|or)\b|\\text\{\s*(?:and|or)\s*\})[\s$\\()]*")
SAID = re.compile(
    r"(?:\banswer\b[^.\n:=\"]{0,40}?(?:\bis\b|\bare\b|[:=：])|答案(?:是|为|：|:))(?:\s*(?:therefore|thus|simply|just|:))*\s*",
    re.IGNORECASE,
)
AFTER = rf"(?:\s?%|\s(?:{'|'.join(SCALES)})\b)?"
VALUE = rf"(?:[-+−–]\s?)?(?:[$€£¥₹]\s?)?(?:(?:{NUMBER})(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?){AFTER}"
SEVERAL = re.compile(
    rf"(?<![\w.,]){VALUE}(?:\s*,\s*{VALUE}){{0,20}}\s*,?\s*(?:\bor\b|\band\b|\bto\b|–)\s*{VALUE}(?![\w])"
)
ONE = re.compile(rf"(?<![\w.,/^])(?<!\\frac)(?<!\d\s)(?:\d+\s+(?=\d+/))?{VALUE}")
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\\w])\$([^$\n]+?)(?<!\\)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
BOLD = re.compile(r"\*\*([^*]+)\*\*")
NOT = re.compile(r"\s*(?:not|n't|between|neither|unknown|unclear|either)\b", re.IGNORECASE)


def read_answer(text: str, right: str) -> str | None:
    """The answer in a completion, None where it gives none.

    text: what the model wrote, with the `<think>` that the prompt opened. right: the right answer, by which a reply in
    prose is read for a number or for words; what is read is not made more like it.
    """
    thinking, closed, said = text.partition(CLOSE)
    if not closed:
        if OPEN in thinking:
            return None
        said = thinking
    elif CLOSE in said or OPEN in said:
        return None
    if "<answer>" in said or "</answer>" in said:
        found = BLOCK.findall(said)
        once = said.count("<answer>") == said.count("</answer>") == 1
        return found[0].strip() if len(found) == 1 and once else None
    return _in_a_reply(said.strip(), final_answer(right))


def _in_a_reply(said: str, right: str) -> str | None:
    if found := boxes(said):
        first = len(found) - 1
        while first and JOINED.fullmatch(said[found[first - 1][1] : found[first][0]]):
            first -= 1
        return ", ".join(content.strip() for _, _, content in found[first:])
    if "####" in said:
        return said.rpartition("####")[2].strip().partition("\n")[0].strip() or None
    said = said[-END:]
    mathematics = is_mathematics(right)
    if phrases := list(SAID.finditer(said)):
        rest = said[phrases[-1].end() :].lstrip(" \t\r\n:_")
        if rest.startswith("**") and rest.partition("\n")[0].count("**") % 2:  # the end of **Answer:**
            rest = rest[2:].lstrip()
        phrase = _sentence(rest.partition("\n")[0])
        if phrase and not mathematics:
            return _bold_first(phrase)
        if phrase and (value := _value_first(phrase)):
            return value
    if mathematics:
        return said if "\n" not in said and is_value(said) else _last_value(said)
    last = said.rpartition("\n")[2].strip()
    if bold := BOLD.findall(last):
        return unwrap(bold[-1])
    return said if said and len(said.split()) <= len(right.split()) + 2 else None


def _sentence(text: str) -> str:
    """Up to the end of the first sentence; a full stop within a number or a name is none."""
    return re.split(r"(?<=[\w)}\]$*\"'%])[.!?](?=\s|$|\*)(?<!\bMr\.)(?<!\bDr\.)(?<!\bSt\.)", text, maxsplit=1)[
        0
    ].strip()


def _bold_first(phrase: str) -> str:
    """What begins in bold ends there: "**blue** because …"."""
    match = BOLD.match(phrase)
    return unwrap(match[1] if match else phrase.strip(" *"))


def _value_first(phrase: str) -> str | None:
    """The value that a phrase after "the answer is" gives: what follows its last =, else its first formula or number.

    A phrase that denies or leaves open is given back as it is, and equals nothing.
    """
    phrase = unwrap(phrase)
    if NOT.match(phrase) or is_value(phrase):
        return phrase
    formulas = [next(filter(None, match.groups())) for match in FORMULA.finditer(phrase)]
    if formulas:
        together = JOINED.fullmatch(re.sub(r"\S+", ",", FORMULA.sub("", phrase)).strip() or "x")
        if len(formulas) > 1 and together:
            return ", ".join(formulas)
        return _after_equals(formulas[0])
    phrase = _after_equals(phrase)
    if several := SEVERAL.search(phrase):
        return several[0]
    first = ONE.search(phrase)
    if first is None:
        return phrase
    prose = re.search(r"[A-Za-z]{2}", phrase[: first.start()] + phrase[first.end() :]) is not None
    return first[0] if prose or first[0] == phrase else phrase


def _last_value(said: str) -> str | None:
    """The last formula or number of a reply."""
    last = said.rpartition("\n")[2]
    if bold := [b for b in BOLD.findall(last) if ONE.search(b) or FORMULA.search(b)]:
        value = _value_first(_sentence(unwrap(bold[-1])))
        if value:
            return value
    formulas = list(FORMULA.finditer(said))
    rest = said[formulas[-1].end() :] if formulas else said
    several, ones = list(SEVERAL.finditer(rest)), list(ONE.finditer(rest))
    if several and ones and several[-1].end() >= ones[-1].end():
        return several[-1][0]
    if ones:
        return ones[-1][0]
    return _after_equals(next(filter(None, formulas[-1].groups()))) if formulas else (said if _short(said) else None)


def _after_equals(text: str) -> str:
    """Behind the last = of an equation that ends in a value."""
    _, equals, value = text.rpartition("=")
    return value.strip(" *") if equals and value.strip(" *") and not re.search(r"[<>≤≥]|\\[lg]e", text) else text


def _short(said: str) -> bool:
    return bool(said) and "\n" not in said and len(said.split()) <= 3
