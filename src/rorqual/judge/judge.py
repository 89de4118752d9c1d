"""The one judge: whether an answer says the same as the right one. Rewards, evaluations and curves all ask here.

Exact rules come first: the same text, the same number, the same expression, list, set, interval or equation, the same
words. math-verify decides where the right answer is mathematics beyond those rules (integrals, sums, limits); there it
is right, elsewhere it takes a number out of the middle of a text for the whole, and words for products of letters.

What the rules hold to, where one could differ:

- An expression counts as its value: 2^{10} is 1024, 6*4 is 24.
- A unit, a currency or "x =" that one side leaves out is no difference; two different ones are. Units aren't converted.
- 50% is 0.5, and also 50 where the other side has no percent sign and is not itself below 1.
- A decimal equals a fraction or root if it is exact, or its rounding to six significant digits or more. Decimals of 15
  digits and more are floating-point numbers and equal to 12 digits.
- Lists without brackets and sets are in any order; (…) and […] are not. An answer that lists several values ("3 or 4")
  is that list. A list without brackets keeps multiplicity, a set does not.
- A comma separates, but for thousands (1,000); within brackets it always separates.
- Words: case, white space, quotes, articles at the beginning, punctuation around words and Unicode's forms are no
  difference. yes is true, no is false. A number may be in words.
- A sentence counts as its number if it holds one number only and no word that turns or doubts it.
"""

import functools
import re
import unicodedata
from decimal import Decimal

from rorqual.judge import algebra, units
from rorqual.judge.algebra import NotMathematics, Tree
from rorqual.judge.equality import equal, without_name
from rorqual.judge.notation import boxes, plain, squeeze, unwrap
from rorqual.judge.numeric import Undecided, exactly
from rorqual.sandbox.checker import shared_checker

TIMEOUT = 5.0  # seconds of math-verify for one comparison
LONGEST = 2000  # characters of an answer that are looked at
LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|and|then|well),?\s+)*"
    r"(?:(?:my|the|our)?\s*(?:final|correct|right)?\s*(?:answer|result|solution|value|total|sum)(?:\s+is|\s*[:=])"
    r"|it\s+is|it's|it\s+equals|this\s+is|there\s+are|equals)?\s*:?\s*"
    r"(?:approximately|about|around|roughly|exactly|equal\s+to|≈|~|=)?\s*",
    re.IGNORECASE,
)
CHOICE = re.compile(
    r"(?i:(?:option|choice|answer)\s+)?(?:\(([A-Ja-j])\)|([A-Ja-j])(?:[.):](?=\s|$)|$))\s*(.*)", re.DOTALL
)
# After a choice: another one, or words that take it back.
TAKEN_BACK = re.compile(r"^(?:or|and|nor|but|no|not|is|isn't|[,/&])(?!\w)|\([A-Ja-j]\)|(?i:\bor\b)\s+[A-J]\b")
YES, NO = {"yes", "true"}, {"no", "false"}
ARTICLE = re.compile(r"^(?:the|an?)\s+(?=\w)")
DIGITS = re.compile(r"-?\d{1,15}(?:\.\d{1,10})?")  # the usual case
RATIO = re.compile(r"(\d+(?:\s*:\s*\d+)+)\s*([ap]\.?m\.?)?", re.IGNORECASE)
DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}")
# Words by which the number in a sentence is not what the sentence says.
TURNED = re.compile(
    r"\b(?:up to|any|such as|until|before|after|from|maybe|perhaps|possibly|probably"
    r"|not|no|never|none|cannot|neither|nor|or|either|if|unless|except|without|but|wrong|incorrect|false|less|more"
    r"|fewer|greater|smaller|larger|least|most|over|under|above|below|between|than"
    r"|might|may|could|unsure|unknown|guess|twice|half|double|thirds?|quarters?|times|minus|plus|squared|cubed|factorial"
    r"|to the power|point|negative|million|billion|thousand|hundred|dozen|trillion|percent|halves|fourths?"
    r"|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?)\b|n't\b|\?|[*/^+=<>%]",
    re.IGNORECASE,
)
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"


@functools.lru_cache(maxsize=1 << 14)
def same_answer(right: str, given: str) -> bool:
    """Whether `given` says what `right` says; never longer than TIMEOUT."""
    if given.strip() == right.strip():
        return bool(given.strip())
    given = given[:LONGEST].rpartition("####")[2]
    gold, said = plain(right), plain(given)
    if not said:
        return False
    if squeeze(gold) == squeeze(said):
        return True
    if DIGITS.fullmatch(gold) and DIGITS.fullmatch(said):
        return Decimal(gold) == Decimal(said)
    if (choice := CHOICE.fullmatch(gold)) and not choice[3] and re.search("[A-J]", gold):
        return _choice(choice[1] or choice[2], said)
    if DATE.fullmatch(gold):
        return bool(DATE.fullmatch(said)) and _numbers(gold) == _numbers(said)
    verdict = _by_value(gold, said)
    if verdict is None and not (re.search(r"\d", gold) and _quantity(gold, given=False)):
        verdict = _by_words(gold, said)
    return bool(verdict) or (_beyond(gold) and _by_math_verify(right, given))


def number_in(text: str) -> str | None:
    """The number that `text` is, a unit left out, in one spelling ("1,000.0" → "1000", ".5" → "1/2"); else None."""
    text = plain(text)
    found = _quantity(text, given=True)
    value = None if found is None else exactly(found[0])
    if value is None or re.search(r"\d\s*[-+*^!(]|\|", text):
        return None
    return str(value) if max(value.numerator.bit_length(), value.denominator.bit_length()) < 10_000 else None


def final_answer(right: str) -> str:
    """The answer in a worked solution: what stands after GSM8K's ####, or in MATH's last \\boxed{…}; else all of it."""
    if "####" in right:
        return right.rpartition("####")[2].strip()
    found = boxes(right)
    return found[-1][2].strip() if found else right.strip()


def copies(question: str, right: str, given: str) -> bool:
    """Whether `given` is arithmetic that the question itself holds, where a number is due: 6*4 for "What is 6*4?"."""
    said = squeeze(plain(given))
    if number_in(right) is None or not re.search(r"\d\)*[-+*^/!]", said) or re.fullmatch(r"-?\d+/\d+", said):
        return False
    return re.sub("[{}]", "", said) in re.sub("[{}]", "", squeeze(plain(question)))


def _by_value(gold: str, said: str) -> bool | None:
    """None where the right answer is not mathematics, or the given one is words."""
    right = _quantity(gold, given=False)
    if right is None:
        return _same_ratio(gold, said) if RATIO.fullmatch(gold) else None
    bare = said[LEAD.match(said).end() :]
    for text in dict.fromkeys((said, bare, _one_number(said) or said)):
        found = _quantity(text, given=True)
        if found is not None:
            return any(_same_quantity(right, other) for other in (found, _quantity(text, True, False)) if other)
    return None


@functools.lru_cache(maxsize=1 << 12)
def _quantity(text: str, given: bool, thousands: bool = True) -> tuple[Tree, units.Quantity] | None:
    words = units.in_digits(text)
    if given or re.fullmatch(r"-?\d+", words):
        text = words
    readings = [units.split(text), units.Quantity(text)]
    if re.search("sin|cos|tan|cot|sec|csc", text):  # the degrees are the function's
        readings.reverse()
    for part in dict.fromkeys(readings):
        try:
            tree = algebra.parse(part.body, thousands)
        except NotMathematics:
            continue
        if part.scale != 1:
            tree = ("*", tree, algebra.number(int(part.scale)))
        return tree, part
    return None


def _same_quantity(right: tuple[Tree, units.Quantity], found: tuple[Tree, units.Quantity]) -> bool:
    (gold, gold_parts), (said, said_parts) = right, found
    if not units.agree(gold_parts.unit, said_parts.unit):
        return False
    if _equal(gold, said) and not (said_parts.percent and not gold_parts.percent and _below_one(gold)):
        return True
    if gold_parts.percent != said_parts.percent:
        hundredth = algebra.number(100)
        left = ("/", gold, hundredth) if gold_parts.percent else gold
        other = ("/", said, hundredth) if said_parts.percent else said
        return _equal(left, other)
    return False


def _equal(gold: Tree, said: Tree) -> bool:
    """Also where one side alone has names for its values."""
    try:
        if equal(gold, said):
            return True
        value, other = without_name(gold), without_name(said)
        return (value is gold) != (other is said) and equal(value, other)
    except Undecided:
        return False


def _below_one(tree: Tree) -> bool:
    value = exactly(tree)
    return value is not None and 0 < abs(value) < 1


def _one_number(text: str) -> str | None:
    """What stands from the only number of a sentence on, if no word in it turns or doubts the number."""
    if not re.search(r"[A-Za-z]{2}", text) or "\\" in text:
        return None
    found = list(re.finditer(rf"(?<![\w.])[-+]?[$€£¥₹]?\s?(?:{NUMBER})(?!\w)", text))
    if len(found) != 1 or len(re.findall(r"\d+", text)) != len(re.findall(r"\d+", found[0][0])) or TURNED.search(text):
        return None
    return found[0][0].strip()


def _same_ratio(gold: str, said: str) -> bool:
    """10:30 and 3 : 4, number by number; am and pm only where both say it."""
    bare = said[LEAD.match(said).end() :]
    first, second = (RATIO.fullmatch(re.sub(r"(?i)^(\d+)(?= ?[ap]\.?m)", r"\1:00", text)) for text in (gold, bare))
    if second is None or _numbers(first[1]) != _numbers(second[1]):
        return False
    halves = [match[2].lower().replace(".", "") for match in (first, second) if match[2]]
    return len(set(halves)) < 2


def _numbers(text: str) -> list[int]:
    return [int(run) for run in re.findall(r"\d{1,100}", text)]


def _choice(gold: str, said: str) -> bool:
    match = CHOICE.fullmatch(said[LEAD.match(said).end() :])
    if match is None or TAKEN_BACK.search(match[3]):
        return False
    return (match[1] or match[2]).upper() == gold.upper()


def _by_words(gold: str, said: str) -> bool:
    right, found = words(gold), words(said)
    if right in YES | NO:
        wanted, others = (YES, NO) if right in YES else (NO, YES)
        match = re.match(r"\W*(\w+)(?:\s*$|\s*[,.;:!—-](.*))", said[LEAD.match(said).end() :], re.DOTALL)
        rest = set(re.findall(r"\w+", (match[2] or "").lower())) if match else set()
        return match is not None and match[1].lower() in wanted and not rest & others
    if right and right in (found, words(said[LEAD.match(said).end() :])):
        return True
    first, second = CHOICE.fullmatch(gold), CHOICE.fullmatch(said)
    if second is None or not second[3]:
        return False
    if first is None or not first[3]:
        return bool(right) and words(second[3]) == right
    return (first[1] or first[2]).upper() == (second[1] or second[2]).upper() and words(first[3]) == words(second[3])


def words(text: str) -> str:
    """Words to compare: case, quotes, articles in front and punctuation that separates nothing left out."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<!\w)[.,;:!\"'()]+|[.,;:!\"'()]+(?!\w)", " ", text)
    return ARTICLE.sub("", " ".join(text.split()), count=1)


def _beyond(gold: str) -> bool:
    """Whether the right answer is mathematics that `algebra` cannot read."""
    return "\\" in gold and _quantity(gold, given=False) is None


def _by_math_verify(right: str, given: str) -> bool:
    request = {"task": "math", "gold": unwrap(right), "answer": unwrap(given)}
    return bool(shared_checker().call(request, TIMEOUT))


def is_value(text: str) -> bool:
    """Whether all of the text is a number, an expression or the like, a unit included; a letter may be a choice."""
    if len(text) > algebra.LONGEST:
        return False
    text = plain(text)
    return CHOICE.fullmatch(text) is None and _quantity(text, given=False) is not None


@functools.lru_cache(maxsize=1 << 12)  # asked for every answer to a question
def is_mathematics(right: str) -> bool:
    """Whether the right answer is a value or other mathematics, rather than words."""
    return is_value(right) or "\\" in plain(right)
