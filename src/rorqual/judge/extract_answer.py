"""Extract the answer from a completion. Used by rewards, evaluations and curves.

Only the text after the thinking counts, and thinking that was opened must be closed exactly once. The answer is the
first of: the content of `<answer>…</answer>`, of which there must be exactly one; the last \\boxed{…}, with those
joined to it by "and", "or" or a comma; the text after the last ####; the text after the last "the answer is" or
"Answer:"; without any of these, the last number or formula where the reference is one, else the bold text of the last
line, or the reply itself where it is hardly longer than the reference. Several numbers joined by "or", "and" or "to"
are one answer together.
"""

import re

from rorqual.judge.judge import NUMBER, final_answer, is_mathematics, is_value
from rorqual.judge.notation import boxes, unwrap
from rorqual.judge.units import SCALES

END = 2000  # characters at the end of a reply that are searched for an answer without a tag
OPEN, CLOSE = "<think>", "</think>"
BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
JOINED = re.compile(r"[\s$\\()]*(?:,|;|,?\s*\b(?:and|or)\b|\\text\{\s*(?:and|or)\s*\})[\s$\\()]*")
ANNOUNCED = re.compile(
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
NEGATED = re.compile(r"\s*(?:not|n't|between|neither|unknown|unclear|either)\b", re.IGNORECASE)


def read_answer(text: str, reference: str) -> str | None:
    """The answer in a completion; None where there is none.

    text: the completion, with the `<think>` that the prompt opened. reference: decides whether a reply in prose is
    searched for a number or for words; it does not change what is extracted.
    """
    reply = _after_thinking(text)
    if reply is None or _is_tagged(reply):
        return reply and _tagged(reply)
    return _in_a_reply(reply.strip(), final_answer(reference))


def final_summary(text: str) -> str | None:
    """All that a completion says after its thinking, without the tags of `<answer>`; None where it says nothing."""
    reply = _after_thinking(text)
    if reply is None or _is_tagged(reply):
        return (reply and _tagged(reply)) or None
    return reply.strip() or None


def _after_thinking(text: str) -> str | None:
    thinking, closed, reply = text.partition(CLOSE)
    if not closed:
        return None if OPEN in thinking else thinking
    return None if CLOSE in reply or OPEN in reply else reply


def _is_tagged(reply: str) -> bool:
    return "<answer>" in reply or "</answer>" in reply


def _tagged(reply: str) -> str | None:
    found = BLOCK.findall(reply)
    once = reply.count("<answer>") == reply.count("</answer>") == 1
    return found[0].strip() if len(found) == 1 and once else None


def _in_a_reply(reply: str, reference: str) -> str | None:
    if found := boxes(reply):
        first = len(found) - 1
        while first and JOINED.fullmatch(reply[found[first - 1][1] : found[first][0]]):
            first -= 1
        return ", ".join(content.strip() for _, _, content in found[first:])
    if "####" in reply:
        return reply.rpartition("####")[2].strip().partition("\n")[0].strip() or None
    reply = reply[-END:]
    mathematics = is_mathematics(reference)
    if phrases := list(ANNOUNCED.finditer(reply)):
        rest = reply[phrases[-1].end() :].lstrip(" \t\r\n:_")
        if rest.startswith("**") and rest.partition("\n")[0].count("**") % 2:  # the end of **Answer:**
            rest = rest[2:].lstrip()
        phrase = _sentence(rest.partition("\n")[0])
        if phrase and not mathematics:
            return _bold_first(phrase)
        if phrase and (value := _value_first(phrase)):
            return value
    if mathematics:
        return reply if "\n" not in reply and is_value(reply) else _last_value(reply)
    last = reply.rpartition("\n")[2].strip()
    if bold := BOLD.findall(last):
        return unwrap(bold[-1])
    return reply if reply and len(reply.split()) <= len(reference.split()) + 2 else None


def _sentence(text: str) -> str:
    """The first sentence; a full stop within a number or a title (Mr., Dr.) does not end it."""
    return re.split(r"(?<=[\w)}\]$*\"'%])[.!?](?=\s|$|\*)(?<!\bMr\.)(?<!\bDr\.)(?<!\bSt\.)", text, maxsplit=1)[
        0
    ].strip()


def _bold_first(phrase: str) -> str:
    """Only the bold text where a phrase begins with it: "**blue** because …"."""
    match = BOLD.match(phrase)
    return unwrap(match[1] if match else phrase.strip(" *"))


def _value_first(phrase: str) -> str | None:
    """The value in a phrase after "the answer is": the text after its last =, else its first formula or number.

    A negated or open phrase is returned unchanged, and equals no reference.
    """
    phrase = unwrap(phrase)
    if NEGATED.match(phrase) or is_value(phrase):
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


def _last_value(reply: str) -> str | None:
    """The last formula or number of a reply; None where it has none and is not short."""
    last = reply.rpartition("\n")[2]
    if bold := [b for b in BOLD.findall(last) if ONE.search(b) or FORMULA.search(b)]:
        value = _value_first(_sentence(unwrap(bold[-1])))
        if value:
            return value
    formulas = list(FORMULA.finditer(reply))
    rest = reply[formulas[-1].end() :] if formulas else reply
    several, ones = list(SEVERAL.finditer(rest)), list(ONE.finditer(rest))
    if several and ones and several[-1].end() >= ones[-1].end():
        return several[-1][0]
    if ones:
        return ones[-1][0]
    return _after_equals(next(filter(None, formulas[-1].groups()))) if formulas else (reply if _short(reply) else None)


def _after_equals(text: str) -> str:
    """The text after the last = of an equation; inequalities unchanged."""
    _, equals, value = text.rpartition("=")
    return value.strip(" *") if equals and value.strip(" *") and not re.search(r"[<>≤≥]|\\[lg]e", text) else text


def _short(reply: str) -> bool:
    return bool(reply) and "\n" not in reply and len(reply.split()) <= 3
