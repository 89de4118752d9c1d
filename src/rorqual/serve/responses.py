"""Responses in OpenAI's form, whole or in chunks, with DeepSeek's fields for reasoning and cache hits."""

import codecs
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from rorqual.engine import Engine
from rorqual.serve.engine_thread import TokenDelta
from rorqual.serve.tool_calls import CallReader, ToolCallDelta

ENCODE = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder at every call
MIN_LOGPROB = -9999.0  # OpenAI's stand-in for -∞, which JSON lacks: of tokens that a grammar forbids, for instance


class Vocabulary:
    """Text and bytes of single tokens."""

    def __init__(self, engine: Engine) -> None:
        assert engine.token_decoder is not None
        self.decoder = engine.token_decoder
        self.bytes = engine.token_decoder.bytes
        # Not part of a chat answer's text.
        self.hidden = {*engine.token_decoder.hidden, *(engine.thinking_marks or ())}

    def text(self, token: int) -> str:
        return self.bytes(token).decode(errors="replace")

    def logprob(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB


def ranked(token: int, logprob: float, top: list[tuple[int, float]], count: int) -> list[tuple[int, float]]:
    """The `count` most probable tokens at a position, the sampled one first among equals."""
    others = [pair for pair in top[:count] if pair[0] != token]
    if len(others) == count and (not others or not logprob >= others[-1][1]):
        return others
    return sorted([(token, logprob), *others], key=lambda pair: -finite(pair[1]))[:count]


@dataclass
class Usage:
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "prompt_cache_hit_tokens": self.cached_tokens,
            "prompt_cache_miss_tokens": self.prompt_tokens - self.cached_tokens,
        }


@dataclass
class ResponseHeader:
    """The fields common to all chunks of a response."""

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
        """A chunk as JSON; only the choices are encoded for every token."""
        end = "" if usage is None else f', "usage": {ENCODE(usage.as_dict())}'
        return f"{self._begin}{ENCODE(choices)}{end}}}"

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


@dataclass
class ChatChoice:
    """One choice of a chat completion, as it is generated."""

    index: int
    vocabulary: Vocabulary
    reader: CallReader | None
    logprobs: bool
    top: int
    reasoning: str = ""
    content: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)
    logprob_entries: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {"content": [], "reasoning_content": []}
    )
    finish: str | None = None
    reasoning_tokens: int = 0
    tokens: int = 0

    def add(self, new: TokenDelta) -> dict[str, Any] | None:
        """Add a delta → the choice of a chunk, or None where there is nothing to send yet."""
        last = new.finish is not None
        shown, calls = (new.content, []) if self.reader is None else self.reader.feed(new.content, last)
        logprobs_body = self._logprobs(new)
        self.reasoning += new.reasoning
        self.content += shown
        self.tokens += len(new.tokens)
        self.reasoning_tokens = new.reasoning_tokens
        delta: dict[str, Any] = {}
        if new.reasoning:
            delta["reasoning_content"] = new.reasoning
        if shown:
            delta["content"] = shown
        if calls:
            delta["tool_calls"] = [{"index": len(self.calls) + i} | c.as_dict() for i, c in enumerate(calls)]
            self.calls += calls
        if last:
            # "length": the answer was cut off, perhaps before another call.
            whole = new.finish == "stop" and not (self.reader and self.reader.cut_off)
            self.finish = "tool_calls" if self.calls and whole else new.finish
        if not delta and not last and logprobs_body is None:
            return None
        return {"index": self.index, "delta": delta, "logprobs": logprobs_body, "finish_reason": self.finish}

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
        logprobs_body = self.logprob_entries if self.logprobs else None
        return {"index": self.index, "message": message, "logprobs": logprobs_body, "finish_reason": self.finish}

    def _logprobs(self, new: TokenDelta) -> dict[str, Any] | None:
        """Log-probabilities of a delta, of thinking and answer apart, without hidden tokens."""
        if not self.logprobs:
            return None
        found: dict[str, list[dict[str, Any]]] = {"content": [], "reasoning_content": []}
        for i, (token, logprob) in enumerate(zip(new.tokens, new.logprobs, strict=True)):
            if token in self.vocabulary.hidden:
                continue
            entry = self.vocabulary.logprob(token, logprob)
            best = ranked(token, logprob, new.top[i], self.top) if new.top else []
            entry["top_logprobs"] = [self.vocabulary.logprob(*pair) for pair in best]
            found["reasoning_content" if i < new.reasoning_prefix else "content"].append(entry)
        for name, entries in found.items():
            self.logprob_entries[name] += entries
        return found


@dataclass
class TextChoice:
    """One choice of a text completion, as it is generated; `echo`: the prompt, where it is to be repeated."""

    index: int
    vocabulary: Vocabulary
    top: int | None  # most probable tokens to report; None: no log-probabilities at all
    echo: str = ""
    text: str = ""
    logprob_entries: dict[str, list[Any]] = field(
        default_factory=lambda: {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    )
    finish: str | None = None
    reasoning_tokens: int = 0
    tokens: int = 0
    _utf8: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    _length: int = 0  # characters of the text up to here, for text_offset

    def prompt(self, tokens: list[int], logprobs: list[float | None], top: list[list[tuple[int, float]]]) -> None:
        """Add the prompt's log-probabilities; its first token has none."""
        # SentencePiece prepends a space, which is not part of the prompt as sent.
        self._length = min(0, len(self.echo) - len(self.vocabulary.decoder.decode(tokens)))
        self._add_logprobs(tokens, logprobs, top)
        self._length = len(self.echo)

    def add(self, new: TokenDelta) -> dict[str, Any] | None:
        """Add a delta → the choice of a chunk, or None where there is nothing to send yet."""
        text, logprobs_body = new.content if self.tokens else self.echo + new.content, None
        if self.top is not None:
            # The first chunk has the prompt's too.
            before = {name: len(values) if self.tokens else 0 for name, values in self.logprob_entries.items()}
            self._add_logprobs(new.tokens, new.logprobs, new.top)
            logprobs_body = {name: self.logprob_entries[name][start:] for name, start in before.items()}
        self.text += text
        self.tokens += len(new.tokens)
        self.reasoning_tokens = new.reasoning_tokens
        self.finish = new.finish
        if not text and self.finish is None and logprobs_body is None:
            return None
        return {"index": self.index, "text": text, "logprobs": logprobs_body, "finish_reason": self.finish}

    def echoed(self) -> dict[str, Any]:
        """The choice with the prompt alone."""
        self.text, self.finish = self.echo, "length"
        return self.whole()

    def whole(self) -> dict[str, Any]:
        logprobs_body = None if self.top is None else self.logprob_entries
        return {"index": self.index, "text": self.text, "logprobs": logprobs_body, "finish_reason": self.finish}

    def _add_logprobs(self, tokens: list[int], logprobs: Any, top: list[list[tuple[int, float]]]) -> None:
        """Add tokens' log-probabilities.

        `text_offset` counts characters of the text: all tokens of one character have its offset, and hidden tokens have
        no width. Of tokens with the same text, `top_logprobs` has the sampled one, else the most probable.
        """
        if self.top is None:
            return
        read = self.vocabulary.text
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            self.logprob_entries["tokens"].append(read(token))
            self.logprob_entries["token_logprobs"].append(None if logprob is None else finite(logprob))
            found: dict[str, float] = {}
            if top and self.top and logprob is not None:
                for other, value in [*ranked(token, logprob, top[i], self.top), (token, logprob)]:
                    found.setdefault(read(other), finite(value))
                found[read(token)] = finite(logprob)
            self.logprob_entries["top_logprobs"].append(found or None)
            self.logprob_entries["text_offset"].append(max(0, self._length))
            if token not in self.vocabulary.decoder.hidden:
                self._length += len(self._utf8.decode(self.vocabulary.bytes(token)))
