"""peft's layout of an adapter: adapter_config.json and adapter_model.safetensors, with tensors named
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rorqual.adapters.lora import merge, updates
from rorqual.adapters.low_rank import LowRank
from rorqual.checkpoint.huggingface import load_model, save_model, stored_dtype
from rorqual.checkpoint.model_writer import copy_companions, new_directory, write_json
from rorqual.checkpoint.safetensors_io import read_header, write_shard
from rorqual.errors import UserError
from rorqual.model.model_directory import check_destination, is_gguf, model_directory, read_json
from rorqual.model.transformer import Transformer
from rorqual.sections import LoRASection

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX, PARTS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
# Fields that change nothing here, since the tensors say it, or that are read below; of others only what is empty.
FREE = frozenset({
    "r", "lora_alpha", "use_rslora", "base_model_name_or_path", "lora_dropout", "target_modules", "exclude_modules",
    "rank_pattern", "layers_to_transform", "layers_pattern", "task_type", "inference_mode", "auto_mapping", "revision",
    "peft_version", "megatron_core", "megatron_config", "eva_config", "qalora_group_size", "ensure_weight_tying",
    "runtime_config",
})  # fmt: skip
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others (pissa, olora, loftq and more) change the base's weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Adapter:
    base: str | None  # base_model_name_or_path
    updates: dict[str, LowRank]  # by the path of the linear in a release


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    return (Path(path) / CONFIG).exists() and not (model_directory(path) / "config.json").exists()


def base_of(path: str | Path) -> str:
    """The model that an adapter was made for, as its configuration names it: a directory or a Hub id.

    Raises UserError where it names none.
    """
    base = read_json(Path(path) / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{Path(path) / CONFIG} has no base_model_name_or_path; give the model, and --adapter {path}")
    return base


def read_adapter(path: str | Path) -> Adapter:
    """Read a directory in peft's layout. rsLoRA's scale α/√r is read too (Kalajdzievski 2023).

    Raises UserError for missing and damaged files, and for what would change the result and is not computed here.
    """
    folder = Path(path)
    config = read_json(folder / CONFIG)
    for name, value in ({"peft_type": None} | config).items():
        plain = value in PLAIN[name] if name in PLAIN else name in FREE or not value
        if not plain:
            raise UserError(
                f"{folder / CONFIG}: {name} = {value!r:.80} is not supported; merge the adapter with peft "
                "(merge_and_unload) and give the merged model"
            )
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        raise UserError(
            f"{folder / PICKLE} is a Python pickle, which can run code when read; save the adapter as safetensors with "
            "peft's save_pretrained"
        )
    alpha, root = config.get("lora_alpha", 8), bool(config.get("use_rslora", False))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise UserError(f"{folder / CONFIG}: lora_alpha = {alpha!r:.80} is not a number; correct it")
    found = read_header(folder / WEIGHTS)
    pairs: dict[str, list[torch.Tensor | None]] = {}
    for name, entry in found.items():
        part = next((part for part in PARTS if name.endswith(part)), None)
        if part is None or not name.startswith(PREFIX) or len(entry.shape) != 2:
            raise UserError(
                f"{folder / WEIGHTS}: tensor {name} is not the A or B of a linear's LoRA; merge the adapter with peft "
                "(merge_and_unload) and give the merged model"
            )
        linear = name.removeprefix(PREFIX).removesuffix(part)
        pairs.setdefault(linear, [None, None])[PARTS.index(part)] = entry.rows()
    if not pairs:
        raise UserError(f"{folder / WEIGHTS} holds no tensors; fetch it again")
    made: dict[str, LowRank] = {}
    for linear, (A, B) in pairs.items():
        if A is None or B is None or B.shape[1] != len(A) or not len(A):
            raise UserError(
                f"{folder / WEIGHTS}: {linear} lacks an A [r, in] and a B [out, r] that fit; fetch it again"
            )
        made[linear] = LowRank(A, B, alpha / (math.sqrt(len(A)) if root else len(A)))
    base = config.get("base_model_name_or_path")
    return Adapter(base if isinstance(base, str) else None, made)


def save_adapter(model: Transformer, path: str | Path, section: LoRASection, base: str) -> None:
    """Write what `add_lora` put into a model, as it is now, in a directory that peft's PeftModel.from_pretrained takes.

    base: the model's directory. Raises UserError if it cannot be written, with nothing changed.
    """
    found = updates(model)
    with new_directory(Path(path), "saved") as folder:
        names = {path.rpartition(".")[2] for path in found}
        if model.config.n_routed_experts:
            names = set(found)  # by the short names peft takes routed experts too
        write_json(folder / CONFIG, _config(sorted(names), section, base))
        pairs = ((linear, part) for linear in found for part in PARTS)
        tensors = {f"{PREFIX}{n}{part}": found[n].A if part == PARTS[0] else found[n].B for n, part in pairs}
        write_shard(folder / WEIGHTS, tensors)


def _config(targets: list[str], section: LoRASection, base: str) -> dict[str, object]:
    alpha = int(section.alpha) if section.alpha.is_integer() else section.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).exists() else base,
        "r": section.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def import_adapter(path: str | Path, dest: str | Path, base: str | Path) -> None:
    """Write the Hugging Face directory `dest`: the model at `base` with the adapter merged, in the base's dtype.

    Raises UserError.
    """
    source = model_directory(base)
    check_destination(Path(dest), source if source.exists() else None)
    if is_gguf(base):
        raise UserError(
            f"{base}: an adapter is merged into a model directory; make one: rorqual import {base} DIRECTORY"
        )
    model = load_model(source, stored_dtype(source))
    merge(model, read_adapter(path).updates)
    save_model(model, dest)
    copy_companions(source, Path(dest))
