"""Build or load the model and the tokenizer of a recipe, and check that they fit each other."""

from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import nn

from rorqual.adapters.lora import add_lora, check_targets
from rorqual.checkpoint.describe import read_released
from rorqual.checkpoint.huggingface import load_model
from rorqual.checkpoint.model_reader import open_release
from rorqual.checkpoint.release_tensors import allocate, meta_model, own_tensors
from rorqual.data.tokenizer import load_tokenizer
from rorqual.errors import UserError
from rorqual.model import ModelConfig, Transformer
from rorqual.model.model_directory import model_directory
from rorqual.parallel.data import is_expert
from rorqual.recipe import (
    ChatDataSection,
    DataSection,
    DistillRecipe,
    LoRASection,
    ModelSection,
    PairDataSection,
    TrainSection,
)
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.train.rng import set_seed

# Gives what a process keeps of a model on the meta device its weights: (model, number of its first routed expert,
# device).
Fill = Callable[[Transformer, int, torch.device], None]


def check_length(
    section: ModelSection,
    data: DataSection | ChatDataSection | PairDataSection | DistillRecipe,
    field: str = "data.sequence_length",
) -> None:
    """Lower a default `sequence_length` to the model's context (max_position_embeddings, tokens).

    Raises UserError where the recipe sets a longer one: the released model could not be used at that length.
    """
    length = data.sequence_length
    if section.path is not None:
        context, remedy = ModelConfig.load(section.path).max_position_embeddings, "lower it"
    else:
        context = (section.config or {}).get("max_position_embeddings", length)
        remedy = "lower it or raise model.config.max_position_embeddings"
    if not isinstance(context, int) or not 2 <= context < length:
        return
    if "sequence_length" in data.model_fields_set:
        raise UserError(f"{field} = {length}: the model's context holds {context} (max_position_embeddings); {remedy}")
    data.sequence_length = context


def model_config(
    section: ModelSection, vocab_size: int, eos_token_id: int | None = None, length: int = 0
) -> ModelConfig:
    """The config that a recipe describes; `vocab_size` and `eos_token_id` default to the tokenizer's.

    length: training sequence length in tokens; the default context is at least that. Raises UserError for an unknown
    field and a vocabulary smaller than the tokenizer's.
    """
    if section.path is not None:
        return ModelConfig.load(section.path)
    sizes = section.config or {}
    known = {f.name for f in fields(ModelConfig)} | {"hidden_act", "rope_parameters"}
    for name in sizes.keys() - known:
        near = get_close_matches(name, known, 1)
        raise UserError(f"field model.config.{name} is unknown; {f'did you mean {near[0]}?' if near else 'remove it'}")
    defaults: dict[str, object] = {"model_type": "deepseek_v3", "vocab_size": vocab_size, "eos_token_id": eos_token_id}
    if length > ModelConfig.max_position_embeddings:
        defaults["max_position_embeddings"] = length
    config = ModelConfig.from_dict(defaults | sizes, "model.config")
    if config.vocab_size < vocab_size:
        raise UserError(
            f"model.config.vocab_size = {config.vocab_size}: the tokenizer has {vocab_size} tokens; raise it to that, "
            "or leave it out"
        )
    return config


def build_model(
    section: ModelSection, tokenizer: Tokenizer, seed: int, length: int = 0, lora: LoRASection | None = None
) -> Transformer:
    """The model to train, in FP32 (the optimizer converts it); `seed` determines random weights.

    length: as in `model_config`. lora: updates of a frozen model, at their start. Raises UserError where the model's
    vocabulary is smaller than the tokenizer's.
    """
    set_seed(seed)
    config = config_for(section, tokenizer, length)
    model = Transformer(config) if section.path is None else load_model(section.path, dtype=torch.float32)
    if lora is not None:
        add_lora(model, lora, seed)
    return model


def build_part(section: ModelSection, tokenizer: Tokenizer, seed: int, length: int = 0) -> tuple[Transformer, Fill]:
    """As `build_model`, for a process that keeps a part: the whole on the meta device, and what fills the part.

    It gets the same numbers, without the whole ever being in memory: read from the files alone, or drawn a tensor at a
    time.
    """
    set_seed(seed)
    config = config_for(section, tokenizer, length)
    if section.path is not None:
        release = open_release(Path(section.path))

        def read(model: Transformer, first_expert: int, device: torch.device) -> None:
            allocate(model, torch.float32, device)
            own = own_tensors(model, first_expert=first_expert)
            release.fill({name: own[name] for name in release.required if name in own})

        return release.outline, read

    def draw(model: Transformer, first_expert: int, device: torch.device) -> None:
        allocate(model, torch.float32, device)
        for buffer in model.buffers():
            buffer.zero_()
        set_seed(seed)
        _draw(model, config, first_expert)

    return meta_model(config), draw


@torch.no_grad()
def _draw(model: Transformer, config: ModelConfig, first_expert: int) -> None:
    """What `Transformer(config)` draws, of which the model keeps what it has a parameter for."""
    whole = meta_model(config)
    for module in whole.modules():  # PyTorch's own start, which the model's replaces, moves the generator on
        if isinstance(module, nn.Linear):
            nn.Linear(module.in_features, module.out_features, module.bias is not None)
        elif isinstance(module, nn.Embedding):
            nn.Embedding(module.num_embeddings, module.embedding_dim)
    own = dict(model.named_parameters())
    for name, outline in whole.named_parameters():
        values = whole.started(name, torch.empty_like(outline, device="cpu"))
        if name in own:
            first = first_expert if is_expert(name) else 0
            own[name].copy_(values[first : first + len(own[name])])


def config_for(section: ModelSection, tokenizer: Tokenizer, length: int) -> ModelConfig:
    """The config of the model that `build_model` makes, without its weights. Raises UserError as it does."""
    size = len(tokenizer)
    config = model_config(section, size, tokenizer.eos_token_id, length)
    if section.path is not None and config.vocab_size < size:
        raise UserError(
            f"{section.path}: the model has {config.vocab_size} tokens and the tokenizer {size}; "
            "use the tokenizer the model was trained with"
        )
    return config


def check_model(section: ModelSection, lora: LoRASection | None = None) -> None:
    """Raises UserError for a model that `build_model` would refuse, without reading its weights."""
    if section.path is not None:
        outline = open_release(Path(section.path)).outline
        if lora is not None:
            check_targets(outline, lora)


def trained_path(section: ModelSection) -> str:
    """The model's directory. Raises UserError when the recipe starts from random weights."""
    if section.path is None:
        raise UserError("model.path is missing: this recipe starts from a trained model; set it to one's directory")
    return section.path


def tokenizer_of(section: ModelSection) -> Tokenizer:
    """The tokenizer in the model's directory. Raises UserError when the recipe starts from random weights."""
    return tokenizer_at(trained_path(section))


def tokenizer_at(path: str) -> Tokenizer:
    """The tokenizer in a model's directory, with an end token. Raises UserError."""
    tokenizer = load_tokenizer(path)
    if tokenizer.eos_token_id is None and (ends := read_released(path).end_tokens):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])  # training samples end with it too
    return tokenizer


def take_end_tokens(section: ModelSection, source: str, tokenizer: Tokenizer) -> None:
    """Random weights end their answers as the model does whose directory, `source`, the tokenizer is from."""
    if section.config is None or "eos_token_id" in section.config:
        return
    if (model_directory(source) / "config.json").is_file():
        ends = read_released(source).end_tokens
        ids = [i for i in dict.fromkeys([tokenizer.eos_token_id, *ends]) if i is not None and i < len(tokenizer)]
        section.config |= {"eos_token_id": ids if len(ids) > 1 else ids[0]} if ids else {}


def set_threads(section: TrainSection) -> None:
    """Set torch's thread count where the recipe has one."""
    if section.threads is not None:
        torch.set_num_threads(section.threads)
