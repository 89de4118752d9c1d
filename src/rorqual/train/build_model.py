"""From a recipe to a model: loaded or of random weights, with its tokenizer, checked against each other."""

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rorqual.checkpoint.describe import read_released
from rorqual.checkpoint.huggingface import load_model, open_release
from rorqual.data.tokenizer import load_tokenizer
from rorqual.errors import UserError
from rorqual.model import ModelConfig, Transformer
from rorqual.recipe import ChatDataSection, DataSection, DistillRecipe, ModelSection, TrainSection
from rorqual.train.rng import set_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def check_length(
    section: ModelSection, data: DataSection | ChatDataSection | DistillRecipe, field: str = "data.sequence_length"
) -> None:
    """Lower a `sequence_length` that the recipe leaves open to what the model's context holds.

    Raises UserError for a longer one that it gives: the release would not take what it was trained at.
    """
    length = data.sequence_length
    if section.path is not None:
        context, remedy = ModelConfig.load(section.path).max_position_embeddings, "lower it"
    else:
        context = section.config.get("max_position_embeddings", length)
        remedy = "lower it or raise model.config.max_position_embeddings"
    if not isinstance(context, int) or not 2 <= context < length:
        return
    if "sequence_length" in data.model_fields_set:
        raise UserError(f"{field} = {length}: the model's context holds {context} (max_position_embeddings); {remedy}")
    data.sequence_length = context


def model_config(
    section: ModelSection, vocab_size: int, eos_token_id: int | None = None, length: int = 0
) -> ModelConfig:
    """The sizes a recipe asks for; `vocab_size` and the end token are the tokenizer's unless it says otherwise.

    length: tokens of the sequences in training; a context that is left out holds them.
    """
    if section.path is not None:
        return ModelConfig.load(section.path)
    known = {f.name for f in fields(ModelConfig)} | {"hidden_act", "rope_parameters"}
    for name in section.config.keys() - known:
        near = get_close_matches(name, known, 1)
        raise UserError(f"field model.config.{name} is unknown; {f'did you mean {near[0]}?' if near else 'remove it'}")
    defaults = {"model_type": "deepseek_v3", "vocab_size": vocab_size, "eos_token_id": eos_token_id}
    if length > ModelConfig.max_position_embeddings:
        defaults["max_position_embeddings"] = length
    config = ModelConfig.from_dict(defaults | section.config, "model.config")
    if config.vocab_size < vocab_size:
        raise UserError(
            f"model.config.vocab_size = {config.vocab_size}: the tokenizer has {vocab_size} tokens; raise it to that, "
            "or leave it out"
        )
    return config


def build_model(section: ModelSection, tokenizer: "PreTrainedTokenizerFast", seed: int, length: int = 0) -> Transformer:
    """The model to train, in FP32 (the optimizer converts it), its random weights decided by `seed`.

    length: as in `model_config`.
    """
    set_seed(seed)
    size = len(tokenizer)
    config = model_config(section, size, tokenizer.eos_token_id, length)
    if section.path is None:
        return Transformer(config)
    if config.vocab_size < size:
        raise UserError(
            f"{section.path}: the model has {config.vocab_size} tokens and the tokenizer {size}; "
            "give the tokenizer the model was trained with"
        )
    return load_model(section.path, dtype=torch.float32)


def check_model(section: ModelSection) -> None:
    """Raises UserError for a model that cannot be trained, as `build_model` would; its weights are not read."""
    if section.path is not None:
        open_release(Path(section.path))


def tokenizer_of(section: ModelSection) -> "PreTrainedTokenizerFast":
    """The tokenizer in the model's directory. Raises UserError when the recipe starts from random weights."""
    if section.path is None:
        raise UserError("model.path is missing: fine-tuning starts from a trained model's directory")
    tokenizer = load_tokenizer(section.path)
    if tokenizer.eos_token_id is None and (ends := read_released(section.path).end_tokens):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])  # it ends what is learnt too
    return tokenizer


def set_threads(section: TrainSection) -> None:
    """Use as many threads as the recipe says, or torch's choice."""
    if section.threads is not None:
        torch.set_num_threads(section.threads)
