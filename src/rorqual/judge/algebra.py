"""Parse school mathematics, in plain text and LaTeX, into trees. A text must parse as a whole.

A tree is a tuple: ("num", Fraction, digits), ("name", "x"), ("+", a, b), ("call", "sin", a), …; non-scalar trees are
("list", brackets, items), ("relation", [scalars], [signs]) and ("union", [lists]). `digits` is the number of
significant digits of a number with a decimal point, None for others.
"""

import re
from fractions import Fraction
from typing import Any

Tree = tuple[Any, ...]
LONGEST = 1000  # characters
DEEPEST = 50  # levels of nested brackets
HIGHEST = 150  # levels of a tree
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "asin", "acos", "atan", "sinh", "cosh",
    "tanh", "log", "ln", "lg", "exp", "sqrt", "abs", "floor", "ceil",
}  # fmt: skip
GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa",
    "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "upsilon", "phi", "varphi", "chi", "psi", "omega", "Gamma",
    "Delta", "Theta", "Lambda", "Xi", "Sigma", "Phi", "Psi", "Omega", "ell",
}  # fmt: skip
SAME_NAMES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
LETTERS = dict(zip("αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΣΦΨΩ", [
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu",
    "xi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi",
    "Sigma", "Phi", "Psi", "Omega",
], strict=True))  # fmt: skip
# Short words that are not products of letters.
ENGLISH = {
    "the", "of", "is", "to", "in", "on", "at", "it", "not", "no", "yes", "for", "per", "by", "as", "so", "we", "he",
    "she", "if", "but", "are", "was", "has", "its", "one", "two", "six", "ten",
}  # fmt: skip
RELATIONS = {"=", "<", ">", "<=", ">=", "!="}
TOKEN = re.compile(
    r"""\s*(?:
    (?P<num>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<word>\\?[A-Za-zα-ωΑ-Ω]+'*)
    | (?P<op><=|>=|!=|==|\\[{}]|[-+*/^!|()\[\]{}=<>,;π∞∅√∪∈±∓_%°])
    )""",
    re.VERBOSE,
)


class NotMathematics(ValueError):
    """The text is not one expression, list, set, interval or relation."""


def parse(text: str, thousands: bool = True) -> Tree:
    """The tree of `text`, the output of `notation.normalise`. thousands: 1,000 outside brackets is one number.

    Raises NotMathematics.
    """
    if len(text) > LONGEST or re.search(r"\\frac\s*\{\s*d[a-z]?\s*\}\s*\{\s*d", text):
        raise NotMathematics("too long, or a derivative, which is not a fraction")
    for pattern in (
        r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])",
        r"(?<![\d.,] )(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d/])",
    ):
        if thousands and not re.search(r"[(\[]|\\\{", text):
            text = re.sub(pattern, lambda m: re.sub("[, ]", "", m[1]), text)
    text = re.sub(r"(\d*)\.(\d*)\\overline\{(\d{1,30})\}", _repeating, text)
    text = re.sub(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)|(?<=\d)\s+[xX]\s+(?=\d)", "*", text)
    text = re.sub(r"(?<![\d.^_])(\d+) +(\d+) */ *(\d+)(?![\d.])", _mixed, text)
    text = re.sub(r"(?<![\d.^_])(\d+) *\\frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)(\d))", _mixed, text)
    tree = _Parser(_tokens(text)).everything()
    level, height = [tree], 0
    while level:
        level = [part for node in level if isinstance(node, tuple | list) for part in node]
        height += 1
        if height > HIGHEST:
            raise NotMathematics("too deep")
    return tree


def number(value: int | str, digits: int | None = None) -> Tree:
    return ("num", Fraction(value), digits)


def _mixed(match: re.Match[str]) -> str:
    whole, top, bottom = [group for group in match.groups() if group is not None]
    if int(top) >= int(bottom):
        return match[0].replace("\\frac", "*\\frac") if "frac" in match[0] else match[0]
    return f"({whole}+{top}/{bottom})"


def _repeating(match: re.Match[str]) -> str:
    whole, first, again = match.groups()
    return f"({whole or 0}+({first or 0}+{again}/{'9' * len(again)})/{10 ** len(first)})"


def _tokens(text: str) -> list[tuple[str, str]]:
    found, at = [], 0
    text = text.rstrip()
    alone = re.search(r"[\d+*/^=<>()|√{}\[\],-]", text) is None  # only letters: a word, not a product
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            raise NotMathematics(text[at : at + 10])
        at = match.end()
        kind = match.lastgroup
        assert kind is not None  # each alternative of TOKEN has a name
        token = match[kind]
        if kind != "word":
            found.append((kind, token))
            continue
        found += _word(token, alone)
    return found


def _word(token: str, alone: bool) -> list[tuple[str, str]]:
    name = token.lstrip("\\")
    if token.startswith("\\") and name in {"frac", "binom", "lfloor", "rfloor", "lceil", "rceil"}:
        return [("command", name)]
    if name in FUNCTIONS:
        return [("function", SAME_NAMES.get(name, name))]
    if name.lower() in ("pi", "infinity", "inf"):
        return [("op", "π" if name.lower() == "pi" else "∞")]
    if name in ("and", "or"):
        return [("op", ",")]
    if token.startswith("\\") and name not in GREEK:
        raise NotMathematics(token)
    letters = name.rstrip("'")
    if len(letters) == 1 or name in GREEK:
        return [("name", LETTERS.get(name, name))]
    if len(letters) > 3 or letters.lower() in ENGLISH or (alone and not re.fullmatch("[xyzw]+", letters)):
        raise NotMathematics(token)
    return [("name", letter) for letter in letters[:-1]] + [("name", name[len(letters) - 1 :])]


class _Parser:
    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens, self.at, self.depth, self.bars = tokens, 0, 0, 0

    def everything(self) -> Tree:
        tree = self.items("")
        if self.at < len(self.tokens):
            raise NotMathematics(self.peek()[1])
        return tree[2][0] if len(tree[2]) == 1 else tree

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")

    def take(self, *wanted: str) -> str | None:
        kind, token = self.peek()
        if kind in ("op", "command") and token in wanted:
            self.at += 1
            return token
        return None

    def need(self, *wanted: str) -> str:
        token = self.take(*wanted)
        if token is None:
            raise NotMathematics(f"{self.peek()[1]} instead of {wanted}")
        return token

    def items(self, brackets: str) -> Tree:
        found = [self.relation()]
        while self.take(",", ";"):
            while self.take(","):  # "3, 4, or 5"
                pass
            found.append(self.relation())
        return ("list", brackets, found)

    def relation(self) -> Tree:
        sides, signs = [self.union()], []
        if self.take("∈"):
            return self.union()
        while (token := self.peek()[1]) in RELATIONS | {"=="} and self.take(token):
            signs.append("=" if token == "==" else token)
            sides.append(self.union())
        return ("relation", sides, signs) if signs else sides[0]

    def union(self) -> Tree:
        parts = [self.sum()]
        while self.take("∪"):
            parts.append(self.sum())
        return ("union", parts) if len(parts) > 1 else parts[0]

    def sum(self) -> Tree:
        tree = self.term()
        while op := self.take("+", "-", "±", "∓"):
            tree = (op, tree, self.term())
        return tree

    def term(self) -> Tree:
        tree = self.unary()
        while True:
            if op := self.take("*", "/"):
                tree = (op, tree, self.unary())
            elif self.begins_atom():
                tree = ("*", tree, self.power())
            else:
                return tree

    def begins_atom(self) -> bool:
        kind, token = self.peek()
        if kind in ("name", "function"):
            return True
        if kind == "num":  # (2)3 is a product; 2 3 and x3 are not
            return self.tokens[self.at - 1][1] in (")", "}")
        return token in {"(", "{", "√", "π", "frac", "binom", "lfloor", "lceil"}

    def unary(self) -> Tree:
        self.depth += 1
        if self.depth > DEEPEST:
            raise NotMathematics("too deep")
        op = self.take("+", "-", "±")
        tree = self.power() if op is None else self.unary() if op == "+" else (op, number(0), self.unary())
        self.depth -= 1
        return tree

    def power(self) -> Tree:
        tree = self.atom()
        while op := self.take("!", "°"):
            tree = ("call", "factorial", tree) if op == "!" else ("/", ("*", tree, ("name", "π")), number(180))
        if self.take("^"):
            tree = ("^", tree, self.unary())
        return tree

    def group(self) -> Tree:
        """A LaTeX argument: {…}, or one digit, name or command without braces."""
        if self.take("{"):
            tree = self.sum()
            self.need("}")
            return tree
        kind, token = self.peek()
        if kind == "num" and token.isdigit() and len(token) > 1:  # \frac12
            self.tokens[self.at] = ("num", token[1:])
            return number(token[0])
        return self.atom()

    def atom(self) -> Tree:
        self.depth += 1
        if self.depth > DEEPEST:
            raise NotMathematics("too deep")
        tree = self.one()
        self.depth -= 1
        return tree

    def one(self) -> Tree:
        kind, token = self.peek()
        self.at += 1
        match kind, token:
            case "num", _:
                return self.literal(token)
            case "name", _:
                if self.take("_"):
                    return ("name", f"{token}_{self.subscript()}")
                return ("name", token)
            case "function", _:
                return self.call(token)
            case _, "π" | "∞":
                return ("name", token)
            case _, "∅":
                return ("list", "{}", [])
            case _, "√":
                return self.call("sqrt")
            case _, "frac":
                return ("/", self.group(), self.group())
            case _, "binom":
                return ("call", "binom", self.group(), self.group())
            case _, "lfloor" | "lceil":
                tree = self.sum()
                self.need("rfloor", "rceil")
                return ("call", token[1:], tree)
            case _, "(" | "[" | "{" | "\\{":
                return self.bracketed(token)
            case _, "|" if not self.bars:
                self.bars += 1
                tree = self.sum()
                self.need("|")
                self.bars -= 1
                return ("call", "abs", tree)
        raise NotMathematics(token)

    def literal(self, token: str) -> Tree:
        mantissa, _, exponent = token.lower().partition("e")
        if len(exponent) > 4 or (self.at > 1 and re.match(r"0\d", token) and len(self.tokens) > 1):
            raise NotMathematics(token)  # 2024-01-05 is not a subtraction
        digits = len(mantissa.replace(".", "").lstrip("0")) if "." in token else None
        return ("num", Fraction(token), digits)

    def subscript(self) -> str:
        if not self.take("{"):
            self.at += 1
            return self.tokens[self.at - 1][1] if self.at <= len(self.tokens) else ""
        parts = []
        while not self.take("}"):
            if self.peek()[0] == "end":
                raise NotMathematics("_{")
            parts.append(self.peek()[1])
            self.at += 1
        return "".join(parts)

    def call(self, name: str) -> Tree:
        base = power = None
        if name == "sqrt" and self.take("["):
            base = self.sum()
            self.need("]")
        if name == "log" and self.take("_"):
            base = self.group()
        if self.take("^"):
            power = self.group()
        if self.peek()[1] in ("{", "(", "|", "lfloor", "\\{"):
            inner = self.group()
        else:  # sin 2x
            inner = self.power()
            while name != "sqrt" and (self.peek()[0] == "name" or self.peek()[1] in ("π", "√", "frac")):
                inner = ("*", inner, self.power())
        if inner[0] == "list":
            raise NotMathematics(name)
        tree = ("call", name, inner) if base is None else ("call", name, inner, base)
        return tree if power is None else ("^", tree, power)

    def bracketed(self, opening: str) -> Tree:
        closing = {"(": (")", "]"), "[": ("]", ")"), "{": ("}",), "\\{": ("\\}",)}[opening]
        if self.take(*closing):
            return ("list", "{}" if "{" in opening else opening + closing[0], [])
        bars, self.bars = self.bars, 0
        tree = self.items("")
        self.bars = bars
        closed = self.need(*closing)
        items = tree[2]
        if len(items) == 1 and opening + closed in ("()", "{}", "[]") and items[0][0] not in ("list", "relation"):
            return items[0]
        return ("list", (opening + closed).replace("\\", ""), items)
