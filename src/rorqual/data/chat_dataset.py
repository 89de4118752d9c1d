"""Chat data for supervised fine-tuning, with the loss on assistant turns only."""

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from rorqual.data.chat_messages import Message, Tool, read_messages, read_tools, without_nulls
from rorqual.data.chat_template import ChatTemplate
from rorqual.data.corpus import RECORDS, Record, find_files, named, read_records
from rorqual.data.special_tokens import encode, unescape
from rorqual.data.token_shards import Documents
from rorqual.data.tool_formats import as_json, as_object
from rorqual.errors import UserError
from rorqual.tokenizer_protocol import Tokenizer

Segment = tuple[str, bool]  # text, and whether it is trained on
Sample = tuple[list[int], list[int]]  # tokens and loss mask (1: trained on)


@dataclass(frozen=True)
class ChatSplit:
    """`shortened`: samples cut at the sequence length; `unended`: those of them that are kept, but whose last assistant
    turn does not end within it; `dropped`: samples without an assistant token within it.
    """

    train: Documents
    valid: Documents
    shortened: int
    dropped: int
    unended: int = 0
    sizes: tuple[int, int] = (0, 0)  # tokens of the shortest and the longest sample, before they are cut

    def cuts(self, path: str, field: str, length: int) -> str | None:
        """What was cut at `field` = `length`, as a sentence for the user; None where all samples are whole."""
        if not (self.shortened or self.dropped):
            return None
        kept = len(self.train) + len(self.valid)
        said = (
            f"{path}: {self.shortened} of {kept + self.dropped} samples were cut at {field} = {length}, {self.unended} "
            f"of them within their last answer, and {self.dropped} were dropped (no assistant token within it); they "
            f"have {_span(self.sizes)}"
        )
        if self.unended < kept:
            return said
        return f"warning: {said}; no sample shows how an answer ends, so the model learns none: raise {field}"


def _span(sizes: tuple[int, int]) -> str:
    shortest, longest = sizes
    return f"{shortest} to {longest} tokens" if shortest < longest else f"{longest} tokens"


def read_chat(
    path: str,
    tokenizer: Tokenizer,
    sequence_length: int,
    valid_fraction: float = 0.0,
    length_field: str = "data.sequence_length",
) -> ChatSplit:
    """Tokenise every sample of a .jsonl, .jsonl.gz or .parquet file, or glob of them.

    A record has `messages`, or `prompt` and `completion`: both lists of messages, or both strings, which are used
    without the chat template and end with the eos token. Messages are as in OpenAI's API, with `tool_calls` and
    results; `tools` beside them are described to the model as in serving. Special-token names in messages are text,
    except an assistant's thinking and calls (special_tokens.py). An assistant message of `weight` 0 is not trained on.
    length_field: what the recipe calls the length. Raises UserError naming file and line for an invalid record.
    """
    from rich.console import Console
    from rich.progress import track

    samples = {False: _Samples(), True: _Samples()}
    template = ChatTemplate(tokenizer)
    shortened = dropped = unended = 0
    shortest, longest = sys.maxsize, 0
    records = (pair for file in find_files(path, RECORDS) for pair in _records(file))
    console = Console(stderr=True)
    for where, record in track(
        records, f"tokenising {path}", console=console, transient=True, disable=not console.is_terminal
    ):
        tokens, mask = encode_sample(record, tokenizer, where, template)
        shortest, longest = min(shortest, len(tokens)), max(longest, len(tokens))
        beyond = mask[sequence_length + 1 :]
        if beyond:
            tokens, mask = tokens[: sequence_length + 1], mask[: sequence_length + 1]
            shortened += 1
        if not any(mask[1:]):
            dropped += 1
            continue
        unended += any(beyond)
        digest = blake2b(np.array(tokens, np.int64).data, digest_size=8).digest()
        held_out = int.from_bytes(digest, "little") < valid_fraction * 2**64
        samples[held_out].append(tokens, mask)
    if not samples[False] and not samples[True]:
        sizes = f" (they have {_span((shortest, longest))})" if longest else ""
        raise UserError(
            f"{path} has no sample with an assistant turn within {length_field} = {sequence_length}{sizes}; check the "
            f"file, or raise {length_field}"
        )
    if not samples[False]:
        samples[False].append(*samples[True].pop())
    if valid_fraction and not samples[True] and len(samples[False]) > 1:
        samples[True].append(*samples[False].pop())
    train, valid = samples[False].documents(), samples[True].documents()
    return ChatSplit(train, valid, shortened, dropped, unended, (shortest, longest))


def _records(file: Path) -> Iterator[tuple[str, Record]]:
    for where, record in read_records(file):
        yield where, without_nulls(record) if named(file, ".parquet") else record


class _Samples:
    """Concatenated samples, 5 bytes per token: as lists of Python integers they took 60."""

    def __init__(self) -> None:
        self.tokens, self.mask, self.ends = array("i"), array("B"), array("q", [0])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def append(self, tokens: Sequence[int], mask: Sequence[int]) -> None:
        self.tokens.extend(tokens)
        self.mask.extend(mask)
        self.ends.append(len(self.tokens))

    def pop(self) -> tuple["array[int]", "array[int]"]:
        self.ends.pop()
        start = self.ends[-1]
        last = self.tokens[start:], self.mask[start:]
        del self.tokens[start:], self.mask[start:]
        return last

    def documents(self) -> Documents:
        return Documents(
            np.frombuffer(self.tokens, np.int32), np.array(self.ends, np.int64), np.frombuffer(self.mask, np.uint8)
        )


def encode_sample(
    record: Record,
    tokenizer: Tokenizer,
    where: str = "sample",
    template: ChatTemplate | None = None,
) -> Sample:
    """Tokens and loss mask of one record. template: the tokenizer's, reused across records.

    Raises UserError, which begins with `where`, for an invalid record.
    """
    tokens: list[int] = []
    mask: list[int] = []
    # Segments are encoded one by one, as in generation, so that no token spans prompt and answer.
    for text, trained in _segments(record, tokenizer, template or ChatTemplate(tokenizer), where):
        try:
            ids = encode(text, tokenizer, after=tokens[-1] if tokens else None)
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        tokens += ids
        mask += [int(trained)] * len(ids)
    return tokens, mask


def _segments(record: Record, tokenizer: Tokenizer, template: ChatTemplate, where: str) -> Iterator[Segment]:
    field = "functions" if record.get("tools") is None else "tools"  # OpenAI's name before tools
    tools = read_tools(record.get(field), f"{where}: {field}")
    prompt, completion = record.get("prompt"), record.get("completion")
    if record.get("messages") is not None:
        yield from _turns(_messages(record["messages"], f"{where}: messages"), 0, tools, template, where)
    elif isinstance(prompt, str) and isinstance(completion, str):
        if tools:
            raise UserError(f"{where}: tools need the chat template, but the prompt is text; give messages")
        end = tokenizer.eos_token or ""
        yield prompt, False
        yield completion if end and completion.endswith(end) else completion + end, True
    elif prompt is not None and completion is not None and not isinstance(prompt, str):
        if not isinstance(prompt, list) or not isinstance(completion, list) or not completion:
            raise UserError(
                f"{where}: prompt and completion must both be text, or both lists of messages; correct them"
            )
        messages = _messages([*prompt, *completion], f"{where}: prompt and completion")
        yield from _turns(messages, len(prompt), tools, template, where)
    else:
        given = sorted(name for name, value in record.items() if value is not None)
        raise UserError(
            f"{where} has neither messages nor prompt and completion (both text or both lists of messages) but "
            f"{given}; correct it"
        )


def _messages(value: object, where: str) -> list[Message]:
    messages = read_messages(value, where)
    for n, message in enumerate(messages):
        if message["content"] is None and "tool_calls" not in message:
            raise UserError(f"{where}.{n}: needs a content, or an assistant's tool_calls; correct it")
        if (weight := message.get("weight", 1)) not in (0, 1):
            raise UserError(f"{where}.{n}.weight: must be 0 or 1, not {weight!r:.80}; correct it")
    return messages


def _turns(
    messages: list[Message], first: int, tools: list[Tool] | None, template: ChatTemplate, where: str
) -> Iterator[Segment]:
    """The rendered conversation, split into prompts and assistant turns, from message `first` on.

    A turn is what the template appends to its prompt. That holds for any template that never changes earlier text; one
    that does raises UserError instead of giving a wrong mask.
    """

    def render(count: int, generation: bool) -> str:
        try:
            return template.render(messages[:count], tools, generation)
        except UserError as e:
            raise UserError(f"{where}: {e}") from e

    done, end = "", template.tokenizer.eos_token
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < first or message.get("weight") == 0:
            continue
        prompt = render(i, True) if i else ""
        answered = render(i + 1, False)
        if not (prompt.startswith(done) and answered.startswith(prompt)):
            raise UserError(
                f"{where}: the chat template changes earlier text when message {i + 1} is added, so the assistant's "
                f"part cannot be located; give this conversation as prompt and completion, both text"
            )
        answer = answered[len(prompt) :]
        if not all(text in unescape(answer) for text in _required_texts(message)):
            raise UserError(
                f"{where}: the chat template omits part of message {i + 1} (such as its thinking); give this "
                f"conversation as prompt and completion, both text"
            )
        several = len(message.get("tool_calls", [])) > 1
        if several and (not template.tool_support(bool(tools)).parallel_calls or answer.count(end or "\0") > 1):
            raise UserError(
                f"{where}: the chat template ends a turn with each call, but message {i + 1} makes several; split it"
            )
        if end and end in answer:  # text after the end token is never generated
            answer = answer[: answer.rindex(end) + len(end)]
        yield prompt[len(done) :], False
        yield answer, True
        done = prompt + answer


def _required_texts(message: Message) -> Iterator[str]:
    """Texts of an assistant's message that every template must render unchanged."""
    yield (message["content"] or "").strip()
    yield from (str(message.get(name, "")).strip() for name in ("reasoning_content", "reasoning", "thinking"))
    for call in message.get("tool_calls", []):
        names = [call["function"]["name"], *(as_object(call["function"]["arguments"]) or {})]
        yield from (name for name in names if name.isascii() and as_json(name) == f'"{name}"')
