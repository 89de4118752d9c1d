"""Units, currencies, percent signs, scales ("million") and number words around the number of an answer."""

import re
from dataclasses import dataclass
from fractions import Fraction

CURRENCIES = {"$": "$", "€": "€", "£": "£", "¥": "¥", "₹": "₹", "usd": "$", "us$": "$", "eur": "€", "gbp": "£"}
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = {word: i for i, word in enumerate(ONES)} | {word: 20 + 10 * i for i, word in enumerate(TENS)}
UNITS = {
    "%": "percent pct percentage", "$": "dollar usd", "€": "euro eur", "£": "quid gbp", "°": "degree deg",
    "m": "meter metre", "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre",
    "g": "gram", "kg": "kilogram kilo", "mg": "milligram", "lb": "lbs", "oz": "ounce", "l": "liter litre",
    "ml": "milliliter millilitre", "s": "second sec", "min": "minute", "h": "hour hr", "ms": "millisecond",
    "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile", "rad": "radian", "hz": "hertz", "j": "joule",
    "n": "newton", "w": "watt", "v": "volt", "°c": "celsius", "°f": "fahrenheit", "¢": "cent",
}  # fmt: skip
CANONICAL = {word: unit for unit, words in UNITS.items() for word in [unit, *words.split()]}
ABBREVIATIONS = {unit for unit in UNITS if unit.isalpha() and len(unit) > 1}  # may follow a number without a space
LETTERS = set("mgslhJNWVKCFAL")  # units of one letter, after a space
# Words after a number that change it or make it no answer.
QUALIFIERS = {
    "or", "and", "but", "not", "if", "to", "is", "are", "was", "times", "plus", "minus", "over", "than", "less",
    "more", "least", "most", "divided", "point", "half", "halves", "third", "thirds", "quarter", "quarters",
    "fourth", "fifths", "squared", "cubed", "factorial", "root", "power", "mod", "modulo", "remainder", "because",
    "since", "where", "when", "unless", "nor", "neither", "either", "maybe", "perhaps", "wrong", "incorrect",
    "false", "isn't", "no", "x", "y", "z", "through", "until", "versus", "vs",
}  # fmt: skip
UNIT = re.compile(r"[A-Za-zµΩμ°¢€£¥₹$%/²³.\-^·*{}0-9' ]*")


@dataclass(frozen=True)
class Quantity:
    """`body`: text of the number; `unit`: canonical words of its unit; `scale`: the factor from "million" etc."""

    body: str
    unit: frozenset[str] = frozenset()
    percent: bool = False
    scale: Fraction = Fraction(1)


def split(text: str) -> Quantity:
    """Split `text`, the output of `notation.normalise`, into number and unit."""
    unit: set[str] = set()
    if match := re.match(r"([-+]?)\s*(US\$|USD|EUR|GBP|[$€£¥₹])\s*(?=[-+.\d(])", text, re.IGNORECASE):
        unit.add(CURRENCIES[match[2].lower()])
        text = match[1] + text[match.end() :]
    if match := re.fullmatch(r"([0-9A-F]+)\s*_\s*(?:\{\s*(\d+)\s*\}|(\d+))", text):
        return Quantity(match[1], frozenset({f"base {match[2] or match[3]}"}))
    match = re.fullmatch(r"(.*?[\d)}π∞!|\]])(\s*)([A-Za-zµΩμ°¢€£¥₹$%/].*)", text)
    tail = None
    if match is not None:
        for start in (m.start(3) for m in _tails(text)):
            words = _unit_words(text[start:], spaced=text[start - 1] == " ")
            if words is not None:
                tail = (text[:start].rstrip(), words)
                break
    if tail is None:
        return Quantity(text, frozenset(unit))
    body, words = tail
    scale = Fraction(1)
    while words and words[0] in SCALES:
        scale *= SCALES[words.pop(0)]
    return Quantity(body, frozenset(unit | set(words) - {"%"}), "%" in words, scale)


def agree(first: frozenset[str], second: frozenset[str]) -> bool:
    """Whether one unit equals, contains or lacks the other. Pounds are money and weight."""
    if first and second and "pound" in first | second and first | second <= {"pound", "lb", "£"}:
        return True
    return first <= second or second <= first


def in_digits(text: str) -> str:
    """Replace a leading number in words by digits: "twenty-one eggs" → "21 eggs", "two thirds" → "2/3"."""
    text = re.sub(rf"^an? (?=(?:{'|'.join([*SCALES, *PARTS])})\b)|^(?=half$)", "one ", text, flags=re.IGNORECASE)
    part = re.fullmatch(r"([A-Za-z]+|\d+)[- ]([A-Za-z]+)", text)
    if part and (below := PARTS.get(part[2].lower().replace("halves", "half").removesuffix("s"))):
        above = WORDS.get(part[1].lower(), part[1])
        return f"{above}/{below}"
    match = re.match(r"(?:minus |negative )?([A-Za-z]+)(?:[- ]([A-Za-z]+))?(?![A-Za-z])(?! *\()", text)
    if match is None or match[1].lower() not in WORDS:
        return text
    sign = "-" if text.lower().startswith(("minus ", "negative ")) else ""
    first, second = WORDS[match[1].lower()], WORDS.get((match[2] or "").lower())
    if second is not None and first >= 20 and 0 < second < 10:
        return f"{sign}{first + second}{text[match.end(2) :]}"
    return f"{sign}{first}{text[match.end(1) :]}"


def _tails(text: str) -> list[re.Match[str]]:
    """Possible starts of a unit, after the end of a number; the longest tail first."""
    return list(re.finditer(r"(?<=([\d)}π∞!|\]]))(\s*)(?=([A-Za-zµΩμ°¢€£¥₹$%/]))", text))


def _unit_words(tail: str, spaced: bool) -> list[str] | None:
    """The canonical words of a unit; None where the tail is not a unit."""
    if not UNIT.fullmatch(tail) or len(tail) > 60:
        return None
    tail = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", tail, flags=re.IGNORECASE)
    tail = re.sub(r"\s+per\s+(?!cent)", "/", re.sub(r"\bmph\b", "miles/hour", tail))
    tail = re.sub(r"[{}]", "", tail.replace("²", "^2").replace("³", "^3"))
    words = tail.replace("per cent", "percent").split()
    if not words or len(words) > 5 or QUALIFIERS & {word.strip(".,").lower() for word in words}:
        return None
    if any(re.search(r"(?<![\^\d])\d", word) for word in words):  # another number
        return None
    if any(word[0].isupper() and word.isalpha() and len(word) > 4 and not _known(word) for word in words):
        return None  # 10 Downing Street
    first = words[0]
    if re.fullmatch("[A-Za-z]", first) and not (spaced and first in LETTERS):
        return None
    if not spaced and first[0].isalpha() and not _known(first):
        return None  # 2xy
    if first[0] in "/*" and spaced is False and len(first) < 3:
        return None
    return [_canonical(word) for word in words]


def _known(word: str) -> bool:
    stem = re.split(r"[/^·*]", word)[0].lower()
    return stem in ABBREVIATIONS | SCALES.keys() | {"am", "pm", "mph"} or (stem in CANONICAL and len(stem) > 2)


def _canonical(word: str) -> str:
    lower = word.lower().strip(".,")
    if "/" in lower.strip("/"):
        return "/".join(map(_canonical, lower.split("/")))
    if lower in CANONICAL:
        return CANONICAL[lower]
    if lower.endswith("s") and lower[:-1] in CANONICAL:
        return CANONICAL[lower[:-1]]
    if len(lower) > 3 and lower.endswith("ies"):
        return lower[:-3] + "y"
    return lower[:-1] if len(lower) > 3 and lower.endswith("s") and not lower.endswith("ss") else lower
