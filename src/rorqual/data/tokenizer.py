"""Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), trained or loaded from a Hugging Face directory."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rorqual.checkpoint.model_writer import write_tokenizer
from rorqual.errors import UserError, file_error
from rorqual.model.model_directory import check_directory, foreign, model_directory, read_json
from rorqual.recipe import TokenizerSection
from rorqual.tokenizer_protocol import Tokenizer

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
FIM_TOKENS = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")

# Words with their leading space, runs of up to three digits, one other symbol with its leading space and the newline
# after it (so that a symbol at the end of a line is one token), white space.
PATTERN = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]\n?|\s+(?!\S)|\s+"
# The same with single digits, so that training learns no digit merges where `whole_numbers` defines them.
PATTERN_SINGLE_DIGITS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]\n?|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{- eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""
LARGEST_ID = (
    1 << 24
)  # tokenizers allocates one entry per id up to the largest and aborts the process when memory runs out


def train_tokenizer(texts: Iterable[str], section: TokenizerSection, fim: bool = False) -> Tokenizer:
    """Train byte-level BPE to at most `section.vocab_size` tokens, special tokens included.

    Encoding is lossless for every text. Integers below `section.whole_numbers` are one token each. Special tokens come
    first, with `<|endoftext|>` (eos and padding) as token 0; `fim` adds the fill-in-the-middle tokens. Tokens written
    `<|…|>` are removed by `decode(…, skip_special_tokens=True)`; others, such as `<think>`, stay in the text, as in
    R1's release. Raises UserError when the vocabulary is too small for the fixed tokens, or there is no text.
    """
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    special = list(dict.fromkeys([END_OF_TEXT, *section.special_tokens, *(FIM_TOKENS if fim else ())]))
    if "" in special:
        raise UserError("tokenizer.special_tokens holds an empty string; remove it")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    number_merges = _number_merges(section.whole_numbers)
    fixed = len(special) + len(alphabet) + len(number_merges)
    if fixed > section.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size = {section.vocab_size}: must be at least {fixed} for {len(special)} special tokens, "
            f"{len(alphabet)} bytes and {len(number_merges)} whole numbers"
        )

    def steps(pattern: str) -> "pre_tokenizers.PreTokenizer":
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = steps(PATTERN_SINGLE_DIGITS if number_merges else PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=section.vocab_size - len(number_merges) - len(special),
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator(_checked_not_empty(texts), trainer)
    learned = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # Number merges are of digits only and learned merges then never are, so they are independent.
    merges = number_merges + learned
    tokens = dict.fromkeys([*special, *alphabet, *(left + right for left, right in merges)])
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = steps(PATTERN)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, special)


def _checked_not_empty(texts: Iterable[str]) -> Iterable[str]:
    seen = False
    for text in texts:
        seen = seen or bool(text)
        yield text
    if not seen:
        raise UserError("there is no text to train the tokenizer on; check data.sources")


def _finish(tokenizer: "tokenizers.Tokenizer", special: list[str]) -> Tokenizer:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special if _is_control(t)])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in special if not _is_control(t)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return cast(Tokenizer, fast)


def _is_control(token: str) -> bool:
    return token.startswith("<|") and token.endswith("|>")


def _number_merges(count: int) -> list[tuple[str, str]]:
    """Merges that make each of the integers 0..count-1 one token: pairs of digits first, then triples.

    Within `abc` both `ab` and `bc` may be merges; BPE applies the one of lower rank, or the left one on a tie. Pairs
    are ranked by value, so the applied one is known, and the triple is built from it.
    """
    merges = [(str(n // 10), str(n % 10)) for n in range(10, min(count, 100))]
    for n in range(100, count):
        left, right = n // 10, n % 100  # ab, bc; a right pair below 10 would start with 0, which no merge does
        merges.append((str(left), str(n % 10)) if right < 10 or left <= right else (str(n // 100), str(right)))
    return merges


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory or a run's folder (`tokenizer.json`, with its configuration and chat
    template). `add_bos_token` of tokenizer_config.json takes precedence over tokenizer.json.

    Raises UserError when it is missing or invalid.
    """
    from transformers import PreTrainedTokenizerFast

    check_directory(path)
    path = Path(path)
    path = path if os.path.isfile(path / "tokenizer.json") else model_directory(path)
    file, settings = path / "tokenizer.json", path / "tokenizer_config.json"
    if wrong := foreign(file, b"{"):
        raise UserError(wrong)
    config = read_json(settings) if os.path.lexists(settings) else {}
    bos = config.get("add_bos_token")
    if not isinstance(bos, bool | None):
        raise UserError(f"{settings}: add_bos_token = {bos!r:.60} must be true or false, or null")
    longest = config.get("model_max_length")
    if isinstance(longest, bool) or not isinstance(longest, int | float | None):
        raise UserError(f"{settings}: model_max_length = {longest!r:.60} must be a number, or null")
    template = config.get("chat_template")
    named = isinstance(template, list) and all(
        isinstance(t, dict) and {"name", "template"} <= t.keys() for t in template
    )
    if not isinstance(template, str | dict | None) and not named:
        raise UserError(f"{settings}: chat_template must be a text, or a list of objects with name and template")
    try:
        # Not AutoTokenizer: for some architectures it rebuilds the pre-tokenizer and so changes the tokens.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        if bos is not None:
            _add_bos(tokenizer, bos)
        tokenizer("a")  # fails where the settings are invalid
        largest = max(tokenizer.get_vocab().values(), default=0)
        if largest >= LARGEST_ID:
            raise ValueError(f"a token has the id {largest}, above any vocabulary's size")
        return cast(Tokenizer, tokenizer)
    except Exception as e:  # tokenizers raises bare Exception for malformed files
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        reason = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in reason)  # the file's own bytes
        raise UserError(f"{file} or the files beside it cannot be read ({reason}); restore them from the source") from e


def beginning(tokenizer: "Tokenizer | PreTrainedTokenizerFast") -> tuple[int, ...]:
    """The tokens that a tokenizer puts before every text, such as BOS, without those it puts after."""
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    starts = range(len(whole) - len(bare) + 1)
    return tuple(whole[: next((i for i in starts if whole[i : i + len(bare)] == bare), 0)])


def _add_bos(tokenizer: "PreTrainedTokenizerFast", wanted: bool) -> None:
    """Make a tokenizer prepend BOS, or not: transformers 5 reads only tokenizer.json, where many releases (DeepSeek's)
    set it in tokenizer_config.json.
    """
    if tokenizer.bos_token_id is not None and wanted != (tokenizer.bos_token_id in beginning(tokenizer)):
        tokenizer.add_bos_token = wanted


def token_ids(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """A text's token ids. special: with the special tokens that the tokenizer adds before and after a text.

    Calling the tokenizer itself takes twice as long and holds the GIL for 0.1 s per megabyte.
    """
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend.encode_batch_fast([text], add_special_tokens=special)[0].ids


def save_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and any `chat_template.jinja` into `path`. Raises UserError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        write_tokenizer(tokenizer, Path(path))
    except OSError as e:
        raise file_error(path, e, then="or choose another place") from e
