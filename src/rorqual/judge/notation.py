"""Normalise the notation of answers: equivalent Unicode and LaTeX spellings become one; nothing is computed."""

import re
import unicodedata

WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$(.*)\$\$", r"\$([^$]*)\$", r"\\\((.*)\\\)", r"\\\[(.*)\\\]", r"\*\*(.*)\*\*", r"\*([^*]*)\*",
        r"__(.*)__", r"`+([^`]*)`+", r'"([^"]*)"', r"“([^”]*)”", r"‘([^’]*)’", r"'([^']*)'", r"«([^»]*)»",
    )
]  # fmt: skip
LAYERS = 12  # of nested wrappers to remove
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ⁽⁾", "0123456789+-n()")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n")
VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
SIGNS = str.maketrans({
    "−": "-", "﹣": "-", "‐": "-", "‑": "-", "×": "*", "✕": "*", "⨯": "*", "∗": "*", "·": "*", "⋅": "*", "∙": "*",
    "÷": "/", "∕": "/", "⁄": "/", "≤": "<=", "⩽": "<=", "≦": "<=", "≥": ">=", "⩾": ">=", "≧": ">=", "≠": "!=",
    "º": "°", "˚": "°", "’": "'", "‘": "'", "“": '"', "”": '"', "′": "'", "。": ".", "∣": "|", "\u200b": "",
})  # fmt: skip
COMMANDS = {
    "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "ne": "!=", "neq": "!=",
    "lt": "<", "gt": ">", "times": "*", "cdot": "*", "ast": "*", "div": "/", "pm": "±", "mp": "∓", "infty": "∞",
    "pi": "π", "cup": "∪", "cap": "∩", "in": "∈", "emptyset": "∅", "varnothing": "∅", "lvert": "|", "rvert": "|",
    "vert": "|", "mid": "|", "circ": "°", "degree": "°", "quad": " ", "qquad": " ", "displaystyle": " ",
    "lbrace": r"\{", "rbrace": r"\}", "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "approx": "≈",
    "lbrack": "[", "rbrack": "]", "colon": ":", "dbinom": r"\binom", "tbinom": r"\binom", "limits": "",
    "left": "", "right": "", "bigl": "", "bigr": "", "Bigl": "", "Bigr": "", "big": "", "Big": "", "bigg": "",
}  # fmt: skip
TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it|sf|tt|bb|cal)|mbox|operatorname\*?|boldsymbol)\s*\{([^{}]*)\}"
)
MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[^{}]*\})?(.*?)\\end\{\1\}", re.DOTALL)


def normalise(text: str) -> str:
    """`text` without wrappers and cosmetic LaTeX, with ASCII signs and single spaces."""
    text = unwrap(text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ⁽⁾]+", lambda m: "^{" + m[0].translate(SUPERSCRIPTS) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉ₙ]+", lambda m: "_{" + m[0].translate(SUBSCRIPTS) + "}", text)
    text = re.sub(rf"(\d?)\s*([{VULGAR}])", _vulgar, text).translate(SIGNS)
    text = unicodedata.normalize("NFKC", text).translate(SIGNS)
    text = text.replace("{,}", ",")
    if "\\" in text:
        text = _without_latex(text)
    if text.count("$") % 2 == 0:  # an odd one is a currency
        text = text.replace("$", "")
    text = text.replace("\ue000", "$").replace("**", "^" if re.search(r"[\w)]\*\*[\w(-]", text) else "")
    return unwrap(re.sub(r"^[–—](?=\s*[\d.(])", "-", " ".join(text.split())))


def unwrap(text: str) -> str:
    """Without what surrounds an answer: math delimiters, \\boxed, bold, quotes, a final full stop."""
    for _ in range(LAYERS):
        before = text
        text = text.strip().removeprefix(":")
        text = re.sub(r"(?<![.])[.,;:!]+$", "", text) if not text.endswith(("!", "...")) else text
        for wrapper in WRAPPERS:
            if match := wrapper.fullmatch(text):
                text = match[1]
        if (boxed := boxes(text)) and boxed[0][:2] == (0, len(text)):
            text = boxed[0][2]
        if text == before:
            break
    return text


def boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of each outermost closed \\boxed{…} or \\fbox{…}; `\\boxed 5` too."""
    found, opened = [], []  # (start of \boxed, start of its content); None for other braces
    for match in re.finditer(r"\\f?box(?:ed)?\s*(\{|\d+)|\\.|[{}]", text, re.DOTALL):
        if match[0] in ("{", "}") or match[1] == "{":
            if match[0] == "}":
                place = opened.pop() if opened else None
                if place:
                    found.append((place[0], match.end(), text[place[1] : match.start()]))
            else:
                opened.append((match.start(), match.end()) if match[1] else None)
        elif match[1]:
            found.append((match.start(), match.end(), match[1]))
    outer, end = [], -1
    for box in sorted(found):
        if box[0] > end:
            outer.append(box)
            end = box[1]
    return outer


def squeeze(text: str) -> str:
    """Without the spaces next to symbols; those between words, and after a comma, stay: "1, 234" is not 1,234."""
    return re.sub(r"(?<![\w,]) | (?!\w)", "", text)


def _vulgar(match: re.Match[str]) -> str:
    top, bottom = unicodedata.normalize("NFKC", match[2]).split("⁄")
    return f"{match[1]} {top}/{bottom}" if match[1] else f"({top}/{bottom})"


def _without_latex(text: str) -> str:
    text = MATRIX.sub(_matrix, text)
    text = text.replace(r"\$", "\ue000").replace(r"\!", "")
    text = re.sub(r"\\([%#&_])", r"\1", text)
    text = re.sub(r"\\[,;: ]|~", " ", text)
    text = re.sub(r"\\[()\[\]]", "", text)
    for _ in range(4):  # nested \text
        text = TEXT.sub(r" \1 ", text)
    text = re.sub(r"\\([A-Za-z]+)", lambda m: COMMANDS.get(m[1], m[0]), text)
    return re.sub(r"\^\s*(?:\{\s*°\s*\}|°)", "°", text)


def _matrix(match: re.Match[str]) -> str:
    """Rows in brackets: [[1,2],[3,4]]; a column vector as a tuple."""
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if row.strip()]
    if len(rows) > 1 and "&" not in match[2]:
        return "(" + ",".join(rows) + ")"
    return "[" + ",".join("[" + ",".join(row.split("&")) + "]" for row in rows) + "]"
