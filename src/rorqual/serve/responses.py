"""Responses in OpenAI's form, whole or in chunks, with DeepSeek's fields for reasoning and cache hits."""

import codecs
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from rorqual.data.call_reader import CallReader
from rorqual.engine import Engine
from rorqual.engine.outputs import TokenDelta, TopLogprobs
from rorqual.engine.sequence import Request
from rorqual.serve.json_types import (
    ChatChunkChoice,
    ChatDeltaJson,
    ChatLogprobs,
    ChatMessageChoice,
    ChoiceJson,
    MessageJson,
    ResponseJson,
    TextJson,
    TextLogprobs,
    TokenLogprob,
    ToolCallJson,
    UsageJson,
)
from rorqual.serve.tool_calls import ToolCallDelta

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

    def logprob(self, token: int, logprob: float) -> TokenLogprob:
        raw = self.bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB


def ranked(token: int, logprob: float, top: TopLogprobs, count: int) -> TopLogprobs:
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

    @classmethod
    def of(cls, requests: list[Request]) -> "Usage":
        """Of finished requests."""
        sequences = [sequence for request in requests for sequence in request.sequences]
        return cls(
            sum(len(request.prompt) for request in requests),
            sum(request.cached_tokens for request in requests),
            sum(len(sequence.tokens) for sequence in sequences),
            sum(sequence.detokenizer.reasoning_tokens for sequence in sequences if sequence.detokenizer is not None),
        )

    def as_dict(self) -> UsageJson:
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

    def whole(self, choices: Sequence[ChoiceJson], usage: Usage) -> ResponseJson:
        return {**self._body(self.kind, choices), "usage": usage.as_dict()}

    def chunk(self, choices: Sequence[ChoiceJson], usage: Usage | None = None) -> str:
        """A chunk as JSON; only the choices are encoded for every token."""
        end = "" if usage is None else f', "usage": {ENCODE(usage.as_dict())}'
        return f"{self._begin}{ENCODE(choices)}{end}}}"

    def _body(self, kind: str, choices: Sequence[ChoiceJson]) -> ResponseJson:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": list(choices),
        }  # fmt: skip


@dataclass
class ChatChoice:
    """One choice of a chat completion, as it is generated."""

    index: int
    vocabulary: Vocabulary
    reader: CallReader | None
    logprobs: bool
    top: int
    reasoning: list[str] = field(default_factory=list)  # its pieces
    content: list[str] = field(default_factory=list)
    calls: list[ToolCallDelta] = field(default_factory=list)
    logprob_entries: ChatLogprobs = field(default_factory=lambda: {"content": [], "reasoning_content": []})
    finish_reason: str | None = None

    def add(self, new: TokenDelta) -> ChatChunkChoice | None:
        """Add a delta → the choice of a chunk, or None where there is nothing to send yet."""
        last = new.finish_reason is not None
        shown, read = (new.content, []) if self.reader is None else self.reader.feed(new.content, last)
        calls = [ToolCallDelta(call) for call in read]
        logprobs = self._logprobs(new)
        delta: ChatDeltaJson = {}
        if new.reasoning:
            delta["reasoning_content"] = new.reasoning
            self.reasoning.append(new.reasoning)
        if shown:
            delta["content"] = shown
            self.content.append(shown)
        if calls:
            delta["tool_calls"] = [_numbered(len(self.calls) + i, c.as_dict()) for i, c in enumerate(calls)]
            self.calls += calls
        if last:
            # "length": the answer was cut off, perhaps before another call.
            whole = new.finish_reason == "stop" and not (self.reader and self.reader.cut_off)
            self.finish_reason = "tool_calls" if self.calls and whole else new.finish_reason
        if not delta and not last and logprobs is None:
            return None
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def first(self) -> ChatChunkChoice:
        delta: ChatDeltaJson = {"role": "assistant", "content": ""}
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self) -> ChatMessageChoice:
        content = "".join(self.content)
        message: MessageJson = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = [c.as_dict() for c in self.calls]
            message["content"] = content or None
        logprobs = self.logprob_entries if self.logprobs else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def _logprobs(self, new: TokenDelta) -> ChatLogprobs | None:
        """Log-probabilities of a delta, of thinking and answer apart, without hidden tokens."""
        if not self.logprobs:
            return None
        found: ChatLogprobs = {"content": [], "reasoning_content": []}
        for i, (token, logprob) in enumerate(zip(new.tokens, new.logprobs, strict=True)):
            if token in self.vocabulary.hidden:
                continue
            entry = self.vocabulary.logprob(token, logprob)
            best = ranked(token, logprob, new.top_logprobs[i], self.top) if new.top_logprobs else []
            entry["top_logprobs"] = [self.vocabulary.logprob(*pair) for pair in best]
            found["reasoning_content" if i < new.reasoning_prefix else "content"].append(entry)
        self.logprob_entries["content"] += found["content"]
        self.logprob_entries["reasoning_content"] += found["reasoning_content"]
        return found


def _numbered(index: int, call: ToolCallJson) -> ToolCallJson:
    """A call in a chunk, which has its index first."""
    return {"index": index, **call}


@dataclass
class TextChoice:
    """One choice of a text completion, as it is generated; `echo`: the prompt, where it is to be repeated."""

    index: int
    vocabulary: Vocabulary
    top: int | None  # most probable tokens to report; None: no log-probabilities at all
    echo: str = ""
    text: list[str] = field(default_factory=list)  # its pieces
    logprob_entries: TextLogprobs = field(
        default_factory=lambda: {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    )
    finish_reason: str | None = None
    _utf8: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    _length: int = 0  # characters of the text up to here, for text_offset

    def prompt(self, tokens: list[int], logprobs: list[float | None], top: list[TopLogprobs]) -> None:
        """Add the prompt's log-probabilities; its first token has none."""
        # SentencePiece prepends a space, which is not part of the prompt as sent.
        self._length = min(0, len(self.echo) - len(self.vocabulary.decoder.decode(tokens)))
        self._add_logprobs(tokens, logprobs, top)
        self._length = len(self.echo)

    def add(self, new: TokenDelta) -> TextJson | None:
        """Add a delta → the choice of a chunk, or None where there is nothing to send yet."""
        first = not self.text
        logprobs: TextLogprobs | None = None
        text = self.echo + new.text if first else new.text
        if self.top is not None:
            entries = self.logprob_entries
            start = 0 if first else len(entries["tokens"])  # the first chunk has the prompt's too
            self._add_logprobs(new.tokens, new.logprobs, new.top_logprobs)
            logprobs = {
                "tokens": entries["tokens"][start:],
                "token_logprobs": entries["token_logprobs"][start:],
                "top_logprobs": entries["top_logprobs"][start:],
                "text_offset": entries["text_offset"][start:],
            }
        self.text.append(text)
        self.finish_reason = new.finish_reason
        if not text and self.finish_reason is None and logprobs is None:
            return None
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def echoed(self) -> TextJson:
        """The choice with the prompt alone."""
        self.text, self.finish_reason = [self.echo], "length"
        return self.whole()

    def whole(self) -> TextJson:
        logprobs = None if self.top is None else self.logprob_entries
        text = "".join(self.text)
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def _add_logprobs(self, tokens: list[int], logprobs: Sequence[float | None], top: list[TopLogprobs]) -> None:
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
