"""The names of control tokens in texts that people write: there they are text, only a chat template writes the tokens.

A template renders to one string, in which `<|im_end|>` of the template and of a user look the same. So `plain` breaks
the names in what goes into a template, by a character that no text holds, and `encode` reads what comes out: a broken
name becomes the tokens of its letters. A text without such names has the tokens that the tokenizer gives it.
"""

import json
import re
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from rorqual.data.tokenizer import token_ids
from rorqual.data.tool_formats import FORMATS
from rorqual.errors import UserError
from rorqual.unicode_checks import whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BREAK = "\ufdd0"  # a noncharacter, which Unicode keeps for what programs do among themselves
THINK = ("<think>", "</think>")
# What calls and results stand between, also where the template has no word of it.
TOOL = {word.strip() for form in FORMATS for word in (*form.opens, form.end or "", *form.around, *form.result)}
SHAPE = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
FRAMED = re.compile(r"<[|｜].+[|｜]>")  # Qwen's, Llama's, DeepSeek's
# What a model itself writes in its turn, though some tokenizers call these tokens special: thoughts, calls, answers.
SPOKEN = re.compile(
    r"(?!.*(?:response|output|result|available)).*(?:think|tool|call|answer|python_tag|\[ARGS\])", re.IGNORECASE
)


def is_special(name: str, special: bool) -> bool:
    """Whether a token of this name is no part of any text that a model writes."""
    return special and not SPOKEN.match(name)


def plain(value: Any, tokenizer: "PreTrainedTokenizerFast") -> Any:
    """A text, or whatever JSON holds, for a template: names of control tokens in its texts are text."""
    return _break(value, _names(tokenizer).anyone)


def plain_message(message: dict[str, Any], tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """The same for a message. In an assistant's content the marks of thoughts and of tool calls, and all else that a
    model writes in its own turn, stay tokens; those that end a turn or begin another's do not.
    """
    names = _names(tokenizer)
    own = message.get("role") == "assistant"
    return {
        key: value if key == "role" else _break(value, names.model if own and key == "content" else names.anyone)
        for key, value in message.items()
    }


def encode(text: str, tokenizer: "PreTrainedTokenizerFast", after: int | None = None) -> list[int]:
    """Token ids of a rendered text, with nothing put before it. Raises UserError for half a character.

    after: the token that it goes on from; SentencePiece's vocabularies would else begin a word with it.
    """
    if not whole(text):
        raise UserError("the text holds half a character (a lone surrogate), which no tokenizer reads; use whole ones")
    if after is not None and text and not (names := _names(tokenizer)).byte_level:
        added = names.added.get(after)
        # What a model has written after a mark begins with the space that its tokens spell, not with one more.
        before = "\n" if added is None or text[0] == " " else added.content
        ids, known = encode(before + text, tokenizer), encode(before, tokenizer)
        if ids[: len(known)] == known:
            return ids[len(known) :]
    if BREAK not in text:
        return token_ids(tokenizer, text)
    return _names(tokenizer).encode(text)


def unbroken(text: str) -> str:
    """A rendered text as people read it."""
    return text.replace(BREAK, "")


def framed_as_special(backend: str) -> str:
    """A tokenizer in JSON, whose tokens `<|…|>` are all special: some releases forget those to fill in the middle."""
    described = json.loads(backend)
    for token in described["added_tokens"]:
        token["special"] = token["special"] or bool(FRAMED.fullmatch(token["content"]))
    return json.dumps(described)


class _Names:
    """Control tokens of one tokenizer, by name."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        template = str(getattr(tokenizer, "chat_template", None) or "")
        self.added = added = getattr(tokenizer, "added_tokens_decoder", {})
        self.byte_level = "ByteLevel" in str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
        self._tokenizer = tokenizer
        self.control = {
            number: t.content
            for number, t in added.items()
            if len(t.content) > 1 and (t.special or t.content in THINK or _is_mark(t.content, template))
        }
        self.anyone = _pattern(self.control.values())
        model = [
            name
            for number, name in self.control.items()
            if name not in THINK and not SPOKEN.match(name) and (added[number].special or FRAMED.fullmatch(name))
        ]
        self.model = _pattern(model)
        self._letters: Any = None
        self._wall = ""

    def encode(self, text: str) -> list[int]:
        """The tokenizer finds the template's control tokens; what lies between is read by one that knows no names."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = []
        between: list[int] = []
        at = 0  # where what lies between begins

        def close(end: int) -> list[int]:
            stretch = text[at:end]
            return between if BREAK not in stretch else self._spell(stretch.replace(BREAK, ""), first=at == 0)

        for number, (start, end) in zip(found.input_ids, found.offset_mapping, strict=True):
            if number in self.control:
                ids += [*close(start), number]
                between, at = [], end
            else:
                between.append(number)
        return ids + close(len(text))

    def _spell(self, text: str, first: bool) -> list[int]:
        if self._letters is None:
            self._letters, self._wall = _nameless(self._tokenizer, self.control)
        if first:
            return self._letters.encode(text, add_special_tokens=False).ids
        return self._letters.encode(self._wall + text, add_special_tokens=False).ids[1:]


_known: "WeakKeyDictionary[Any, tuple[Any, _Names]]" = WeakKeyDictionary()


def _names(tokenizer: "PreTrainedTokenizerFast") -> _Names:
    state = getattr(tokenizer, "chat_template", None), getattr(tokenizer, "__len__", int)()
    found = _known.get(tokenizer)
    if found is None or found[0] != state:
        _known[tokenizer] = found = state, _Names(tokenizer)
    return found[1]


def _is_mark(name: str, template: str) -> bool:
    """Of an added token that is not called special: some tokenizers have HTML's tags among these, which are text."""
    return bool(FRAMED.fullmatch(name) or (SHAPE.fullmatch(name) and (name in template or name in TOOL)))


def _pattern(names: Any) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _break(value: Any, names: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return names.sub(lambda m: m[0][0] + BREAK + m[0][1:], value.replace(BREAK, ""))
    if isinstance(value, dict):
        return {_break(key, names): _break(inner, names) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_break(inner, names) for inner in value]
    return value


def _nameless(tokenizer: "PreTrainedTokenizerFast", control: dict[int, str]) -> tuple[Any, str]:
    """The tokenizer with control tokens of other names, which no text holds; and one of these names."""
    from tokenizers import Tokenizer

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described |= {"post_processor": None, "truncation": None, "padding": None}
    other = {name: f"{BREAK}{number}{BREAK}" for number, name in control.items()}
    for token in described["added_tokens"]:
        if token["content"] in other:
            token |= {"content": other[token["content"]], "lstrip": False, "rstrip": False, "single_word": False}
            token["normalized"] = False
    vocabulary = described["model"].get("vocab")
    if isinstance(vocabulary, dict):
        described["model"]["vocab"] = {other.get(name, name): number for name, number in vocabulary.items()}
    elif isinstance(vocabulary, list):  # of a Unigram model
        described["model"]["vocab"] = [[other.get(name, name), score] for name, score in vocabulary]
    return Tokenizer.from_str(json.dumps(described)), next(iter(other.values()))
