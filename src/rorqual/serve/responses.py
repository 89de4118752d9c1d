"""Answers as OpenAI's clients read them, whole or in chunks, with DeepSeek's fields for reasoning and cache hits."""

import codecs
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from rorqual.engine import Engine
from rorqual.serve.engine_thread import TokenDelta
from rorqual.serve.tool_calls import CallReader, Made

ENCODE = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder every time
IMPOSSIBLE = -9999.0  # OpenAI's log-probability of what cannot be, such as what a grammar forbids; JSON has no infinity


class Vocabulary:
    """What single tokens stand for."""

    def __init__(self, engine: Engine) -> None:
        assert engine.token_decoder is not None
        self.speller = engine.token_decoder
        self.bytes = engine.token_decoder.bytes
        self.hidden = {
            *engine.token_decoder.hidden,
            *(engine.thinking_marks or ()),
        }  # not part of what a chat's answer shows

    def text(self, token: int) -> str:
        return self.bytes(token).decode(errors="replace")

    def logprob(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    """As JSON has it."""
    return logprob if logprob > IMPOSSIBLE else IMPOSSIBLE


def ranked(token: int, logprob: float, top: list[tuple[int, float]], count: int) -> list[tuple[int, float]]:
    """The `count` most probable tokens at a place; the chosen one, first among equals, with its own number."""
    others = [pair for pair in top[:count] if pair[0] != token]
    if len(others) == count and (not others or not logprob >= others[-1][1]):
        return others
    return sorted([(token, logprob), *others], key=lambda pair: -finite(pair[1]))[:count]


@dataclass
class Usage:
    prompt: int
    cached: int = 0
    made: int = 0
    reasoning: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.made,
            "total_tokens": self.prompt + self.made,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
            "prompt_cache_hit_tokens": self.cached,
            "prompt_cache_miss_tokens": self.prompt - self.cached,
        }


@dataclass
class ResponseHeader:
    """What every chunk of an answer repeats."""

    kind: str  # "chat.completion" or "text_completion"
    model: str
    prefix: str

    def __post_init__(self) -> None:
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        chunk = self._body(self.kind + ".chunk" * self.kind.startswith("chat"), [])
        self._begin = ENCODE(chunk).removesuffix("[]}")

    def whole(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return self._body(self.kind, choices) | {"usage": usage.as_dict()}

    def chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> str:
        """As JSON; only the choices are written anew for every token."""
        end = "" if usage is None else f', "usage": {ENCODE(usage.as_dict())}'
        return f"{self._begin}{ENCODE(choices)}{end}}}"

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


@dataclass
class ChatChoice:
    """One answer of a chat, as it grows."""

    index: int
    vocabulary: Vocabulary
    reader: CallReader | None
    logprobs: bool
    top: int
    reasoning: str = ""
    content: str = ""
    calls: list[Made] = field(default_factory=list)
    likely: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"content": [], "reasoning_content": []})
    finish: str | None = None
    reasoning_tokens: int = 0
    tokens: int = 0

    def take(self, piece: TokenDelta) -> dict[str, Any] | None:
        """Add a piece; gives the choice for a chunk, or None where there is nothing to show yet."""
        last = piece.finish is not None
        shown, calls = (piece.content, []) if self.reader is None else self.reader.feed(piece.content, last)
        likely = self._likely(piece)
        self.reasoning += piece.reasoning
        self.content += shown
        self.tokens += len(piece.tokens)
        self.reasoning_tokens = piece.reasoning_tokens
        delta: dict[str, Any] = {}
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if shown:
            delta["content"] = shown
        if calls:
            delta["tool_calls"] = [{"index": len(self.calls) + i} | c.as_dict() for i, c in enumerate(calls)]
            self.calls += calls
        if last:
            # "length" says that more was to come, of which there may be another call.
            whole = piece.finish == "stop" and not (self.reader and self.reader.cut_off)
            self.finish = "tool_calls" if self.calls and whole else piece.finish
        if not delta and not last and likely is None:
            return None
        return {"index": self.index, "delta": delta, "logprobs": likely, "finish_reason": self.finish}

    def first(self) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [c.as_dict() for c in self.calls]
            message["content"] = self.content or None
        likely = self.likely if self.logprobs else None
        return {"index": self.index, "message": message, "logprobs": likely, "finish_reason": self.finish}

    def _likely(self, piece: TokenDelta) -> dict[str, Any] | None:
        """Log-probabilities of a piece, those of thoughts apart; tokens that no text shows are left out."""
        if not self.logprobs:
            return None
        found: dict[str, list[dict[str, Any]]] = {"content": [], "reasoning_content": []}
        for i, (token, logprob) in enumerate(zip(piece.tokens, piece.logprobs, strict=True)):
            if token in self.vocabulary.hidden:
                continue
            entry = self.vocabulary.logprob(token, logprob)
            best = ranked(token, logprob, piece.top[i], self.top) if piece.top else []
            entry["top_logprobs"] = [self.vocabulary.logprob(*pair) for pair in best]
            found["reasoning_content" if i < piece.thoughts else "content"].append(entry)
        for name, entries in found.items():
            self.likely[name] += entries
        return found


@dataclass
class TextChoice:
    """One continuation of a text, as it grows; `echo` is the prompt, where it is to be repeated."""

    index: int
    vocabulary: Vocabulary
    top: int | None  # most probable tokens to report; None: no log-probabilities at all
    echo: str = ""
    text: str = ""
    likely: dict[str, list[Any]] = field(
        default_factory=lambda: {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    )
    finish: str | None = None
    reasoning_tokens: int = 0
    tokens: int = 0
    _utf8: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    _length: int = 0  # of the text that tokens with log-probabilities make

    def prompt(self, tokens: list[int], logprobs: list[float | None], top: list[list[tuple[int, float]]]) -> None:
        """Log-probabilities of the prompt itself, the first token having none."""
        # SentencePiece puts a space before a text, which is no part of what was sent.
        self._length = min(0, len(self.echo) - len(self.vocabulary.speller.decode(tokens)))
        self._note(tokens, logprobs, top)
        self._length = len(self.echo)

    def take(self, piece: TokenDelta) -> dict[str, Any] | None:
        said, likely = piece.content if self.tokens else self.echo + piece.content, None
        if self.top is not None:
            # With the first piece the prompt's are shown too.
            before = {name: len(values) if self.tokens else 0 for name, values in self.likely.items()}
            self._note(piece.tokens, piece.logprobs, piece.top)
            likely = {name: self.likely[name][start:] for name, start in before.items()}
        self.text += said
        self.tokens += len(piece.tokens)
        self.reasoning_tokens = piece.reasoning_tokens
        self.finish = piece.finish
        if not said and self.finish is None and likely is None:
            return None
        return {"index": self.index, "text": said, "logprobs": likely, "finish_reason": self.finish}

    def echoed(self) -> dict[str, Any]:
        """The prompt alone."""
        self.text, self.finish = self.echo, "length"
        return self.whole()

    def whole(self) -> dict[str, Any]:
        likely = None if self.top is None else self.likely
        return {"index": self.index, "text": self.text, "logprobs": likely, "finish_reason": self.finish}

    def _note(self, tokens: list[int], logprobs: Any, top: list[list[tuple[int, float]]]) -> None:
        """`text_offset` counts characters of the text: parts of one all begin where it does, and what is not shown
        takes no place. Where tokens read the same, `top_logprobs` has the chosen one, else the most probable.
        """
        if self.top is None:
            return
        read = self.vocabulary.text
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            self.likely["tokens"].append(read(token))
            self.likely["token_logprobs"].append(None if logprob is None else finite(logprob))
            found: dict[str, float] = {}
            if top and self.top and logprob is not None:
                for other, value in [*ranked(token, logprob, top[i], self.top), (token, logprob)]:
                    found.setdefault(read(other), finite(value))
                found[read(token)] = finite(logprob)
            self.likely["top_logprobs"].append(found or None)
            self.likely["text_offset"].append(max(0, self._length))
            if token not in self.vocabulary.speller.hidden:
                self._length += len(self._utf8.decode(self.vocabulary.bytes(token)))
