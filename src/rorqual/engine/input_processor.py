"""Prompts and sampling parameters, checked and turned into requests."""

from collections import abc
from functools import cached_property

from rorqual.data.special_tokens import encode
from rorqual.data.tokenizer import beginning
from rorqual.engine.argument_checks import token_ids
from rorqual.engine.detokenizer import IncrementalDetokenizer, TokenDecoder, leaves_open
from rorqual.engine.grammar import GrammarCompiler
from rorqual.engine.sampling_params import SamplingParams
from rorqual.engine.sequence import Request
from rorqual.errors import UserError
from rorqual.model import ModelConfig
from rorqual.tokenizer_protocol import Tokenizer


class InputProcessor:
    """Makes requests for one model. `token_decoder`: single tokens as text; None without a tokenizer."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None, end_tokens: tuple[int, ...]) -> None:
        self.config, self.tokenizer, self.end_tokens = config, tokenizer, end_tokens
        self.bos_tokens = () if tokenizer is None else beginning(tokenizer)
        self.token_decoder = None if tokenizer is None else TokenDecoder(tokenizer, end_tokens)

    def request(
        self, prompt: str | abc.Sequence[int], params: SamplingParams, seed: int, name: str,
        max_tokens: int | None = None, streaming: bool = False,
    ) -> Request:  # fmt: skip
        """A request whose tokens are in the vocabulary, and which the context holds.

        name: of the prompt, for error messages. max_tokens: tokens of prompt and answer that the KV cache holds.
        streaming: its tokens are read as they come. Raises UserError.
        """
        context, vocabulary = self.config.max_position_embeddings, self.config.vocab_size
        ids = tuple(self.encode(prompt)) if isinstance(prompt, str) else token_ids(prompt, name)
        if not ids:
            raise UserError(f"{name} is empty; give at least one token")
        if len(ids) >= context:
            raise UserError(
                f"{name} has {len(ids)} tokens, but the model's context holds {context} "
                "(max_position_embeddings); shorten it"
            )
        for of, tokens in ((name, ids), ("logit_bias", (t for t, _ in params.logit_bias))):
            if not all(0 <= t < vocabulary for t in tokens):
                raise UserError(f"{of}: token ids must be from 0 to {vocabulary - 1}")
        if params.stop and self.tokenizer is None:
            raise UserError("this engine has no tokenizer, which stop strings need; give stop_token_ids")
        limit = min(params.max_tokens, context - len(ids))
        if params.max_length is not None:
            if len(ids) >= params.max_length:
                raise UserError(
                    f"{name} has {len(ids)} tokens, but the model's max_length allows {params.max_length} with the "
                    "answer; set max_tokens"
                )
            limit = min(limit, params.max_length - len(ids))
        if max_tokens is not None and len(ids) + limit > max_tokens:
            raise UserError(
                f"{name} with its answer takes {len(ids) + limit} tokens, but the KV cache holds {max_tokens}; "
                "lower max_tokens, or raise kv_cache_bytes (--cache-gb)"
            )
        think_end = None if params.thinking_budget is None else self._think_end()
        stops = (() if params.ignore_eos else self.end_tokens) + params.stop_token_ids
        opening = self.opening(ids)
        thinking = leaves_open(opening)
        grammar_state = None
        if params.grammar is not None:
            grammar_state = self.grammars.start(params.grammar, self.thinking_marks, thinking, may_think=not opening)
        # Where the model may still open its thinking, its tokens are read at once, since the budget counts from there.
        unopened = think_end is not None and self.thinking_marks is not None and not thinking
        streaming = streaming or bool(params.stop) or unopened
        request = Request(ids, params, limit, seed, stops, think_end, streaming, opening, unopened, grammar_state)
        if streaming and self.token_decoder is not None:
            for sequence in request.sequences:
                sequence.detokenizer = IncrementalDetokenizer(self.token_decoder, params.stop, opening)
        return request

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """A text's token ids. begin: prepend the tokenizer's BOS, unless the text starts with it; chat templates write
        their own.
        """
        ids = encode(text, self.require_tokenizer())
        return [*self.bos_tokens, *ids] if begin and tuple(ids[: len(self.bos_tokens)]) != self.bos_tokens else ids

    def decode(self, tokens: list[int]) -> str:
        return "" if self.token_decoder is None else self.token_decoder.decode(tokens)

    def opening(self, prompt: abc.Sequence[int]) -> str:
        """The end of a prompt that belongs to the answer's thinking, from its mark on; "" for none."""
        return "" if self.token_decoder is None else self.token_decoder.opening(prompt)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError if the engine has none."""
        if self.tokenizer is None:
            raise UserError("this engine has no tokenizer; give token ids or pass tokenizer=")
        return self.tokenizer

    @property
    def thinking_marks(self) -> tuple[int, int] | None:
        """The tokens that open and close thinking; None where the vocabulary has none."""
        return None if self.token_decoder is None else self.token_decoder.think

    @cached_property
    def grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.require_tokenizer(), self.config.vocab_size, self.end_tokens)

    def _think_end(self) -> int:
        ids = encode("</think>", self.require_tokenizer())
        if len(ids) != 1:
            raise UserError("thinking_budget needs a tokenizer with </think> as one token")
        return ids[0]
