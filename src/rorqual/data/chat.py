"""Chat data for supervised fine-tuning: the loss is on the assistant's turns only."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from rorqual.data.corpus import find_files, read_records
from rorqual.data.marks import encode, plain_message
from rorqual.data.shards import Documents
from rorqual.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Piece = tuple[str, bool]  # text, and whether it bears loss
Sample = tuple[list[int], list[int]]  # tokens, and for each 1 where it bears loss


@dataclass(frozen=True)
class ChatSplit:
    """`shortened` samples were cut at the sequence length; `dropped` had no assistant's token within it."""

    train: Documents
    valid: Documents
    shortened: int
    dropped: int


def read_chat(
    path: str, tokenizer: "PreTrainedTokenizerFast", sequence_length: int, valid_fraction: float = 0.0
) -> ChatSplit:
    """Tokenise every sample of a .jsonl, .jsonl.gz or .parquet file, or glob of them.

    A record holds `messages` (role and content), or `prompt` and `completion`: either both lists of messages, or
    both strings, which are taken as they are, without the chat template, and ended with the eos token. In messages
    the names of control tokens are text, but for an assistant's thoughts and calls (rorqual.data.marks).
    Raises UserError naming file and line for whatever does not fit.
    """
    from rich.console import Console
    from rich.progress import track

    samples: dict[bool, list[Sample]] = {False: [], True: []}
    shortened = dropped = 0
    records = (pair for file in find_files(path) for pair in read_records(file))
    console = Console(stderr=True)
    for where, record in track(
        records, f"tokenising {path}", console=console, transient=True, disable=not console.is_terminal
    ):
        tokens, marks = encode_sample(record, tokenizer, where)
        if len(tokens) > sequence_length + 1:
            tokens, marks = tokens[: sequence_length + 1], marks[: sequence_length + 1]
            shortened += 1
        if not any(marks[1:]):
            dropped += 1
            continue
        digest = blake2b(np.array(tokens, np.int64), digest_size=8).digest()
        held_out = int.from_bytes(digest, "little") < valid_fraction * 2**64
        samples[held_out].append((tokens, marks))
    if not samples[False] and not samples[True]:
        raise UserError(
            f"{path} holds no sample with an assistant's turn within data.sequence_length = {sequence_length}; "
            f"check the file or raise sequence_length"
        )
    if not samples[False]:
        samples[False].append(samples[True].pop())
    if valid_fraction and not samples[True] and len(samples[False]) > 1:
        samples[True].append(samples[False].pop())
    return ChatSplit(_documents(samples[False]), _documents(samples[True]), shortened, dropped)


def encode_sample(record: dict[str, Any], tokenizer: "PreTrainedTokenizerFast", where: str = "sample") -> Sample:
    """One record's tokens, and for each 1 where it bears loss, else 0."""
    tokens: list[int] = []
    marks: list[int] = []
    # Pieces are encoded one by one, as they are when a model answers, so no token spans prompt and answer.
    for text, bears_loss in _pieces(record, tokenizer, where):
        try:
            ids = encode(text, tokenizer, after=tokens[-1] if tokens else None)
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        tokens += ids
        marks += [int(bears_loss)] * len(ids)
    return tokens, marks


def _pieces(record: dict[str, Any], tokenizer: "PreTrainedTokenizerFast", where: str) -> Iterator[Piece]:
    prompt, completion = record.get("prompt"), record.get("completion")
    if record.get("messages") is not None:
        yield from _turns(_messages(record["messages"], where), 0, tokenizer, where)
    elif isinstance(prompt, str) and isinstance(completion, str):
        end = tokenizer.eos_token or ""
        yield prompt, False
        yield completion if end and completion.endswith(end) else completion + end, True
    elif prompt is not None and completion is not None and not isinstance(prompt, str):
        before = _messages(prompt, where)
        yield from _turns(before + _messages(completion, where), len(before), tokenizer, where)
    else:
        raise UserError(
            f"{where} has neither messages nor prompt and completion (both text or both lists of messages) but "
            f"{sorted(record)}; mend it"
        )


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: messages must be a non-empty list; mend it")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"{where}: message {message!r:.80} needs a role and a content, both text; mend it")
    return value


def _turns(
    messages: list[dict[str, str]], first: int, tokenizer: "PreTrainedTokenizerFast", where: str
) -> Iterator[Piece]:
    """The rendered conversation, cut around the assistant's turns from message `first` on.

    A turn is what the template adds to the prompt that asked for it. That holds for any template which never
    changes what it has already written; one that does is an error, not a wrong mask.
    """
    done = ""
    messages = [plain_message(message, tokenizer) for message in messages]
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < first:
            continue
        prompt = _render(messages[:i], True, tokenizer, where) if i else ""
        answered = _render(messages[: i + 1], False, tokenizer, where)
        if not (prompt.startswith(done) and answered.startswith(prompt)):
            raise UserError(
                f"{where}: the chat template changes earlier text when message {i + 1} is added, so the assistant's "
                f"part cannot be told apart; give this conversation as prompt and completion, both text"
            )
        answer = answered[len(prompt) :]
        if message["content"].strip() not in answer:
            raise UserError(
                f"{where}: the chat template leaves out part of message {i + 1} (such as its thinking); give this "
                f"conversation as prompt and completion, both text"
            )
        if tokenizer.eos_token and tokenizer.eos_token in answer:  # what follows the end is never generated
            answer = answer[: answer.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]
        yield prompt[len(done) :], False
        yield answer, True
        done = prompt + answer


def _render(messages: list[dict[str, str]], generation: bool, tokenizer: "PreTrainedTokenizerFast", where: str) -> str:
    if not tokenizer.chat_template:
        raise UserError(f"{where}: the tokenizer has no chat template; add chat_template.jinja beside tokenizer.json")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    except Exception as e:  # whatever the template itself raises
        raise UserError(f"{where}: the chat template does not accept these messages ({e}); mend them") from e


def _documents(samples: list[Sample]) -> Documents:
    offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens, _ in samples])]).astype(np.int64)
    tokens = np.array([token for sample, _ in samples for token in sample], np.int32)
    marks = np.array([mark for _, sample in samples for mark in sample], np.uint8)
    return Documents(tokens, offsets, marks)
