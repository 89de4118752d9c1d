"""Structured output: at every place only tokens that can still lead to a text of the asked-for form (llguidance)."""

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rorqual.errors import UserError
from rorqual.extras import require

WHITE = r"(\r?\n){0,2}[ \t]{0,20}"  # between two tokens of JSON, as in llama.cpp's grammars


@dataclass(frozen=True)
class Grammar:
    """kind: what `text` is written in. A Lark grammar is llguidance's dialect: `start:` is its first rule.

    source: the field that asked for it, for error messages.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    source: str = ""
    matcher: Any = field(default=None, compare=False, repr=False)  # once it is compiled


class GrammarCompiler:
    """Grammars for one model's vocabulary; `ends` are the tokens that may stand where the text is complete."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: tuple[int, ...]) -> None:
        if not ends:
            raise UserError("structured output needs a model with an end token (eos_token_id)")
        require("serve", "llguidance")
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
        if not problem:
            matcher.compute_bitmask()  # only now is it known whether there is a first token
            problem = "no text fits it; does a $ref lead to itself?" if matcher.is_error() else ""
        if problem:
            name, said = f"the {grammar.kind.replace('_', ' ')}", problem.strip()
            if grammar.source:  # whose writer has not seen the grammar that the other lines show
                name, said = grammar.source, said.splitlines()[0]
            raise UserError(f"{name} cannot be followed: {said}")
        return replace(grammar, matcher=matcher)

    def guide(self, grammar: Grammar, think: tuple[int, int] | None, thinking: bool, silent: bool) -> "GrammarState":
        """The grammar holds for the answer: after the token that closes the thinking, where the prompt has opened it
        (`thinking`); else from the start, unless a model that the prompt has not told to be `silent` opens it first.
        think: the tokens that open and close it. Raises UserError for a bad grammar.
        """
        compiled = grammar if grammar.matcher is not None else self.compile(grammar)
        opens, closes = think or (None, None)
        begins = None if thinking or silent else opens
        return GrammarState(compiled.matcher.deep_copy(), self, begins, closes, thinking and closes is not None)


class GrammarState:
    """One sample's place in its grammar."""

    def __init__(
        self, matcher: Any, compiler: GrammarCompiler, opens: int | None, closes: int | None, thinking: bool
    ) -> None:
        self._matcher, self._compiler = matcher, compiler
        self._opens, self._closes, self._thinking = opens, closes, thinking
        self._read = 0  # tokens of the answer that the matcher has seen, or that came before it began

    def copy(self) -> "GrammarState":
        return GrammarState(self._matcher.deep_copy(), self._compiler, self._opens, self._closes, self._thinking)

    def forbidden(self, made: list[int], logits: Tensor) -> Tensor | None:
        """After the answer's tokens so far: which of the vocabulary [V] may not come next; None: any may.

        logits [V]: thinking may begin where it is what the model would say if it were free.
        """
        for token in made[self._read :]:
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
    """Text that is JSON of this schema; None: any object."""
    return Grammar("json_schema", json.dumps(bounded({"type": "object"} if schema is None else schema)))


def bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of JSON with little white space, which small models else go on with for ever."""
    return {"x-guidance": {"whitespace_pattern": WHITE}} | schema
