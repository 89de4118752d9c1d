"""Prevent special-token injection: control-token names in user text are encoded as text, only a template's as tokens.

A template renders to one string, in which its own `<|im_end|>` and a user's look the same. So `escape` marks the names
in a template's inputs with a character that no text contains, and `encode` reads the output: an escaped name becomes
ordinary text tokens. A text without such names gets the tokenizer's usual tokens.
"""

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar, cast
from weakref import WeakKeyDictionary

from rorqual.data.chat_messages import Message
from rorqual.data.tokenizer import token_ids
from rorqual.data.tool_formats import FORMATS
from rorqual.errors import UserError
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.unicode_checks import whole

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")

ESCAPE = "\ufdd0"  # a noncharacter, which Unicode reserves for internal use
THINK = ("<think>", "</think>")
# Delimiters of calls and results, also where the template does not have them.
TOOL = {word.strip() for form in FORMATS for word in (*form.opens, form.end or "", *form.around, *form.result)}
BRACKETED = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
FRAMED = re.compile(r"<[|｜].+[|｜]>")  # Qwen's, Llama's, DeepSeek's
# Tokens that a model generates in its turn, though some tokenizers mark them special: thinking, calls, answers.
GENERATED = re.compile(
    r"(?!.*(?:response|output|result|available)).*(?:think|tool|call|answer|python_tag|\[ARGS\])", re.IGNORECASE
)


def is_special(name: str, special: bool) -> bool:
    """Whether a token of this name is never part of the text of an answer."""
    return special and not GENERATED.match(name)


def escape(value: T, tokenizer: Tokenizer) -> T:
    """A text or JSON value for a template, with the names of control tokens escaped."""
    return cast(T, _escape(value, _names(tokenizer).user))


def escape_message(message: Message, tokenizer: Tokenizer) -> Message:
    """`escape` for a message. In an assistant's content, the tokens that a model generates in its turn (thinking, tool
    calls) stay tokens; those that end a turn or begin another are escaped.
    """
    names = _names(tokenizer)
    own = message.get("role") == "assistant"
    escaped = {
        key: value if key == "role" else _escape(value, names.assistant if own and key == "content" else names.user)
        for key, value in message.items()
    }
    return cast(Message, escaped)


def encode(text: str, tokenizer: Tokenizer, after: int | None = None) -> list[int]:
    """Token ids of a rendered text, without BOS. Raises UserError for a lone surrogate.

    after: the token before the text; without it, SentencePiece vocabularies would begin a new word.
    """
    if not whole(text):
        raise UserError("the text contains a lone surrogate (half a character), which no tokenizer reads; remove it")
    if after is not None and text and not (names := _names(tokenizer)).byte_level:
        added = names.added.get(after)
        # After a special token, a generated text begins with the space that its tokens contain, not with one more.
        before = "\n" if added is None or text[0] == " " else added.content
        ids, known = encode(before + text, tokenizer), encode(before, tokenizer)
        if ids[: len(known)] == known:
            return ids[len(known) :]
    if ESCAPE not in text:
        return token_ids(tokenizer, text)
    return _names(tokenizer).encode(text)


def unescape(text: str) -> str:
    """A rendered text without the escape characters."""
    return text.replace(ESCAPE, "")


def framed_as_special(backend: str) -> str:
    """A tokenizer's JSON with all `<|…|>` tokens marked special: some releases omit the fill-in-the-middle ones."""
    described = json.loads(backend)
    for token in described["added_tokens"]:
        token["special"] = token["special"] or bool(FRAMED.fullmatch(token["content"]))
    return json.dumps(described)


class _Names:
    """Control tokens of one tokenizer, by name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        template = str(getattr(tokenizer, "chat_template", None) or "")
        self.added = added = getattr(tokenizer, "added_tokens_decoder", {})
        self.byte_level = "ByteLevel" in str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
        self._tokenizer = tokenizer
        self.control = {
            number: t.content
            for number, t in added.items()
            if len(t.content) > 1 and (t.special or t.content in THINK or _is_mark(t.content, template))
        }
        self.user = _pattern(self.control.values())
        model = [
            name
            for number, name in self.control.items()
            if name not in THINK and not GENERATED.match(name) and (added[number].special or FRAMED.fullmatch(name))
        ]
        self.assistant = _pattern(model)
        self._text_tokenizer: tokenizers.Tokenizer | None = None
        self._wall = ""

    def encode(self, text: str) -> list[int]:
        """The tokenizer finds the template's control tokens; the text between is encoded by one without such names."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = []
        between: list[int] = []
        at = 0  # start of the text after the last control token

        def close(end: int) -> list[int]:
            segment = text[at:end]
            return between if ESCAPE not in segment else self._as_text(segment.replace(ESCAPE, ""), first=at == 0)

        for number, (start, end) in zip(found.input_ids, found.offset_mapping, strict=True):
            if number in self.control:
                ids += [*close(start), number]
                between, at = [], end
            else:
                between.append(number)
        return ids + close(len(text))

    def _as_text(self, text: str, first: bool) -> list[int]:
        if self._text_tokenizer is None:
            self._text_tokenizer, self._wall = _without_control_tokens(self._tokenizer, self.control)
        if first:
            return self._text_tokenizer.encode(text, add_special_tokens=False).ids
        return self._text_tokenizer.encode(self._wall + text, add_special_tokens=False).ids[1:]


_known: "WeakKeyDictionary[Tokenizer, tuple[tuple[object, int], _Names]]" = WeakKeyDictionary()


def _names(tokenizer: Tokenizer) -> _Names:
    state = getattr(tokenizer, "chat_template", None), getattr(tokenizer, "__len__", int)()
    found = _known.get(tokenizer)
    if found is None or found[0] != state:
        _known[tokenizer] = found = state, _Names(tokenizer)
    return found[1]


def _is_mark(name: str, template: str) -> bool:
    """Whether an added token that is not marked special is a control token: some tokenizers add HTML tags as text."""
    return bool(FRAMED.fullmatch(name) or (BRACKETED.fullmatch(name) and (name in template or name in TOOL)))


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _escape(value: object, names: re.Pattern[str]) -> object:
    if isinstance(value, str):
        return names.sub(lambda m: m[0][0] + ESCAPE + m[0][1:], value.replace(ESCAPE, ""))
    if isinstance(value, dict):
        return {_escape(key, names): _escape(inner, names) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escape(inner, names) for inner in value]
    return value


def _without_control_tokens(tokenizer: Tokenizer, control: dict[int, str]) -> "tuple[tokenizers.Tokenizer, str]":
    """The tokenizer with its control tokens renamed to names that no text contains; and one of these names."""
    import tokenizers

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described |= {"post_processor": None, "truncation": None, "padding": None}
    other = {name: f"{ESCAPE}{number}{ESCAPE}" for number, name in control.items()}
    for token in described["added_tokens"]:
        if token["content"] in other:
            token |= {"content": other[token["content"]], "lstrip": False, "rstrip": False, "single_word": False}
            token["normalized"] = False
    vocabulary = described["model"].get("vocab")
    if isinstance(vocabulary, dict):
        described["model"]["vocab"] = {other.get(name, name): number for name, number in vocabulary.items()}
    elif isinstance(vocabulary, list):  # of a Unigram model
        described["model"]["vocab"] = [[other.get(name, name), score] for name, score in vocabulary]
    return tokenizers.Tokenizer.from_str(json.dumps(described)), next(iter(other.values()))
