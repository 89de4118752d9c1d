"""Convert the tokenizer of a GGUF file's header to the tokenizers library."""

from typing import TYPE_CHECKING, TypeVar, cast

from rorqual.checkpoint.gguf_config import Fields, number
from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.tokenizer_protocol import Tokenizer

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import pre_tokenizers

T = TypeVar("T")

# Pre-tokenizer patterns of byte-level BPE, as in the models' own tokenizer.json; by GGUF's names below.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
)
# The letters of V2's second split. Escaped, since Unicode's normal form has other characters for some of them.
DEEPSEEK2_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DEEPSEEK2 = (
    r"[\r\n]",
    rf"\s?[{DEEPSEEK2_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
SPLITS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (LLAMA3,),
    "qwen2": (QWEN,),
    "deepseek-r1-qwen": (QWEN,),
    "deepseek-llm": DEEPSEEK2,  # V2, V2-Lite
    "deepseek-v3": DEEPSEEK3,  # R1 too
}
PRE_TOKENIZERS = ("smollm", "gpt-2", *SPLITS)
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types


def tokenizer_of(fields: Fields, config: ModelConfig) -> Tokenizer:
    """The tokenizer. Raises UserError unless it is byte-level BPE with a known pre-tokenizer, and for damaged ones."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in PRE_TOKENIZERS:
        raise UserError(
            f"tokenizer {kind!r} with pre-tokenizer {split!r} is not supported; only byte-level BPE ('gpt2') with "
            f"{', '.join(PRE_TOKENIZERS)} is"
        )
    tokens, types = _list(fields, "tokens", str), _list(fields, "token_type", int)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if not len(vocabulary) == len(tokens) == len(types) == config.vocab_size:
        raise UserError("the numbers of tokens, token types and embeddings differ; fetch the file again")
    merges = [(a, b) for a, _, b in (merge.partition(" ") for merge in _list(fields, "merges", str))]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(split)
    tokenizer.decoder = decoders.ByteLevel()
    if "qwen" in split:
        tokenizer.normalizer = normalizers.NFC()
    for kind in (CONTROL, USER_DEFINED):
        special = kind == CONTROL
        added = [
            AddedToken(t, normalized=False, special=special) for t, k in zip(tokens, types, strict=True) if k == kind
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    named = {
        f"{role}_token": tokens[i]
        for role in ("bos", "eos", "pad")
        if (i := getattr(config, f"{role}_token_id")) is not None
    }
    unknown = number(fields, "tokenizer.ggml.unknown_token_id", None, least=0, below=len(tokens))
    if unknown is not None:
        named["unk_token"] = tokens[unknown]
    begins = fields.get("tokenizer.ggml.add_bos_token", split == "llama-bpe")
    if not isinstance(begins, bool):
        raise UserError(f"tokenizer.ggml.add_bos_token = {begins!r:.60} must be true or false; fetch the file again")
    if begins and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, config.bos_token_id)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_NoCopy(tokenizer),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **named,
    )
    fast.chat_template = _templates(fields)
    return cast(Tokenizer, fast)


def _templates(fields: Fields) -> str | dict[str, str] | None:
    """The chat template, or several by name. Raises UserError for invalid ones."""
    names = fields.get("tokenizer.chat_templates", [])
    if not isinstance(names, list):
        raise UserError("tokenizer.chat_templates is not a list; fetch the file again")
    keys = {"default": "tokenizer.chat_template"} | {str(n): f"tokenizer.chat_template.{n}" for n in names}
    found: dict[str, str] = {}
    for name, key in keys.items():
        if key not in fields:
            continue
        if not isinstance(template := fields[key], str):
            raise UserError(f"{key} is not a string; fetch the file again")
        found[name] = template
    return found if found.keys() - {"default"} else found.get("default")


class _NoCopy:
    """Avoids the copy that transformers makes of a tokenizer, which takes the memory and time of building it."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer") -> None:
        self.tokenizer = tokenizer

    def __deepcopy__(self, _: object) -> "tokenizers.Tokenizer":
        return self.tokenizer


def _list(fields: Fields, name: str, kind: type[T]) -> list[T]:
    values = fields.get(f"tokenizer.ggml.{name}")
    found = [value for value in values if isinstance(value, kind)] if isinstance(values, list) else []
    if not isinstance(values, list) or len(found) < len(values):
        raise UserError(f"tokenizer.ggml.{name} is missing or not a list of {kind.__name__}; fetch the file again")
    return found


def _pre_tokenizer(split: str) -> "pre_tokenizers.PreTokenizer":
    from tokenizers import Regex, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

    if split == "smollm":
        return pre_tokenizers.Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if split == "gpt-2":
        return ByteLevel(add_prefix_space=False)
    steps = [Split(Regex(pattern), behavior="isolated") for pattern in SPLITS[split]]
    return pre_tokenizers.Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])
