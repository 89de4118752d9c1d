"""The front of generation: prompts in, completions out, all at once or as they come."""

from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from rorqual.data.special_tokens import encode
from rorqual.data.tokenizer import beginning
from rorqual.engine.argument_checks import several, token_ids
from rorqual.engine.batch import Request, Sequence
from rorqual.engine.block_manager import BLOCK, BlockManager
from rorqual.engine.detokenizer import IncrementalDetokenizer, TokenDecoder, leaves_open
from rorqual.engine.grammar import Grammar, GrammarCompiler, GrammarState
from rorqual.engine.load_model import open_model
from rorqual.engine.paged_kv_cache import PagedKVCache, block_bytes
from rorqual.engine.prompt_logprobs import PromptLogprobs
from rorqual.engine.sampling_params import SamplingParams
from rorqual.engine.scheduler import Counters, Scheduler
from rorqual.engine.speculative import Way
from rorqual.errors import UserError
from rorqual.kernels import cpu
from rorqual.kernels.quantized_linear import QuantizedWeight
from rorqual.model import Transformer

DEFAULT_KV_CACHE_BYTES = 1 << 30  # of the cache for requests that come and go; on a CPU what is not used is not taken
MAX_PREFILL_TOKENS = 4096  # prompt tokens a step: what runs meanwhile waits for them


@dataclass
class Completion:
    """One continuation. `tokens` and `logprobs` include the stop token, `text` neither it nor a stop string."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop", "length" or "cancelled"
    cached_tokens: int = 0  # of the prompt, found in the cache
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)  # where asked for, at every token


@dataclass
class Status:
    """Samples, and blocks of the cache; blocks held by nobody but kept for later prompts count as free."""

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
    ("ngram"; "auto": that, where weights are quantised); it changes the time an answer takes, never the answer.
    `kv_cache_dtype`: by default the dtype that the model computes in; int8 halves BF16's memory and is quick where
    weights are quantised. Other arguments go to `open_model`: dtype, device, weights ("int4" or "int8").
    """

    def __init__(
        self, model: str | Path | Transformer, tokenizer: Any = None, max_num_seqs: int = 256,
        kv_cache_bytes: int | None = None, prefix_cache: bool = False, max_prefill_tokens: int = MAX_PREFILL_TOKENS,
        speculative: Way | Literal["auto"] | None = None, kv_cache_dtype: torch.dtype | None = None, **load: Any,
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
        self.kv_cache_bytes, self.prefix_cache, self.max_prefill_tokens = (
            kv_cache_bytes,
            prefix_cache,
            max_prefill_tokens,
        )
        if speculative == "mtp" and not model.config.num_nextn_predict_layers:
            raise UserError('this model has no multi-token module (num_nextn_predict_layers); use "ngram"')
        if speculative == "auto":  # elsewhere it has not been measured, and more lanes may round otherwise
            direct = isinstance(model.head_weight, QuantizedWeight) and cpu.capability() is not None
            speculative = "ngram" if direct else None
        self.speculative: Way | None = speculative
        self.kv_cache_dtype = kv_cache_dtype or model.head_weight.dtype
        self.block_bytes = block_bytes(model.config, self.kv_cache_dtype, int(speculative == "mtp"))
        self.end_tokens = tuple(sorted(model.released.ends_with(tokenizer, model.config)))
        self.bos_tokens = () if tokenizer is None else beginning(tokenizer)
        self._scheduler: Scheduler | None = None
        self._texts: dict[Sequence, IncrementalDetokenizer] = {}
        self.token_decoder = None if tokenizer is None else TokenDecoder(tokenizer, self.end_tokens)
        self.thinking_marks = None if self.token_decoder is None else self.token_decoder.think

    # -- requests that come and go

    def submit(self, prompt: str | abc.Sequence[int], params: SamplingParams, streaming: bool = True) -> Request:
        """Take a request in; `step` works on it. Raises UserError for a prompt that cannot be continued."""
        request = self._request(prompt, params, "the prompt", torch.seed() if params.seed is None else params.seed)
        request.streaming = request.streaming or streaming
        scheduler = self._scheduler_for([request], at_least=DEFAULT_KV_CACHE_BYTES)
        self._add(scheduler, request)
        return request

    def score(self, tokens: abc.Sequence[int], top: int) -> Request:
        """Take a text in to be scored, with the `top` most probable tokens at every place; `step` works on it, a chunk
        at a time, until the request is done. Raises UserError for a text that context or cache do not hold.
        """
        request = self._request(tokens, SamplingParams(max_tokens=1), "the text", 0)
        request.sequences, request.prompt_logprobs = [], PromptLogprobs(request.prompt, self.model.head_weight, top)
        self._add(self._scheduler_for([request], at_least=DEFAULT_KV_CACHE_BYTES), request)
        return request

    def compile(self, grammar: Grammar) -> Grammar:
        """A grammar with which `submit` is quick. Another thread may do this. Raises UserError for a bad one."""
        return self._grammars.compile(grammar)

    def step(self, begins: Callable[[], None] | None = None) -> list[Sequence]:
        """Make a token for every running sequence; returns the samples that ended, and watched ones, which grew.

        begins: called when the network is about to compute, which takes most of a step and leaves the interpreter free.
        """
        if self._scheduler is None:
            return []
        found = self._scheduler.step(begins)
        for sample in found:
            if (text := self._texts.get(sample)) is None:
                continue
            text.feed(self._without_stop_token(sample), last=sample.finish_reason is not None)
            if text.thinking and sample.unopened and sample.finish_reason is None:
                self._scheduler.batch.open_thinking(sample)
            if text.stopped and sample.finish_reason != "stop":
                if sample.finish_reason is None:
                    self._scheduler.finish(self._scheduler.batch.sequences.index(sample), "stop")
                sample.finish_reason = "stop"
        return found

    def cancel(self, request: Request) -> None:
        """Stop a request; its blocks are free at once."""
        if self._scheduler is not None:
            self._scheduler.cancel(request)
        self.release(request)

    def release(self, request: Request) -> None:
        """Forget the texts of a request that is done."""
        for sample in request.sequences:
            self._texts.pop(sample, None)

    def prepare(self) -> None:
        """Make the cache, of `cache_bytes`, before a request wants it. Raises UserError without memory for it."""
        self._scheduler_for([])

    def reset(self) -> None:
        """Give everything up: what ran, and the cache."""
        self._scheduler = None
        self._texts.clear()

    def status(self) -> Status:
        """What goes on at the moment, and what has happened since the beginning."""
        scheduler = self._scheduler
        if scheduler is None:
            return Status(0, 0, 0, 0, 0, Counters())
        blocks = scheduler.blocks
        running, waiting = scheduler.batch.n, scheduler.num_waiting
        held = sum(store.nbytes for layer in scheduler.kv_cache.layers for store in layer)
        return Status(running, waiting, blocks.count - 1 - blocks.free, blocks.count - 1, held, scheduler.counters)

    def detokenizer(self, sample: Sequence) -> IncrementalDetokenizer:
        """What a watched sample has said so far."""
        return self._texts[sample]

    @property
    def idle(self) -> bool:
        return self._scheduler is None or self._scheduler.idle

    def reset_prefix_cache(self) -> None:
        """Remember no past, as is due when the weights have changed."""
        if self._scheduler is not None:
            self._scheduler.blocks.reset_prefix_cache()

    def completion(self, sample: Sequence) -> Completion:
        """What a finished sample has become."""
        stream = self._texts.pop(sample, None)
        text = stream.text if stream is not None else self._spell(self._without_stop_token(sample))
        return Completion(
            text,
            sample.tokens,
            sample.logprobs,
            sample.finish_reason or "",
            sample.request.cached_tokens,
            sample.top_logprobs,
        )

    # -- all at once

    def generate(
        self,
        prompts: abc.Sequence[str] | abc.Sequence[abc.Sequence[int]],
        params: SamplingParams | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Continue every prompt (text, or token ids) params.n times; entries i·n … i·n+n-1 belong to prompt i. One
        prompt alone counts as a list of one.

        The same seed gives the same completions. Raises UserError for a prompt that leaves no room in the context.
        """
        params = params or SamplingParams()
        seed = torch.seed() if params.seed is None else params.seed
        asked = enumerate(several(prompts))
        requests = [self._request(p, params, f"prompt {i + 1}", seed + (i << 32)) for i, p in asked]
        if not requests:
            return []
        scheduler = self._scheduler_for(requests)
        for request in requests:
            self._add(scheduler, request)
        try:
            left = {sample for request in requests for sample in request.sequences}
            while left:  # what others have submitted goes on meanwhile
                ended = len(left)
                left.difference_update(sample for sample in self.step() if sample.finish_reason)
                ended -= len(left)
                if progress and ended:
                    progress(ended)
        finally:  # an interruption leaves nothing behind
            for request in requests:
                if not request.done:
                    scheduler.cancel(request)
        return [self.completion(sample) for request in requests for sample in request.sequences]

    def check(
        self, prompts: abc.Sequence[str] | abc.Sequence[abc.Sequence[int]], params: SamplingParams | None = None
    ) -> None:
        """Raise what `generate` would raise for these prompts, UserError, before anything is computed."""
        for i, prompt in enumerate(several(prompts)):
            self._request(prompt, params or SamplingParams(), f"prompt {i + 1}", 0)

    def stream(self, prompt: str | abc.Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one continuation, piece by piece as it is made. Raises UserError without a tokenizer."""
        if self.tokenizer is None:
            raise UserError("this engine has no tokenizer, so there is no text to stream; pass tokenizer=")
        request = self.submit(prompt, replace(params or SamplingParams(), n=1))
        sample, shown = request.sequences[0], 0
        text = self._texts[sample]
        try:
            while sample.finish_reason is None:
                self.step()
                if len(text.text) > shown:
                    yield text.text[shown:]
                    shown = len(text.text)
        finally:
            if sample.finish_reason is None:
                self.cancel(request)
            self._texts.pop(sample, None)

    # -- the rest

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
        room = min(params.max_tokens, context - len(ids))
        if params.max_length is not None:
            if len(ids) >= params.max_length:
                raise UserError(
                    f"{name} has {len(ids)} tokens, but the model's max_length allows {params.max_length} with the "
                    "answer; say how long that may be (max_tokens)"
                )
            room = min(room, params.max_length - len(ids))
        if self.kv_cache_bytes is not None or (self._scheduler is not None and not self._scheduler.idle):
            bounded = self.kv_cache_bytes is not None
            most = ((self._count(self.kv_cache_bytes) if bounded else self._scheduler.blocks.count) - 2) * BLOCK
            if len(ids) + room > most:
                raise UserError(
                    f"{name} with its answer takes {len(ids) + room} tokens, but the cache holds {max(0, most)}; lower "
                    "max_tokens, or give the engine more memory for its cache"
                )
        think_end = None if params.thinking_budget is None else self._think_end()
        stops = (() if params.ignore_eos else self.end_tokens) + params.stop_token_ids
        opening = self.opening(ids)
        thinking = leaves_open(opening)
        guide = None if params.grammar is None else self._guide(params.grammar, thinking, silent=bool(opening))
        # Whoever may yet open the thinking is watched, since the budget counts from there.
        silent = think_end is not None and self.thinking_marks is not None and not thinking
        watched = bool(params.stop) or silent
        return Request(ids, params, room, seed, stops, think_end, watched, opening, silent, guide)

    def _add(self, scheduler: Scheduler, request: Request) -> None:
        if request.streaming and self.token_decoder is not None:
            for sample in request.sequences:
                self._texts[sample] = IncrementalDetokenizer(self.token_decoder, request.params.stop, request.opening)
        scheduler.add(request)

    def _scheduler_for(self, requests: list[Request], at_least: int = 0) -> Scheduler:
        """The scheduler, with a cache that has room for these, of `at_least` so many bytes."""
        scheduler = self._scheduler
        if self.kv_cache_bytes is not None:
            count = self._count(self.kv_cache_bytes)
        else:
            longest = max(-(-(len(r.prompt) + r.max_new_tokens) // BLOCK) + 1 for r in requests)
            samples = sum(r.params.n for r in requests)
            count = 2 + longest * min(self.max_num_seqs + self.max_num_seqs // 8, samples + len(requests))
            count = max(count, self._count(at_least))
        if scheduler is None or (scheduler.idle and scheduler.blocks.count < count):
            weight = self.model.head_weight
            more = int(self.speculative == "mtp")
            try:
                cache = PagedKVCache(self.model.config, count, self.kv_cache_dtype, weight.device, more)
            except RuntimeError:  # PyTorch's word for it, on a CPU too
                need = count * self.block_bytes / 2**30
                raise UserError(
                    f"there is no memory for a cache of {need:.3g} GiB; make it smaller (--kv-cache-gb)"
                ) from None
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
        """A text's tokens. begin: it is a bare text, to be begun as the tokenizer begins all (BOS), unless it begins so
        already; a conversation begins as its template says.
        """
        ids = self._encode(text)
        return [*self.bos_tokens, *ids] if begin and tuple(ids[: len(self.bos_tokens)]) != self.bos_tokens else ids

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise UserError("this engine has no tokenizer; give token ids or pass tokenizer=")
        return encode(text, self.tokenizer)

    def _think_end(self) -> int:
        ids = self._encode("</think>")
        if len(ids) != 1:
            raise UserError("thinking_budget needs a tokenizer with </think> as one token")
        return ids[0]

    def opening(self, prompt: abc.Sequence[int]) -> str:
        """What a prompt has written of the answer's thinking, from its mark on; "" for none."""
        return "" if self.token_decoder is None else self.token_decoder.opening(prompt)

    def _guide(self, grammar: Grammar, thinking: bool, silent: bool) -> GrammarState:
        return self._grammars.guide(grammar, self.thinking_marks, thinking, silent)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        if self.tokenizer is None:
            raise UserError("this engine has no tokenizer, which a grammar needs")
        return GrammarCompiler(self.tokenizer, self.model.config.vocab_size, self.end_tokens)

    def _without_stop_token(self, sample: Sequence) -> list[int]:
        """A sample's tokens but for the one that ended it."""
        tokens = sample.tokens
        return tokens[:-1] if tokens and tokens[-1] in sample.request.stop_token_ids else tokens

    def _spell(self, tokens: list[int]) -> str:
        return "" if self.token_decoder is None else self.token_decoder.decode(tokens)
