"""Structured output: mask tokens that a grammar does not allow next (llguidance)."""

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from rorqual.errors import UserError
from rorqual.extras import require
from rorqual.tokenizer_protocol import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerFast

WHITESPACE = r"(\r?\n){0,2}[ \t]{0,20}"  # between two tokens of JSON, as in llama.cpp's grammars


@dataclass(frozen=True)
class Grammar:
    """kind: the language of `text`. A Lark grammar is in llguidance's dialect: `start:` is its first rule.

    source: the request's field, for error messages.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    source: str = ""
    matcher: "LLMatcher | None" = field(default=None, compare=False, repr=False)  # once compiled


class GrammarCompiler:
    """Compiles grammars for one model's vocabulary; `ends` are the tokens allowed where the text is complete."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: tuple[int, ...]) -> None:
        if not ends:
            raise UserError("structured output needs a model with an end token (eos_token_id)")
        require("serve", "llguidance")
        from llguidance.hf import from_tokenizer

        self.vocabulary, self.ends = vocabulary, ends
        self._tokens = from_tokenizer(
            cast("PreTrainedTokenizerFast", tokenizer), n_vocab=vocabulary, eos_token=list(ends)
        )

    def compile(self, grammar: Grammar) -> Grammar:
        """The grammar with its matcher; takes seconds for a large one. Raises UserError for a bad one."""
        from llguidance import LLMatcher

        parsers = {
            "json_schema": LLMatcher.grammar_from_json_schema,
            "regex": LLMatcher.grammar_from_regex,
            "lark": LLMatcher.grammar_from_lark,
        }
        matcher, problem = None, ""
        try:
            matcher = LLMatcher(self._tokens, parsers[grammar.kind](grammar.text), log_level=0)
            problem = matcher.get_error() if matcher.is_error() else ""
        except ValueError as e:
            problem = str(e)
        if matcher is not None and not problem:
            matcher.compute_bitmask()  # only this finds out whether there is a first token
            problem = "no text fits it; does a $ref lead to itself?" if matcher.is_error() else ""
        if problem:
            name, detail = f"the {grammar.kind.replace('_', ' ')}", problem.strip()
            if grammar.source:  # the other lines quote the generated grammar, which the client has not seen
                name, detail = grammar.source, detail.splitlines()[0]
            raise UserError(f"{name} cannot be followed: {detail}")
        return replace(grammar, matcher=matcher)

    def start(self, grammar: Grammar, think: tuple[int, int] | None, thinking: bool, may_think: bool) -> "GrammarState":
        """The state of a new answer. The grammar constrains the answer only, not the thinking before it.

        think: the tokens that open and close thinking. thinking: the prompt has opened it. may_think: else the model
        may open it with its first token. Raises UserError for a bad grammar.
        """
        matcher = grammar.matcher or self.compile(grammar).matcher
        assert matcher is not None
        opens, closes = think or (None, None)
        may_open = opens if may_think and not thinking else None
        return GrammarState(matcher.deep_copy(), self, may_open, closes, thinking and closes is not None)


class GrammarState:
    """One sequence's position in its grammar."""

    def __init__(
        self, matcher: "LLMatcher", compiler: GrammarCompiler, opens: int | None, closes: int | None, thinking: bool
    ) -> None:
        self._matcher, self._compiler = matcher, compiler
        self._opens, self._closes, self._thinking = opens, closes, thinking
        self._read = 0  # tokens consumed, those of the thinking included

    def copy(self) -> "GrammarState":
        return GrammarState(self._matcher.deep_copy(), self._compiler, self._opens, self._closes, self._thinking)

    def forbidden(self, generated: list[int], logits: Tensor) -> Tensor | None:
        """Mask [V] of tokens that may not follow the tokens generated so far; None: all may.

        logits [V]: the first token may open the thinking if it is the most probable one.
        """
        for token in generated[self._read :]:
            if self._read == 0 and token == self._opens:
                self._thinking = True
            elif not self._thinking:
                self._matcher.consume_token(token)
            elif token == self._closes:
                self._thinking = False
            self._read += 1
        if self._thinking:
            return None
        forbidden = torch.ones(self._compiler.vocabulary, dtype=torch.bool)
        if self._matcher.is_stopped() or self._matcher.is_error():
            forbidden[list(self._compiler.ends)] = False
            return forbidden
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: self._compiler.vocabulary]
        forbidden[: len(allowed)] = torch.from_numpy(allowed == 0)
        if self._read == 0 and self._opens is not None and int(logits.argmax()) == self._opens:
            forbidden[self._opens] = False
        return forbidden


def json_grammar(schema: dict[str, Any] | None) -> Grammar:
    """A grammar of JSON of this schema; None: any object."""
    return Grammar("json_schema", json.dumps(bounded({"type": "object"} if schema is None else schema)))


def bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with bounded white space, which small models otherwise repeat without end."""
    return {"x-guidance": {"whitespace_pattern": WHITESPACE}} | schema
