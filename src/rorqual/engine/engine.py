"""The engine's interface: generate a batch of completions, or submit requests and step."""

from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from rorqual.data.special_tokens import encode
from rorqual.data.tokenizer import beginning
from rorqual.engine.argument_checks import prompt_list, token_ids
from rorqual.engine.batch import Request, Sequence
from rorqual.engine.block_manager import BLOCK, BlockManager
from rorqual.engine.detokenizer import IncrementalDetokenizer, TokenDecoder, leaves_open
from rorqual.engine.grammar import Grammar, GrammarCompiler, GrammarState
from rorqual.engine.load_model import open_model
from rorqual.engine.paged_kv_cache import PagedKVCache, block_bytes
from rorqual.engine.prompt_logprobs import PromptLogprobs
from rorqual.engine.sampling_params import SamplingParams
from rorqual.engine.scheduler import Counters, Scheduler
from rorqual.engine.speculative import SpeculativeMethod
from rorqual.errors import UserError
from rorqual.kernels import cpu
from rorqual.kernels.quantized_linear import QuantizedWeight
from rorqual.model import Transformer
from rorqual.tokenizer_protocol import Tokenizer

DEFAULT_KV_CACHE_BYTES = 1 << 30  # for submitted requests; on a CPU, pages not written to take no memory
MAX_PREFILL_TOKENS = 4096  # a step; running sequences wait for them


@dataclass
class Completion:
    """One completion. `tokens` and `logprobs` include the stop token, `text` neither it nor a stop string."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop", "length" or "cancelled"
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)  # if requested, at every token


@dataclass
class Status:
    """Numbers of sequences, and of KV cache blocks; blocks only kept for the prefix cache count as free."""

    running: int
    waiting: int
    blocks_used: int
    blocks: int
    kv_cache_bytes: int  # that the cache takes
    counters: Counters


class Engine:
    """Generates from a model in memory (whose weights it uses in place), a Hugging Face directory or a .gguf file.

    `max_num_seqs`: sequences decoded at a time. `kv_cache_bytes`: memory of the KV cache; by default as much as
    `generate` needs for its prompts. `prefix_cache`: keep the KV cache of finished sequences for prompts with the same
    prefix; after a change of weights call `reset_prefix_cache`. `max_prefill_tokens`: prompt tokens a step.
    `speculative`: speculative decoding with drafts from the model's multi-token module ("mtp") or from prompt lookup
    ("ngram"; "auto": "ngram" where weights are quantised); it changes the time an answer takes, never the answer.
    `kv_cache_dtype`: by default the dtype that the model computes in; int8 halves BF16's memory and is fast where
    weights are quantised. Other arguments go to `open_model`: dtype, device, weights ("int4" or "int8").

    Raises UserError for invalid arguments, and for a model that cannot be read.
    """

    def __init__(
        self, model: str | Path | Transformer, tokenizer: Tokenizer | None = None, max_num_seqs: int = 256,
        kv_cache_bytes: int | None = None, prefix_cache: bool = False, max_prefill_tokens: int = MAX_PREFILL_TOKENS,
        speculative: SpeculativeMethod | Literal["auto"] | None = None, kv_cache_dtype: torch.dtype | None = None,
        **load: Any,
    ) -> None:  # fmt: skip
        for name, value, least in (
            ("max_num_seqs", max_num_seqs, 1),
            ("max_prefill_tokens", max_prefill_tokens, 1),
            ("kv_cache_bytes", kv_cache_bytes or 0, 0),
        ):
            if value < least:
                raise UserError(f"{name} = {value}: must be at least {least}")
        if speculative not in (None, "auto", "mtp", "ngram"):
            raise UserError(f'speculative = {speculative!r}: must be "mtp", "ngram" or "auto", or None')
        if not isinstance(model, Transformer):
            model, own = open_model(model, **load)
            tokenizer = tokenizer or own
        self.model, self.tokenizer, self.max_num_seqs = model, tokenizer, max_num_seqs
        self.kv_cache_bytes, self.prefix_cache = kv_cache_bytes, prefix_cache
        self.max_prefill_tokens = max_prefill_tokens
        if speculative == "mtp" and not model.config.num_nextn_predict_layers:
            raise UserError('this model has no multi-token module (num_nextn_predict_layers); use "ngram"')
        if speculative == "auto":  # elsewhere not measured, and rounding may depend on the number of tokens
            fused = isinstance(model.head_weight, QuantizedWeight) and cpu.capability() is not None
            speculative = "ngram" if fused else None
        self.speculative: SpeculativeMethod | None = speculative
        self.kv_cache_dtype = kv_cache_dtype or model.head_weight.dtype
        self.block_bytes = block_bytes(model.config, self.kv_cache_dtype, int(speculative == "mtp"))
        self.end_tokens = tuple(sorted(model.released.ends_with(tokenizer, model.config)))
        self.bos_tokens = () if tokenizer is None else beginning(tokenizer)
        self._scheduler: Scheduler | None = None
        self._detokenizers: dict[Sequence, IncrementalDetokenizer] = {}
        self.token_decoder = None if tokenizer is None else TokenDecoder(tokenizer, self.end_tokens)
        self.thinking_marks = None if self.token_decoder is None else self.token_decoder.think

    # -- submit and step

    def submit(self, prompt: str | abc.Sequence[int], params: SamplingParams, streaming: bool = True) -> Request:
        """Queue a request; `step` works on it. streaming: `step` returns its sequences after every token.

        Raises UserError for an invalid prompt, and one that context or KV cache do not hold.
        """
        request = self._request(prompt, params, "the prompt", torch.seed() if params.seed is None else params.seed)
        request.streaming = request.streaming or streaming
        scheduler = self._scheduler_for([request], at_least=DEFAULT_KV_CACHE_BYTES)
        self._add(scheduler, request)
        return request

    def score(self, tokens: abc.Sequence[int], top: int) -> Request:
        """Queue a text to be scored, with the `top` most probable tokens at every position; `step` works on it, a chunk
        at a time, until the request is done. Raises UserError for a text that context or KV cache do not hold.
        """
        request = self._request(tokens, SamplingParams(max_tokens=1), "the text", 0)
        request.sequences, request.prompt_logprobs = [], PromptLogprobs(request.prompt, self.model.head_weight, top)
        self._add(self._scheduler_for([request], at_least=DEFAULT_KV_CACHE_BYTES), request)
        return request

    def compile(self, grammar: Grammar) -> Grammar:
        """Compile a grammar, which makes `submit` fast. May run in another thread. Raises UserError for a bad one."""
        return self._grammars.compile(grammar)

    def step(self, before_forward: Callable[[], None] | None = None) -> list[Sequence]:
        """Decode a token for every running sequence, and prefill → finished sequences, and streaming ones, which grew.

        before_forward: called before the forward pass, which takes most of a step and releases the GIL.
        """
        if self._scheduler is None:
            return []
        found = self._scheduler.step(before_forward)
        for sequence in found:
            if (text := self._detokenizers.get(sequence)) is None:
                continue
            text.feed(self._without_stop_token(sequence), last=sequence.finish_reason is not None)
            if text.thinking and sequence.unopened and sequence.finish_reason is None:
                self._scheduler.batch.open_thinking(sequence)
            if text.stopped and sequence.finish_reason != "stop":
                if sequence.finish_reason is None:
                    self._scheduler.finish(self._scheduler.batch.sequences.index(sequence), "stop")
                sequence.finish_reason = "stop"
        return found

    def cancel(self, request: Request) -> None:
        """Stop a request; its blocks are free at once."""
        if self._scheduler is not None:
            self._scheduler.cancel(request)
        self.release(request)

    def release(self, request: Request) -> None:
        """Drop the detokenizers of a request that is done."""
        for sequence in request.sequences:
            self._detokenizers.pop(sequence, None)

    def prepare(self) -> None:
        """Allocate the KV cache, of `kv_cache_bytes`, before the first request. Raises UserError if memory lacks."""
        self._scheduler_for([])

    def reset(self) -> None:
        """Drop all requests, and the KV cache."""
        self._scheduler = None
        self._detokenizers.clear()

    def status(self) -> Status:
        """Running and waiting sequences, blocks, and counters."""
        scheduler = self._scheduler
        if scheduler is None:
            return Status(0, 0, 0, 0, 0, Counters())
        blocks = scheduler.blocks
        running, waiting = scheduler.batch.n, scheduler.num_waiting
        held = sum(store.nbytes for layer in scheduler.kv_cache.layers for store in layer)
        return Status(running, waiting, blocks.count - 1 - blocks.free, blocks.count - 1, held, scheduler.counters)

    def detokenizer(self, sequence: Sequence) -> IncrementalDetokenizer:
        """The detokenizer of a streaming sequence, with its text so far."""
        return self._detokenizers[sequence]

    @property
    def idle(self) -> bool:
        return self._scheduler is None or self._scheduler.idle

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, as is due when the weights have changed."""
        if self._scheduler is not None:
            self._scheduler.blocks.reset_prefix_cache()

    def completion(self, sequence: Sequence) -> Completion:
        """The completion of a finished sequence."""
        stream = self._detokenizers.pop(sequence, None)
        text = stream.text if stream is not None else self._decode(self._without_stop_token(sequence))
        return Completion(
            text,
            sequence.tokens,
            sequence.logprobs,
            sequence.finish_reason or "",
            sequence.request.cached_tokens,
            sequence.top_logprobs,
        )

    # -- generate

    def generate(
        self,
        prompts: abc.Sequence[str] | abc.Sequence[abc.Sequence[int]],
        params: SamplingParams | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Complete every prompt (text, or token ids) params.n times; entries i·n … i·n+n-1 belong to prompt i. A single
        prompt counts as a list of one. progress: called with the number of sequences that have just finished.

        The same seed gives the same completions. Raises UserError for an invalid prompt, and one that context or KV
        cache do not hold.
        """
        params = params or SamplingParams()
        seed = torch.seed() if params.seed is None else params.seed
        numbered = enumerate(prompt_list(prompts))
        requests = [self._request(p, params, f"prompt {i + 1}", seed + (i << 32)) for i, p in numbered]
        if not requests:
            return []
        scheduler = self._scheduler_for(requests)
        for request in requests:
            self._add(scheduler, request)
        try:
            left = {sequence for request in requests for sequence in request.sequences}
            while left:  # requests submitted before go on too
                ended = len(left)
                left.difference_update(sequence for sequence in self.step() if sequence.finish_reason)
                ended -= len(left)
                if progress and ended:
                    progress(ended)
        finally:  # an interruption leaves no request behind
            for request in requests:
                if not request.done:
                    scheduler.cancel(request)
        return [self.completion(sequence) for request in requests for sequence in request.sequences]

    def check(
        self, prompts: abc.Sequence[str] | abc.Sequence[abc.Sequence[int]], params: SamplingParams | None = None
    ) -> None:
        """Raise what `generate` would raise for these prompts, UserError, before anything is computed."""
        for i, prompt in enumerate(prompt_list(prompts)):
            self._request(prompt, params or SamplingParams(), f"prompt {i + 1}", 0)

    def stream(self, prompt: str | abc.Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the text of one completion as it is generated. Raises UserError without a tokenizer."""
        self.require_tokenizer()
        request = self.submit(prompt, replace(params or SamplingParams(), n=1))
        sequence, shown = request.sequences[0], 0
        text = self._detokenizers[sequence]
        try:
            while sequence.finish_reason is None:
                self.step()
                if len(text.text) > shown:
                    yield text.text[shown:]
                    shown = len(text.text)
        finally:
            if sequence.finish_reason is None:
                self.cancel(request)
            self._detokenizers.pop(sequence, None)

    # -- internals

    def _request(self, prompt: str | abc.Sequence[int], params: SamplingParams, name: str, seed: int) -> Request:
        context = self.model.config.max_position_embeddings
        ids = tuple(self.encode(prompt)) if isinstance(prompt, str) else token_ids(prompt, name)
        if not ids:
            raise UserError(f"{name} is empty; give at least one token")
        if len(ids) >= context:
            raise UserError(
                f"{name} has {len(ids)} tokens, but the model's context holds {context} "
                "(max_position_embeddings); shorten it"
            )
        vocabulary = self.model.config.vocab_size
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
        if self.kv_cache_bytes is not None or (self._scheduler is not None and not self._scheduler.idle):
            bounded = self.kv_cache_bytes is not None
            most = ((self._count(self.kv_cache_bytes) if bounded else self._scheduler.blocks.count) - 2) * BLOCK
            if len(ids) + limit > most:
                raise UserError(
                    f"{name} with its answer takes {len(ids) + limit} tokens, but the KV cache holds {max(0, most)}; "
                    "lower max_tokens, or raise kv_cache_bytes (--cache-gb)"
                )
        think_end = None if params.thinking_budget is None else self._think_end()
        stops = (() if params.ignore_eos else self.end_tokens) + params.stop_token_ids
        opening = self.opening(ids)
        thinking = leaves_open(opening)
        grammar_state = None
        if params.grammar is not None:
            grammar_state = self._start_grammar(params.grammar, thinking, may_think=not opening)
        # Where the model may still open its thinking, its tokens are read at once, since the budget counts from there.
        unopened = think_end is not None and self.thinking_marks is not None and not thinking
        streaming = bool(params.stop) or unopened
        return Request(ids, params, limit, seed, stops, think_end, streaming, opening, unopened, grammar_state)

    def _add(self, scheduler: Scheduler, request: Request) -> None:
        if request.streaming and self.token_decoder is not None:
            for sequence in request.sequences:
                self._detokenizers[sequence] = IncrementalDetokenizer(
                    self.token_decoder, request.params.stop, request.opening
                )
        scheduler.add(request)

    def _scheduler_for(self, requests: list[Request], at_least: int = 0) -> Scheduler:
        """The scheduler, with a KV cache that holds these requests and has `at_least` bytes."""
        scheduler = self._scheduler
        if self.kv_cache_bytes is not None:
            count = self._count(self.kv_cache_bytes)
        else:
            longest = max(-(-(len(r.prompt) + r.max_new_tokens) // BLOCK) + 1 for r in requests)
            sequences = sum(r.params.n for r in requests)
            count = 2 + longest * min(self.max_num_seqs + self.max_num_seqs // 8, sequences + len(requests))
            count = max(count, self._count(at_least))
        if scheduler is None or (scheduler.idle and scheduler.blocks.count < count):
            weight = self.model.head_weight
            more = int(self.speculative == "mtp")
            try:
                cache = PagedKVCache(self.model.config, count, self.kv_cache_dtype, weight.device, more)
            except RuntimeError:  # PyTorch's error for lack of memory, on a CPU too
                need = count * self.block_bytes / 2**30
                raise UserError(f"no memory for a KV cache of {need:.3g} GiB; lower --cache-gb") from None
            self._scheduler = scheduler = Scheduler(
                self.model,
                self.max_num_seqs,
                cache,
                BlockManager(count),
                self.prefix_cache,
                self.max_prefill_tokens,
                self.speculative,
            )
        return scheduler

    def _count(self, cache_bytes: int) -> int:
        return cache_bytes // self.block_bytes

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """A text's token ids. begin: prepend the tokenizer's BOS, unless the text starts with it; chat templates write
        their own.
        """
        ids = self._encode(text)
        return [*self.bos_tokens, *ids] if begin and tuple(ids[: len(self.bos_tokens)]) != self.bos_tokens else ids

    def _encode(self, text: str) -> list[int]:
        return encode(text, self.require_tokenizer())

    def _think_end(self) -> int:
        ids = self._encode("</think>")
        if len(ids) != 1:
            raise UserError("thinking_budget needs a tokenizer with </think> as one token")
        return ids[0]

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError if the engine has none."""
        if self.tokenizer is None:
            raise UserError("this engine has no tokenizer; give token ids or pass tokenizer=")
        return self.tokenizer

    def opening(self, prompt: abc.Sequence[int]) -> str:
        """The end of a prompt that belongs to the answer's thinking, from its mark on; "" for none."""
        return "" if self.token_decoder is None else self.token_decoder.opening(prompt)

    def _start_grammar(self, grammar: Grammar, thinking: bool, may_think: bool) -> GrammarState:
        return self._grammars.start(grammar, self.thinking_marks, thinking, may_think)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.require_tokenizer(), self.model.config.vocab_size, self.end_tokens)

    def _without_stop_token(self, sequence: Sequence) -> list[int]:
        """A sequence's tokens without its stop token."""
        tokens = sequence.tokens
        return tokens[:-1] if tokens and tokens[-1] in sequence.request.stop_token_ids else tokens

    def _decode(self, tokens: list[int]) -> str:
        return "" if self.token_decoder is None else self.token_decoder.decode(tokens)
