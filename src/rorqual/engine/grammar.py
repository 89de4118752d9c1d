"""Structured output: at every place only tokens that can still lead to a text of the asked-for form (llguidance)."""

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rorqual.errors import UserError


@dataclass(frozen=True)
class Grammar:
    """kind: what `text` is written in. A Lark grammar is llguidance's dialect: `start:` is its first rule."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    matcher: Any = field(default=None, compare=False, repr=False)  # once it is compiled


class Compiler:
    """Grammars for one model's vocabulary; `ends` are the tokens that may stand where the text is complete."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: tuple[int, ...]) -> None:
        if not ends:
            raise UserError("structured output needs a model with an end token (eos_token_id)")
        from llguidance.hf import from_tokenizer

        self.vocabulary, self.ends = vocabulary, ends
        self._tokens = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(ends))

    def compile(self, grammar: Grammar) -> Grammar:
        """With its matcher, which takes seconds for a large one. Raises UserError for a bad one."""
        from llguidance import LLMatcher

        written = {
            "json_schema": LLMatcher.grammar_from_json_schema,
            "regex": LLMatcher.grammar_from_regex,
            "lark": LLMatcher.grammar_from_lark,
        }
        try:
            matcher = LLMatcher(self._tokens, written[grammar.kind](grammar.text), log_level=0)
            problem = matcher.get_error() if matcher.is_error() else ""
        except ValueError as e:
            problem = str(e)
        if problem:
            raise UserError(f"the {grammar.kind.replace('_', ' ')} cannot be followed: {problem.strip()}")
        return replace(grammar, matcher=matcher)

    def guide(self, grammar: Grammar, after: int | None) -> "Guide":
        """after: the token from which on the grammar holds; None: from the start. Raises UserError for a bad one."""
        compiled = grammar if grammar.matcher is not None else self.compile(grammar)
        return Guide(compiled.matcher.deep_copy(), self, after)


class Guide:
    """One sample's place in its grammar."""

    def __init__(self, matcher: Any, compiler: Compiler, after: int | None) -> None:
        self._matcher, self._compiler, self._after = matcher, compiler, after
        self._read = 0  # tokens of the answer that the matcher has seen, or that came before it began

    def copy(self) -> "Guide":
        return Guide(self._matcher.deep_copy(), self._compiler, self._after)

    def forbidden(self, made: list[int]) -> Tensor | None:
        """After the answer's tokens so far: which of the vocabulary [V] may not come next; None: any may."""
        for token in made[self._read :]:
            self._read += 1
            if self._after is None:
                self._matcher.consume_token(token)
            elif token == self._after:
                self._after = None
        if self._after is not None:
            return None
        forbidden = torch.ones(self._compiler.vocabulary, dtype=torch.bool)
        if self._matcher.is_stopped() or self._matcher.is_error():
            forbidden[list(self._compiler.ends)] = False
            return forbidden
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: self._compiler.vocabulary]
        forbidden[: len(allowed)] = torch.from_numpy(allowed == 0)
        return forbidden


def json_grammar(schema: dict[str, Any] | None) -> Grammar:
    """Text that is JSON of this schema; None: any object."""
    return Grammar("json_schema", json.dumps({"type": "object"} if schema is None else schema))
