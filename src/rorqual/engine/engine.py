"""The front of generation: prompts in, completions out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rorqual.data.tokenizer import load_tokenizer
from rorqual.engine.sampler import SamplingParams
from rorqual.engine.scheduler import Finished, Request, Scheduler
from rorqual.errors import UserError
from rorqual.model import Transformer


@dataclass
class Completion:
    """One continuation. `tokens` and `logprobs` include the stop token, `text` does not."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" or "length"


class Engine:
    """Generates from a model in memory (whose weights it uses in place) or from a Hugging Face directory."""

    def __init__(self, model: str | Path | Transformer, tokenizer: Any = None, slots: int = 256, **load: Any) -> None:
        if not isinstance(model, Transformer):
            from rorqual.model.checkpoint import load_model

            tokenizer = tokenizer or load_tokenizer(model)
            model = load_model(model, **load)
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        eos = set(model.config.eos_token_ids)
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            eos.add(tokenizer.eos_token_id)
        self.eos = tuple(sorted(eos))

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Continue every prompt (text, or token ids) params.n times; entries i·n … i·n+n-1 belong to prompt i.

        The same seed gives the same completions. Raises UserError for a prompt that leaves no room in the context.
        """
        params = params or SamplingParams()
        scheduler = self._schedule(prompts, params)
        results: list[Completion | None] = [None] * (len(prompts) * params.n)
        while scheduler is not None and not scheduler.done:
            finished = scheduler.step()
            for f in finished:
                results[f.index] = self._completion(f, params)
            if progress and finished:
                progress(len(finished))
        return results  # type: ignore[return-value]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one continuation, piece by piece as it is made."""
        params = replace(params or SamplingParams(), n=1)
        scheduler = self._schedule([prompt], params)
        shown = ""
        while not scheduler.done:
            finished = scheduler.step()
            tokens = finished[0].tokens if finished else scheduler.tokens[0, : scheduler.count[0]].tolist()
            text = self._text(tokens, params)
            if finished or not text.endswith("\ufffd"):  # an unfinished character waits for its bytes
                yield text[len(shown) :]
                shown = text

    def _schedule(self, prompts: Sequence[Any], params: SamplingParams) -> Scheduler | None:
        if not prompts:
            return None
        think_end = None
        if params.thinking_budget is not None:
            think_end = self._think_end()
        context = self.model.config.max_position_embeddings
        seed = torch.seed() if params.seed is None else params.seed
        generator = torch.Generator().manual_seed(seed % 2**63)
        requests = []
        for i, prompt in enumerate(prompts):
            ids = tuple(self._encode(prompt) if isinstance(prompt, str) else prompt)
            if not ids:
                raise UserError(f"prompt {i + 1} is empty; give at least one token")
            if len(ids) >= context:
                raise UserError(
                    f"prompt {i + 1} has {len(ids)} tokens, but the model's context holds {context} "
                    "(max_position_embeddings); shorten it"
                )
            room = min(params.max_tokens, context - len(ids))
            uniform = torch.rand(params.n, room, generator=generator)
            requests += [Request(i * params.n + j, ids, room, uniform[j]) for j in range(params.n)]
        stop_ids = torch.tensor([*self.eos, *params.stop_token_ids], dtype=torch.long)
        return Scheduler(self.model, requests, params, self.slots, stop_ids, think_end)

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise UserError("this engine has no tokenizer; give token ids or pass tokenizer=")
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _think_end(self) -> int:
        ids = self._encode("</think>")
        if len(ids) != 1:
            raise UserError("thinking_budget needs a tokenizer with </think> as one token")
        return ids[0]

    def _completion(self, f: Finished, params: SamplingParams) -> Completion:
        return Completion(self._text(f.tokens, params), f.tokens, f.logprobs, "stop" if f.stopped else "length")

    def _text(self, tokens: list[int], params: SamplingParams) -> str:
        if self.tokenizer is None:
            return ""
        if tokens and tokens[-1] in (*self.eos, *params.stop_token_ids):
            tokens = tokens[:-1]
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
