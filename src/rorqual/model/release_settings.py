"""What a model says of its use, beside the network and its weights: what ends an answer, and how to sample one.

Read in one place, from a directory's config.json and generation_config.json or from a GGUF file's header, and kept by
the network itself, so that engine, server, training and export go by the same (docs/settings.md says what wins).
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual import strict_json
from rorqual.errors import UserError
from rorqual.model.model_directory import read_json

if TYPE_CHECKING:
    from rorqual.model.config import ModelConfig

GENERATION = "generation_config.json"
LARGEST = 1 << 31  # what a token id is below
SUPPRESSED = -1e9  # a logit's bias with which its token never comes
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _real(value: Any) -> bool:
    return strict_json.is_finite(value)


def _whole(value: Any) -> bool:
    return type(value) is int


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and all(_whole(t) and t >= 0 for t in value)


# generation_config.json's keys that we go by: the engine's name, what a value must be, and that in words.
HONOURED: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "temperature": ("temperature", lambda v: _real(v) and v >= 0, "a number ≥ 0"),
    "top_p": ("top_p", lambda v: _real(v) and 0 < v <= 1, "a number above 0 and at most 1"),
    "top_k": ("top_k", lambda v: _whole(v) and v >= -1, "a whole number (0: all)"),
    "min_p": ("min_p", lambda v: _real(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "repetition_penalty": ("repetition_penalty", lambda v: _real(v) and v > 0, "a number above 0"),
    "presence_penalty": ("presence_penalty", _real, "a number"),
    "frequency_penalty": ("frequency_penalty", _real, "a number"),
    "max_new_tokens": ("max_tokens", lambda v: _whole(v) and v > 0, "a whole number above 0"),
    "max_length": ("max_length", lambda v: _whole(v) and v > 0, "a whole number above 0"),
    "stop_strings": (
        "stop",
        lambda v: (isinstance(v, str) and v) or (isinstance(v, list) and all(isinstance(s, str) and s for s in v)),
        "a text, or a list of texts",
    ),
    "suppress_tokens": ("logit_bias", _tokens, "a list of token ids"),
}
# Those that would change answers and that we cannot do → values with which they change nothing, beside null.
UNHONOURED: dict[str, tuple[Any, ...]] = {
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
    """`end_tokens`: each ends an answer. `sampling`: the engine's names (SamplingParams) and what the release says.
    `unhonoured`: sentences on what it says of sampling that we cannot do. `generation`: its generation_config.json, or
    what a GGUF file's header makes of one, kept by what is made from the model.
    """

    end_tokens: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    unhonoured: tuple[str, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: "ModelConfig", generation: Mapping[str, Any] | None = None, source: str = ""
    ) -> "ReleaseSettings":
        """What config.json and generation_config.json (`source`) say together. Raises UserError for wrong values."""
        said = {name: value for name, value in (generation or {}).items() if value is not None}
        for name in ("bos_token_id", "pad_token_id"):  # some lie beyond the network's vocabulary, and are not made
            _ids(said.get(name), name, source, LARGEST)
        for name, (_, fits, words) in HONOURED.items():
            if name in said and not fits(said[name]):
                raise UserError(f"{source}: {name} = {said[name]!r:.80} must be {words}, or null")
        if not isinstance(said.get("do_sample", True), bool):
            raise UserError(f"{source}: do_sample = {said['do_sample']!r:.80} must be true or false, or null")
        ends = _ids(said.get("eos_token_id"), "eos_token_id", source, config.vocab_size)
        own = [t for t in config.eos_token_ids if t < config.vocab_size]
        return cls(
            end_tokens=tuple(dict.fromkeys([*ends, *own])),
            sampling=_sampling(said, config.vocab_size, source),
            unhonoured=tuple(_unhonoured(said, source)),
            generation=dict(generation or {}),
        )

    @classmethod
    def beside(cls, directory: Path, config: "ModelConfig") -> "ReleaseSettings":
        """The same where config.json has been read already."""
        file = directory / GENERATION
        return cls.of(config, read_json(file) if os.path.lexists(file) else None, str(file))

    def ends_with(self, tokenizer: Any, config: "ModelConfig") -> tuple[int, ...]:
        """All end tokens: the tokenizer's too, where there is one and the network can make it."""
        own = getattr(tokenizer, "eos_token_id", None)
        more = [own] if own is not None and own < config.vocab_size else []
        return tuple(dict.fromkeys([*self.end_tokens, *more]))

    def generation_config(self, config: "ModelConfig", tokenizer: Any = None) -> dict[str, Any]:
        """The generation_config.json of what is made from the model: all that it said, and every end token."""
        found = {name: value for name in TOKENS if (value := getattr(config, name)) is not None}
        found |= {name: value for name, value in self.generation.items() if value is not None}
        if ends := self.ends_with(tokenizer, config):
            found["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
        return found


def _ids(value: Any, name: str, source: str, vocabulary: int) -> list[int]:
    """One token id or a list of them; -1, as some write, is none."""
    ids = [t for t in (value if isinstance(value, list) else [value]) if t is not None and t != -1]
    for token in ids:
        if not _whole(token) or not 0 <= token < vocabulary:
            ids_from = f"a token id from 0 to {vocabulary - 1}, a list of them or null"
            raise UserError(f"{source}: {name} = {value!r:.80} must be {ids_from}")
    return ids


def _sampling(said: Mapping[str, Any], vocabulary: int, source: str) -> dict[str, Any]:
    found = {ours: said[name] for name, (ours, _, _) in HONOURED.items() if name in said}
    if said.get("do_sample") is False:
        found["temperature"] = 0.0  # the most probable token, whatever else is said
    if "top_k" in found:
        found["top_k"] = max(0, found["top_k"])
    if "max_tokens" in found:
        found.pop("max_length", None)  # as in transformers
    if "stop" in found:
        found["stop"] = tuple([found["stop"]] if isinstance(found["stop"], str) else found["stop"])
    if "logit_bias" in found:
        _ids(found["logit_bias"], "suppress_tokens", source, vocabulary)
        found["logit_bias"] = tuple((token, SUPPRESSED) for token in found["logit_bias"])
    return found


def _unhonoured(said: Mapping[str, Any], source: str) -> Iterable[str]:
    for name, neutral in UNHONOURED.items():
        if name in said and not any(said[name] == value for value in neutral):
            yield (
                f"{source}: {name} = {said[name]!r:.80} is not done here, and answers would not be what it asks for; "
                "remove it from the file to sample without"
            )
