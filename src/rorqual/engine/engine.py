"""The engine's interface: generate a batch of completions, or submit requests and step."""

from collections import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from rorqual.adapters.peft_files import read_adapter
from rorqual.adapters.served import ServedAdapters
from rorqual.engine.argument_checks import prompt_list
from rorqual.engine.block_manager import BLOCK, BlockManager
from rorqual.engine.detokenizer import IncrementalDetokenizer
from rorqual.engine.grammar import Grammar
from rorqual.engine.input_processor import InputProcessor
from rorqual.engine.load_model import Weights, open_model
from rorqual.engine.outputs import Completion, Counters, Status
from rorqual.engine.paged_kv_cache import FP8, PagedKVCache, block_bytes
from rorqual.engine.prompt_logprobs import PromptLogprobs
from rorqual.engine.sampling_params import SamplingParams
from rorqual.engine.scheduler import Scheduler
from rorqual.engine.sequence import Request, Sequence
from rorqual.engine.speculative import SpeculativeMethod
from rorqual.errors import UserError
from rorqual.kernels import cpu
from rorqual.kernels.allowed_tokens import AllowedTokens
from rorqual.kernels.quantized_linear import QuantizedWeight
from rorqual.model import Transformer
from rorqual.tokenizer_protocol import Tokenizer

DEFAULT_KV_CACHE_BYTES = 1 << 30  # for submitted requests; on a CPU, pages not written to take no memory
MAX_PREFILL_TOKENS = 4096  # a step; running sequences wait for them


class Engine:
    """Generates from a model in memory (whose weights it uses in place), a Hugging Face directory or a .gguf file.

    `max_num_seqs`: sequences decoded at a time. `kv_cache_bytes`: memory of the KV cache; by default as much as
    `generate` needs for its prompts. `prefix_cache`: keep the KV cache of finished sequences for prompts with the same
    prefix; after a change of weights call `reset_prefix_cache`. `max_prefill_tokens`: prompt tokens a step.
    `speculative`: speculative decoding with drafts from the model's multi-token module ("mtp") or from prompt lookup
    ("ngram"; "auto": "ngram" where weights are quantised); it changes the time an answer takes, never the answer.
    `kv_cache_dtype`: by default the dtype that the model computes in; torch.int8 (fast where weights are quantised) and
    torch.float8_e4m3fn about halve BF16's memory. `record_routing`: completions have the experts that each token was
    sent to. `dtype`, `device`, `weights`, `adapter`: see `open_model`; for a model that is not in memory. `adapters`:
    directories in peft's layout by name, any of which a request may ask for (SamplingParams.adapter).

    Raises UserError for invalid arguments, and for a model that cannot be read.
    """

    def __init__(
        self, model: str | Path | Transformer, tokenizer: Tokenizer | None = None, max_num_seqs: int = 256,
        kv_cache_bytes: int | None = None, prefix_cache: bool = False, max_prefill_tokens: int = MAX_PREFILL_TOKENS,
        speculative: SpeculativeMethod | Literal["auto"] | None = None, kv_cache_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None, device: torch.device | str = "cpu", weights: Weights | None = None,
        record_routing: bool = False, adapter: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
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
            model, own = open_model(model, dtype, device, weights, adapter)
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
        if self.kv_cache_dtype not in (model.head_weight.dtype, torch.int8, FP8):
            raise UserError(
                f"kv_cache_dtype = {kv_cache_dtype}: must be {model.head_weight.dtype}, in which this model computes, "
                f"torch.int8 or {FP8}"
            )
        self.record_routing = record_routing
        if record_routing and not model.config.n_routed_experts:
            raise UserError("record_routing = True: this model has no experts; leave it out")
        if record_routing and isinstance(model.head_weight, QuantizedWeight):
            raise UserError("record_routing = True: quantised weights run without these routers; leave it out")
        if adapters and (record_routing or isinstance(model.head_weight, QuantizedWeight)):
            what = "recorded routing" if record_routing else "quantised weights"
            raise UserError(f"adapters = {', '.join(adapters)}: {what} and adapters do not go together; leave one out")
        self.adapters = None
        if adapters:
            self.adapters = ServedAdapters(model, {name: read_adapter(path) for name, path in adapters.items()})
        self.block_bytes = block_bytes(model.config, self.kv_cache_dtype, int(speculative == "mtp"))
        self.end_tokens = tuple(sorted(model.released.ends_with(tokenizer, model.config)))
        self.inputs = InputProcessor(model.config, tokenizer, self.end_tokens)
        self.token_decoder, self.thinking_marks = self.inputs.token_decoder, self.inputs.thinking_marks
        self._scheduler: Scheduler | None = None

    # -- submit and step

    def submit(self, prompt: str | abc.Sequence[int], params: SamplingParams, streaming: bool = True) -> Request:
        """Queue a request; `step` works on it. streaming: `step` returns its sequences after every token.

        Raises UserError for an invalid prompt, and one that context or KV cache do not hold.
        """
        self._check_adapter(params.adapter)
        seed = torch.seed() if params.seed is None else params.seed
        request = self.inputs.request(prompt, params, seed, "the prompt", self._kv_cache_tokens(), streaming)
        self._scheduler_for([request], at_least=DEFAULT_KV_CACHE_BYTES).add(request)
        return request

    def score(self, tokens: abc.Sequence[int], top: int, adapter: str | None = None) -> Request:
        """Queue a text to be scored, with the `top` most probable tokens at every position; `step` works on it, a chunk
        at a time, until the request is done. Raises UserError for a text that context or KV cache do not hold.
        """
        self._check_adapter(adapter)
        params = SamplingParams(max_tokens=1, adapter=adapter)
        request = self.inputs.request(tokens, params, 0, "the text", self._kv_cache_tokens())
        request.sequences, request.prompt_logprobs = [], PromptLogprobs(request.prompt, self.model.head_weight, top)
        self._scheduler_for([request], at_least=DEFAULT_KV_CACHE_BYTES).add(request)
        return request

    def compile(self, grammar: Grammar) -> Grammar:
        """Compile a grammar, which makes `submit` fast. May run in another thread. Raises UserError for a bad one."""
        return self.inputs.grammars.compile(grammar)

    def step(self, before_forward: Callable[[], None] | None = None) -> list[Sequence]:
        """Decode a token for every running sequence, and prefill → finished sequences, and streaming ones, which grew.

        before_forward: called before the forward pass, which takes most of a step and releases the GIL.
        """
        return [] if self._scheduler is None else self._scheduler.step(before_forward)

    def cancel(self, request: Request) -> None:
        """Stop a request; its blocks are free at once."""
        if self._scheduler is not None:
            self._scheduler.cancel(request)

    def prepare(self) -> None:
        """Allocate the KV cache, of `kv_cache_bytes`, before the first request. Raises UserError if memory lacks."""
        self._scheduler_for([])

    def reserve(self, tokens: int, sequences: int) -> None:
        """Drop all requests and allocate a KV cache for so many sequences of so many tokens, unless `kv_cache_bytes`
        sets its size: later ones that fit then keep the prefix cache. Raises UserError if memory lacks.
        """
        self.reset()
        longest, rows = -(-tokens // BLOCK) + 1, min(self.max_num_seqs + self.max_num_seqs // 8, 2 * sequences)
        self._scheduler_for([], at_least=(2 + longest * rows) * self.block_bytes)

    def reset(self) -> None:
        """Drop all requests, and the KV cache."""
        self._scheduler = None

    def status(self) -> Status:
        """Running and waiting sequences, blocks, and counters."""
        return Status(0, 0, 0, 0, 0, Counters()) if self._scheduler is None else self._scheduler.status()

    def detokenizer(self, sequence: Sequence) -> IncrementalDetokenizer:
        """The detokenizer of a streaming sequence, with its text so far. Raises UserError without a tokenizer."""
        self.require_tokenizer()
        assert sequence.detokenizer is not None, "the request is not streaming"
        return sequence.detokenizer

    @property
    def capacity(self) -> int:
        """Sequences decoded at a time."""
        return self.max_num_seqs

    @property
    def idle(self) -> bool:
        return self._scheduler is None or self._scheduler.idle

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, as is due when the weights have changed."""
        if self._scheduler is not None:
            self._scheduler.reset_prefix_cache()

    def completion(self, sequence: Sequence) -> Completion:
        """The completion of a finished sequence."""
        text = sequence.detokenizer
        return Completion(
            self.inputs.decode(sequence.text_tokens) if text is None else text.text,
            sequence.tokens,
            sequence.logprobs,
            sequence.finish_reason or "",
            sequence.request.cached_tokens,
            sequence.top_logprobs,
            sequence.routing,
            AllowedTokens.of(sequence.allowed, self.model.config.vocab_size) if sequence.allowed else None,
        )

    # -- generate

    def generate(
        self,
        prompts: abc.Sequence[str] | abc.Sequence[abc.Sequence[int]],
        params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Complete every prompt (text, or token ids) params.n times; entries i·n … i·n+n-1 belong to prompt i. A single
        prompt counts as a list of one. params: of all, or one for each prompt. progress: called with the number of
        sequences that have just finished.

        The same seed gives the same completions. Raises UserError for an invalid prompt, and one that context or KV
        cache do not hold.
        """
        listed = prompt_list(prompts)
        each = list(params) if isinstance(params, abc.Sequence) else [params or SamplingParams()] * len(listed)
        if len(each) != len(listed):
            raise UserError(f"{len(each)} sampling parameters for {len(listed)} prompts: give one for each, or one")
        for own in each:
            self._check_adapter(own.adapter)
        fresh = torch.seed() if any(own.seed is None for own in each) else 0
        seeds = [(fresh if own.seed is None else own.seed) + (i << 32) for i, own in enumerate(each)]
        most = self._kv_cache_tokens()
        requests = [
            self.inputs.request(prompt, own, seed, f"prompt {i}", most)
            for i, (prompt, own, seed) in enumerate(zip(listed, each, seeds, strict=True), 1)
        ]
        if not requests:
            return []
        scheduler = self._scheduler_for(requests)
        for request in requests:
            scheduler.add(request)
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
        self._check_adapter(None if params is None else params.adapter)
        for i, prompt in enumerate(prompt_list(prompts)):
            self.inputs.request(prompt, params or SamplingParams(), 0, f"prompt {i + 1}", self._kv_cache_tokens())

    def stream(self, prompt: str | abc.Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the text of one completion as it is generated. Raises UserError without a tokenizer."""
        self.require_tokenizer()
        request = self.submit(prompt, replace(params or SamplingParams(), n=1))
        (sequence,) = request.sequences
        text = self.detokenizer(sequence)
        try:
            while sequence.finish_reason is None:
                self.step()
                if piece := text.take().text:
                    yield piece
        finally:
            if sequence.finish_reason is None:
                self.cancel(request)

    # -- tokenizer

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """A text's token ids. begin: prepend the tokenizer's BOS, unless the text starts with it; chat templates write
        their own. Raises UserError if the engine has no tokenizer.
        """
        return self.inputs.encode(text, begin)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError if the engine has none."""
        return self.inputs.require_tokenizer()

    def opening(self, prompt: abc.Sequence[int]) -> str:
        """The end of a prompt that belongs to the answer's thinking, from its mark on; "" for none."""
        return self.inputs.opening(prompt)

    def _check_adapter(self, name: str | None) -> None:
        known = frozenset[str]() if self.adapters is None else self.adapters.names
        if name is not None and name not in known:
            raise UserError(
                f"adapter = {name!r}: this engine serves {', '.join(sorted(known)) or 'none'}; leave it out"
            )

    # -- KV cache

    def _kv_cache_tokens(self) -> int | None:
        """Tokens that a sequence may have for the KV cache to hold it; None where the cache is yet to be allocated."""
        if self.kv_cache_bytes is not None:
            count = self._count(self.kv_cache_bytes)
        elif self._scheduler is not None and not self._scheduler.idle:
            count = self._scheduler.blocks.count
        else:
            return None
        return max(0, count - 2) * BLOCK

    def _scheduler_for(self, requests: list[Request], at_least: int = 0) -> Scheduler:
        """The scheduler, with a KV cache that holds these requests and has `at_least` bytes."""
        scheduler = self._scheduler
        if self.kv_cache_bytes is not None:
            count = self._count(self.kv_cache_bytes)
        else:
            longest = max((-(-(len(r.prompt) + r.max_new_tokens) // BLOCK) + 1 for r in requests), default=0)
            sequences = sum(r.params.n for r in requests)
            count = 2 + longest * min(self.max_num_seqs + self.max_num_seqs // 8, sequences + len(requests))
            count = max(count, self._count(at_least))
        if scheduler is None or (scheduler.idle and scheduler.blocks.count < count):
            weight = self.model.head_weight
            more = int(self.speculative == "mtp")
            self._scheduler = scheduler = None  # with its cache, or a GPU would hold two at once
            try:
                cache = PagedKVCache(
                    self.model.config, count, self.kv_cache_dtype, weight.device, more, self.record_routing
                )
            except RuntimeError:  # PyTorch's error for lack of memory, on a CPU too
                need = count * self.block_bytes / 2**30
                raise UserError(f"no memory for a KV cache of {need:.3g} GiB; lower --cache-gb") from None
            self._scheduler = scheduler = self._new_scheduler(cache, BlockManager(count, self.prefix_cache))
        return scheduler

    def _new_scheduler(self, cache: PagedKVCache, blocks: BlockManager) -> Scheduler:
        return Scheduler(
            self.model, self.max_num_seqs, cache, blocks, self.max_prefill_tokens, self.speculative, self.adapters
        )  # fmt: skip

    def _count(self, cache_bytes: int) -> int:
        return cache_bytes // self.block_bytes
