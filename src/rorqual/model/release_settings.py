"""A release's generation settings: end tokens and sampling parameters.

Read once, from a directory's config.json and generation_config.json or a GGUF file's header, and kept by the model, so
that engine, server, training and export agree (precedence: docs/settings.md).
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from rorqual import strict_json
from rorqual.errors import UserError
from rorqual.model.model_directory import read_json
from rorqual.strict_json import Json
from rorqual.tokenizer_protocol import Tokenizer

if TYPE_CHECKING:
    from rorqual.model.config import ModelConfig

GENERATION = "generation_config.json"
TOKEN_ID_LIMIT = 1 << 31  # exclusive
SUPPRESS_BIAS = -1e9  # logit bias of suppress_tokens
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _real(value: Json) -> bool:
    return strict_json.is_finite(value)


def _whole(value: Json) -> TypeGuard[int]:
    return type(value) is int


def _tokens(value: Json) -> bool:
    return isinstance(value, list) and all(_whole(t) and t >= 0 for t in value)


def _strings(value: Json) -> bool:
    """Whether it is a string or a list of strings, none of them empty."""
    return all(isinstance(s, str) and s for s in (value if isinstance(value, list) else [value]))


# Supported keys of generation_config.json → the name in SamplingParams, a check of the value, its description.
SUPPORTED: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "temperature": ("temperature", lambda v: _real(v) and v >= 0, "a number ≥ 0"),
    "top_p": ("top_p", lambda v: _real(v) and 0 < v <= 1, "a number above 0 and at most 1"),
    "top_k": ("top_k", lambda v: _whole(v) and v >= -1, "a whole number (0: all)"),
    "min_p": ("min_p", lambda v: _real(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "repetition_penalty": ("repetition_penalty", lambda v: _real(v) and v > 0, "a number above 0"),
    "presence_penalty": ("presence_penalty", _real, "a number"),
    "frequency_penalty": ("frequency_penalty", _real, "a number"),
    "max_new_tokens": ("max_tokens", lambda v: _whole(v) and v > 0, "a whole number above 0"),
    "max_length": ("max_length", lambda v: _whole(v) and v > 0, "a whole number above 0"),
    "stop_strings": ("stop", _strings, "a string, or a list of strings"),
    "suppress_tokens": ("logit_bias", _tokens, "a list of token ids"),
}
# Unsupported keys that would change answers → values with which they change nothing, besides null.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "typical_p": (1,),
    "top_h": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_time": (),
    "token_healing": (False,),
    "watermarking_config": (),
    # llama.cpp's, from a GGUF file's header
    "penalty_last_n": (-1,),
    "xtc_probability": (0,),
    "mirostat": (0,),
}


@dataclass(frozen=True)
class ReleaseSettings:
    """`end_tokens`: each ends an answer. `sampling`: SamplingParams fields that the release sets. `unhonoured`: error
    messages for unsupported sampling settings. `generation`: its generation_config.json, or what corresponds to it in a
    GGUF file's header, for models made from this one.
    """

    end_tokens: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict[str, Any])
    unhonoured: tuple[str, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(
        cls, config: "ModelConfig", generation: Mapping[str, Any] | None = None, source: str = ""
    ) -> "ReleaseSettings":
        """Settings from config.json and generation_config.json (`source`). Raises UserError for invalid values."""
        given = {name: value for name, value in (generation or {}).items() if value is not None}
        for name in ("bos_token_id", "pad_token_id"):  # some are beyond the vocabulary, and never generated
            _ids(given.get(name), name, source, TOKEN_ID_LIMIT)
        for name, (_, fits, words) in SUPPORTED.items():
            if name in given and not fits(given[name]):
                raise UserError(f"{source}: {name} = {given[name]!r:.80} must be {words}, or null")
        if not isinstance(given.get("do_sample", True), bool):
            raise UserError(f"{source}: do_sample = {given['do_sample']!r:.80} must be true or false, or null")
        ends = _ids(given.get("eos_token_id"), "eos_token_id", source, config.vocab_size)
        own = [t for t in config.eos_token_ids if t < config.vocab_size]
        return cls(
            end_tokens=tuple(dict.fromkeys([*ends, *own])),
            sampling=_sampling(given, config.vocab_size, source),
            unhonoured=tuple(_unsupported(given, source)),
            generation=dict(generation or {}),
        )

    @classmethod
    def from_directory(cls, directory: Path, config: "ModelConfig") -> "ReleaseSettings":
        """Settings of a directory whose config.json has been read."""
        file = directory / GENERATION
        return cls.of(config, read_json(file) if os.path.lexists(file) else None, str(file))

    def ends_with(self, tokenizer: Tokenizer | None, config: "ModelConfig") -> tuple[int, ...]:
        """All end tokens, with the tokenizer's if it is within the vocabulary."""
        own = getattr(tokenizer, "eos_token_id", None)
        more = [own] if own is not None and own < config.vocab_size else []
        return tuple(dict.fromkeys([*self.end_tokens, *more]))

    def generation_config(self, config: "ModelConfig", tokenizer: Tokenizer | None = None) -> dict[str, Any]:
        """The generation_config.json of a model made from this one: all of its own, and every end token."""
        found = {name: value for name in TOKENS if (value := getattr(config, name)) is not None}
        found |= {name: value for name, value in self.generation.items() if value is not None}
        if ends := self.ends_with(tokenizer, config):
            first, *more = ends
            found["eos_token_id"] = [first, *more] if more else first
        return found


def _ids(value: Json, name: str, source: str, vocabulary: int) -> list[int]:
    """One token id or a list of them; -1 means none."""
    ids: list[int] = []
    for token in value if isinstance(value, list) else [value]:
        if token is None or token == -1:
            continue
        if _whole(token) and 0 <= token < vocabulary:
            ids.append(token)
        else:
            ids_from = f"a token id from 0 to {vocabulary - 1}, a list of them or null"
            raise UserError(f"{source}: {name} = {value!r:.80} must be {ids_from}")
    return ids


def _sampling(given: Mapping[str, Any], vocabulary: int, source: str) -> dict[str, Any]:
    found = {ours: given[name] for name, (ours, _, _) in SUPPORTED.items() if name in given}
    if given.get("do_sample") is False:
        found["temperature"] = 0.0  # greedy, whatever the temperature
    if "top_k" in found:
        found["top_k"] = max(0, found["top_k"])
    if "max_tokens" in found:
        found.pop("max_length", None)  # as in transformers
    if "stop" in found:
        found["stop"] = tuple([found["stop"]] if isinstance(found["stop"], str) else found["stop"])
    if "logit_bias" in found:
        _ids(found["logit_bias"], "suppress_tokens", source, vocabulary)
        found["logit_bias"] = tuple((token, SUPPRESS_BIAS) for token in found["logit_bias"])
    return found


def _unsupported(given: Mapping[str, Any], source: str) -> Iterable[str]:
    for name, neutral in UNSUPPORTED.items():
        if name in given and not any(given[name] == value for value in neutral):
            yield (
                f"{source}: {name} = {given[name]!r:.80} is not supported; remove it from the file to sample without it"
            )
