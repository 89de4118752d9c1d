"""Answer equivalence: whether a predicted answer equals the reference. Used by rewards, evaluations and curves.

Exact rules come first: equal text, numbers, expressions, lists, sets, intervals, equations or words. math-verify
decides only where the reference is mathematics beyond those rules (integrals, sums, limits): elsewhere it accepts a
number from the middle of a text, and reads words as products of letters.

Conventions, where one could choose otherwise:

- An expression counts as its value: 2^{10} is 1024, 6*4 is 24.
- A unit, currency or "x =" may be missing on one side; two different ones are unequal. Units are not converted.
- 50% equals 0.5, and also 50 where the other side has no percent sign and is not below 1.
- A decimal equals a fraction or root if it is exact, or its rounding to six significant digits or more. Decimals of 15
  or more digits are floating-point numbers, compared to 12 digits.
- Lists without brackets and sets are unordered; (…) and […] are ordered. An answer with several values ("3 or 4") is a
  list. A list without brackets keeps multiplicity, a set does not.
- A comma separates, except in thousands (1,000); within brackets it always separates.
- Words: case, white space, quotes, leading articles, punctuation around words and Unicode forms are ignored. yes equals
  true, no equals false. A number may be in words.
- A sentence equals its number if it has only one number and no word that negates, changes or doubts it.
"""

import functools
import re
import unicodedata
from decimal import Decimal

from rorqual.judge import algebra, units
from rorqual.judge.algebra import NotMathematics, Tree
from rorqual.judge.equality import equal, without_name
from rorqual.judge.notation import boxes, normalise, squeeze, unwrap
from rorqual.judge.numeric import Undecided, exactly
from rorqual.sandbox.checker import shared_checker

TIMEOUT = 5.0  # seconds of math-verify per comparison
LONGEST = 2000  # characters of an answer that are compared
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
# After a choice: another one, or words that retract it.
TAKEN_BACK = re.compile(r"^(?:or|and|nor|but|no|not|is|isn't|[,/&])(?!\w)|\([A-Ja-j]\)|(?i:\bor\b)\s+[A-J]\b")
YES, NO = {"yes", "true"}, {"no", "false"}
ARTICLE = re.compile(r"^(?:the|an?)\s+(?=\w)")
DIGITS = re.compile(r"-?\d{1,15}(?:\.\d{1,10})?")  # the usual case
RATIO = re.compile(r"(\d+(?:\s*:\s*\d+)+)\s*([ap]\.?m\.?)?", re.IGNORECASE)
DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}")
# Words that negate, change or doubt the number in a sentence.
QUALIFIED = re.compile(
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
def same_answer(reference: str, prediction: str) -> bool:
    """Whether `prediction` equals `reference`; takes at most TIMEOUT."""
    if prediction.strip() == reference.strip():
        return bool(prediction.strip())
    prediction = prediction[:LONGEST].rpartition("####")[2]
    ref, pred = normalise(reference), normalise(prediction)
    if not pred:
        return False
    if squeeze(ref) == squeeze(pred):
        return True
    if DIGITS.fullmatch(ref) and DIGITS.fullmatch(pred):
        return Decimal(ref) == Decimal(pred)
    if (choice := CHOICE.fullmatch(ref)) and not choice[3] and re.search("[A-J]", ref):
        return _choice(choice[1] or choice[2], pred)
    if DATE.fullmatch(ref):
        return bool(DATE.fullmatch(pred)) and _numbers(ref) == _numbers(pred)
    verdict = _by_value(ref, pred)
    if verdict is None and not (re.search(r"\d", ref) and _quantity(ref, spelled=False)):
        verdict = _by_words(ref, pred)
    return bool(verdict) or (_beyond(ref) and _by_math_verify(reference, prediction))


def number_in(text: str) -> str | None:
    """The number that `text` is, without its unit, normalised ("1,000.0" → "1000", ".5" → "1/2"); else None."""
    text = normalise(text)
    found = _quantity(text, spelled=True)
    value = None if found is None else exactly(found[0])
    if value is None or re.search(r"\d\s*[-+*^!(]|\|", text):
        return None
    return str(value) if max(value.numerator.bit_length(), value.denominator.bit_length()) < 10_000 else None


def final_answer(reference: str) -> str:
    """The answer of a worked solution: after GSM8K's ####, or in MATH's last \\boxed{…}; else the whole text."""
    if "####" in reference:
        return reference.rpartition("####")[2].strip()
    found = boxes(reference)
    return found[-1][2].strip() if found else reference.strip()


def copies(question: str, reference: str, prediction: str) -> bool:
    """Whether `prediction` is arithmetic copied from a question that asks for its value: 6*4 for "What is 6*4?"."""
    prediction = squeeze(normalise(prediction))
    if (
        number_in(reference) is None
        or not re.search(r"\d\)*[-+*^/!]", prediction)
        or re.fullmatch(r"-?\d+/\d+", prediction)
    ):
        return False
    return re.sub("[{}]", "", prediction) in re.sub("[{}]", "", squeeze(normalise(question)))


def _by_value(reference: str, prediction: str) -> bool | None:
    """Compare as values; None where the reference is not mathematics, or the prediction is words."""
    wanted = _quantity(reference, spelled=False)
    if wanted is None:
        return _same_ratio(reference, prediction) if RATIO.fullmatch(reference) else None
    bare = _without_lead(prediction)
    for text in dict.fromkeys((prediction, bare, _one_number(prediction) or prediction)):
        found = _quantity(text, spelled=True)
        if found is not None:
            return any(_same_quantity(wanted, other) for other in (found, _quantity(text, True, False)) if other)
    return None


@functools.lru_cache(maxsize=1 << 12)
def _quantity(text: str, spelled: bool, thousands: bool = True) -> tuple[Tree, units.Quantity] | None:
    """(value, number and unit) of a text; None where it is not a value. spelled: also numbers in words with a unit."""
    words = units.in_digits(text)
    if spelled or re.fullmatch(r"-?\d+", words):
        text = words
    readings = [units.split(text), units.Quantity(text)]
    if re.search("sin|cos|tan|cot|sec|csc", text):  # degrees belong to the function's argument
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


def _same_quantity(wanted: tuple[Tree, units.Quantity], found: tuple[Tree, units.Quantity]) -> bool:
    (reference, reference_parts), (prediction, prediction_parts) = wanted, found
    if not units.agree(reference_parts.unit, prediction_parts.unit):
        return False
    if _equal(reference, prediction) and not (
        prediction_parts.percent and not reference_parts.percent and _below_one(reference)
    ):
        return True
    if reference_parts.percent != prediction_parts.percent:
        hundredth = algebra.number(100)
        left = ("/", reference, hundredth) if reference_parts.percent else reference
        other = ("/", prediction, hundredth) if prediction_parts.percent else prediction
        return _equal(left, other)
    return False


def _equal(reference: Tree, prediction: Tree) -> bool:
    """Equal trees, also where only one side names its values ("x = 5")."""
    try:
        if equal(reference, prediction):
            return True
        value, other = without_name(reference), without_name(prediction)
        return (value is reference) != (other is prediction) and equal(value, other)
    except Undecided:
        return False


def _below_one(tree: Tree) -> bool:
    value = exactly(tree)
    return value is not None and 0 < abs(value) < 1


def _one_number(text: str) -> str | None:
    """The only number of a sentence; None where there are several, or a word that negates, changes or doubts it."""
    if not re.search(r"[A-Za-z]{2}", text) or "\\" in text:
        return None
    found = list(re.finditer(rf"(?<![\w.])[-+]?[$€£¥₹]?\s?(?:{NUMBER})(?!\w)", text))
    if (
        len(found) != 1
        or len(re.findall(r"\d+", text)) != len(re.findall(r"\d+", found[0][0]))
        or QUALIFIED.search(text)
    ):
        return None
    return found[0][0].strip()


def _same_ratio(reference: str, prediction: str) -> bool:
    """Compare 10:30 or 3 : 4 number by number; am and pm only where both have it."""
    bare = _without_lead(prediction)
    first, second = (RATIO.fullmatch(re.sub(r"(?i)^(\d+)(?= ?[ap]\.?m)", r"\1:00", text)) for text in (reference, bare))
    if first is None or second is None or _numbers(first[1]) != _numbers(second[1]):
        return False
    halves = [match[2].lower().replace(".", "") for match in (first, second) if match[2]]
    return len(set(halves)) < 2


def _without_lead(prediction: str) -> str:
    lead = LEAD.match(prediction)
    return prediction[lead.end() :] if lead else prediction


def _numbers(text: str) -> list[int]:
    return [int(run) for run in re.findall(r"\d{1,100}", text)]


def _choice(reference: str, prediction: str) -> bool:
    match = CHOICE.fullmatch(_without_lead(prediction))
    if match is None or TAKEN_BACK.search(match[3]):
        return False
    return (match[1] or match[2]).upper() == reference.upper()


def _by_words(reference: str, prediction: str) -> bool:
    wanted, found = words(reference), words(prediction)
    if wanted in YES | NO:
        same, others = (YES, NO) if wanted in YES else (NO, YES)
        match = re.match(r"\W*(\w+)(?:\s*$|\s*[,.;:!—-](.*))", _without_lead(prediction), re.DOTALL)
        rest = set(re.findall(r"\w+", (match[2] or "").lower())) if match else set()
        return match is not None and match[1].lower() in same and not rest & others
    if wanted and wanted in (found, words(_without_lead(prediction))):
        return True
    first, second = CHOICE.fullmatch(reference), CHOICE.fullmatch(prediction)
    if second is None or not second[3]:
        return False
    if first is None or not first[3]:
        return bool(wanted) and words(second[3]) == wanted
    return (first[1] or first[2]).upper() == (second[1] or second[2]).upper() and words(first[3]) == words(second[3])


def words(text: str) -> str:
    """Normalised words: without case, quotes, leading articles and punctuation around words."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<!\w)[.,;:!\"'()]+|[.,;:!\"'()]+(?!\w)", " ", text)
    return ARTICLE.sub("", " ".join(text.split()), count=1)


def _beyond(reference: str) -> bool:
    """Whether the reference is LaTeX mathematics that `algebra` cannot parse."""
    return "\\" in reference and _quantity(reference, spelled=False) is None


def _by_math_verify(reference: str, prediction: str) -> bool:
    request = {"task": "math", "gold": unwrap(reference), "answer": unwrap(prediction)}
    return bool(shared_checker().call(request, TIMEOUT))


def is_value(text: str) -> bool:
    """Whether the whole text is a value (number, expression, list …), possibly with a unit; not a choice like (B)."""
    if len(text) > algebra.LONGEST:
        return False
    text = normalise(text)
    return CHOICE.fullmatch(text) is None and _quantity(text, spelled=False) is not None


@functools.lru_cache(maxsize=1 << 12)  # called for every answer to a question
def is_mathematics(reference: str) -> bool:
    """Whether the reference is a value or other mathematics, rather than words."""
    return is_value(reference) or "\\" in normalise(reference)
