"""Preference pairs: a better and a worse answer to the same prompt, as tokens for a reward model."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from rorqual.data.chat_messages import Message, read_messages, without_nulls
from rorqual.data.chat_template import ChatTemplate
from rorqual.data.corpus import RECORDS, Record, find_files, named, read_records
from rorqual.data.loader import Batch, PackedDataset
from rorqual.data.special_tokens import encode, escape
from rorqual.data.token_shards import Documents
from rorqual.data.tokenizer import beginning
from rorqual.errors import UserError
from rorqual.tokenizer_protocol import Tokenizer

MULTIPLE = 16  # tokens to which batches are padded
Pair = tuple[list[int], list[int]]  # tokens of the better conversation, and of the worse one


class ConversationEncoder:
    """Conversations as a reward model reads them, with the end token last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None

    def __call__(self, messages: Sequence[Message]) -> list[int]:
        """Tokens, by the chat template; without one, the contents line by line. Raises UserError as templates do."""
        end = self.tokenizer.eos_token or ""
        if self.template is None:
            begin = self.tokenizer.decode(list(beginning(self.tokenizer)))
            text = begin + "\n".join(escape(m["content"] or "", self.tokenizer) for m in messages)
        else:
            text = self.template.render(messages, generation=False).rstrip()
        return encode(text if end and text.endswith(end) else text + end, self.tokenizer)


class PairDataset(PackedDataset):
    """A row is a pair: the better conversation, then the worse one, isolated from each other.

    `Batch.weights` are 1 at the better one's last token, −1 at the worse one's, and else 0.
    """

    def __init__(self, pairs: Sequence[Pair], padding_token: int) -> None:
        conversations = [tokens for pair in pairs for tokens in pair]
        self.lengths = np.array([len(tokens) for tokens in conversations], np.int64)
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.documents = Documents(np.array([t for tokens in conversations for t in tokens], np.int32), offsets)
        self.starts, self.first = offsets[:-1], np.arange(0, len(conversations) + 1, 2)
        self.sizes = self.lengths.reshape(-1, 2).sum(1)  # tokens of each pair
        self.length = int(self.sizes.max())
        self.padding_token, self.isolate = padding_token, True

    def batch(self, rows: np.ndarray) -> Batch:
        found = super().batch(rows)
        weights = torch.zeros_like(found.weights)
        places, sizes = torch.arange(len(rows)), torch.from_numpy(self.sizes[rows])
        weights[places, torch.from_numpy(self.lengths[2 * rows]) - 1] = 1
        weights[places, sizes - 1] = -1
        width = min(self.length, -(-int(sizes.max()) // MULTIPLE) * MULTIPLE)
        whole = replace(found, weights=weights)
        cut: dict[str, Any] = {name: value[:, :width] for name, value in vars(whole).items() if value is not None}
        return Batch(**cut)

    def batches(self, size: int, most: int | None = None) -> Iterator[Batch]:
        """The first `most` pairs (None: all), each once, those of similar length together."""
        order = np.argsort(self.sizes[:most], kind="stable")
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])


@dataclass(frozen=True)
class PairSplit:
    """valid: None without held-out pairs. dropped: pairs with a conversation longer than the sequence length."""

    train: PairDataset
    valid: PairDataset | None
    dropped: int


def read_pairs(path: str, tokenizer: Tokenizer, sequence_length: int, valid_fraction: float = 0.0) -> PairSplit:
    """Tokenise the pairs of a .jsonl, .jsonl.gz or .parquet file, or glob of them.

    A record has `prompt`, `chosen` and `rejected`, as TRL and UltraFeedback have them: text, or lists of messages, of
    which an answer's may begin with the prompt's. All pairs of a prompt are held out, or none. Raises UserError naming
    file and line for an invalid record.
    """
    read = ConversationEncoder(tokenizer)
    by_prompt: dict[str, list[Pair]] = {}
    dropped, known = 0, False
    for where, record in _records(path):
        known = True
        prompt, *answers = _conversations(record, where)
        try:
            better, worse = (read([*prompt, answer]) for answer in answers)
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        if better == worse:
            raise UserError(f"{where}: chosen and rejected are equal, so neither is better; remove the line")
        if max(len(better), len(worse)) > sequence_length:
            dropped += 1
            continue
        by_prompt.setdefault(json.dumps(prompt, sort_keys=True), []).append((better, worse))
    if not known:
        raise UserError(f"{path} has no lines; write one JSON object with prompt, chosen and rejected per line")
    if not by_prompt:
        raise UserError(
            f"{path}: all {dropped} pairs are longer than data.sequence_length = {sequence_length}; raise it"
        )
    held = {*[prompt for prompt in by_prompt if _share(prompt) < valid_fraction][: len(by_prompt) - 1]}
    if valid_fraction and not held and len(by_prompt) > 1:
        held = {min(by_prompt, key=_share)}
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    train, valid = (
        [pair for prompt, pairs in by_prompt.items() if (prompt in held) == out for pair in pairs]
        for out in (False, True)
    )
    return PairSplit(PairDataset(train, padding or 0), PairDataset(valid, padding or 0) if valid else None, dropped)


def _records(path: str) -> Iterator[tuple[str, Record]]:
    for file in find_files(path, RECORDS):
        for where, record in read_records(file):
            yield where, without_nulls(record) if named(file, ".parquet") else record


def _share(prompt: str) -> float:
    return int.from_bytes(blake2b(prompt.encode(errors="replace"), digest_size=8).digest(), "little") / 2**64


def _conversations(record: Record, where: str) -> tuple[list[Message], Message, Message]:
    """(the prompt's messages, the better answer, the worse one)."""
    found: list[list[Message]] = []
    for name in ("chosen", "rejected"):
        value = record.get(name)
        if not isinstance(value, str | list):
            what = "is missing; add it" if value is None else f"is a {type(value).__name__}; correct it"
            raise UserError(f"{where}: field {name} (text, or a list of messages) {what}")
        answer: list[Message] = [{"role": "assistant", "content": value}] if isinstance(value, str) else []
        messages = answer or read_messages(value, f"{where}: {name}")
        if messages[0]["role"] == "assistant":
            messages = [*_prompt(record, where), *messages]
        if messages[-1]["role"] != "assistant" or not (messages[-1]["content"] or "").strip():
            raise UserError(f"{where}: {name} does not end with an assistant's answer; correct it")
        found.append(messages)
    better, worse = found
    if better[:-1] != worse[:-1]:
        raise UserError(f"{where}: chosen and rejected answer different prompts; correct it")
    return better[:-1], better[-1], worse[-1]


def _prompt(record: Record, where: str) -> list[Message]:
    value = record.get("prompt")
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if isinstance(value, list):
        return read_messages(value, f"{where}: prompt")
    what = "is missing or empty; add it" if value in (None, "") or isinstance(value, str) else "must be text or a list"
    raise UserError(f"{where}: field prompt (text, or a list of messages) {what}")
