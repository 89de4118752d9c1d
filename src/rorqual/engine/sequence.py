"""A request, and its sequences: the completions of its prompt."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rorqual.engine.detokenizer import IncrementalDetokenizer
from rorqual.engine.grammar import GrammarState
from rorqual.engine.outputs import TokenDelta, TopLogprobs
from rorqual.engine.prompt_logprobs import PromptLogprobs
from rorqual.engine.sampling_params import SamplingParams
from rorqual.kernels.allowed_tokens import Words

if TYPE_CHECKING:
    from rorqual.engine.speculative import PromptLookupDrafter

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(eq=False)
class Sequence:
    """One completion of a request's prompt. While it is in the batch, its `tokens` and `logprobs` are kept there;
    those of streaming requests are kept here too.
    """

    request: "Request"
    index: int  # of the request's n
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)  # at every position
    blocks: list[int] = field(default_factory=list)
    generator: np.random.Generator | None = None
    uniforms: Floats | None = None  # [WINDOW] random numbers, from token WINDOW·window_index on
    window_index: int = 0
    thinking_ended: bool = False  # or not begun (`unopened`): the thinking budget does not apply
    unopened: bool = False  # <think> has not come yet
    grammar_state: GrammarState | None = None
    drafter: "PromptLookupDrafter | None" = None  # with prompt lookup
    detokenizer: IncrementalDetokenizer | None = None  # of a streaming request, if the engine has a tokenizer
    finish_reason: str | None = None  # "stop", "length" or "cancelled"
    routing: Tensor | None = None  # of a finished sequence, where the engine records it (Completion.routing)
    allowed: list[Words] = field(default_factory=list)  # at every position, with record_allowed
    _num_taken: int = 0  # tokens

    @property
    def arrival(self) -> tuple[int, int]:
        """Orders sequences by when they came."""
        return self.request.arrival, self.index

    @property
    def text_tokens(self) -> list[int]:
        """Its tokens without the stop token."""
        tokens = self.tokens
        return tokens[:-1] if tokens and tokens[-1] in self.request.stop_token_ids else tokens

    def take(self, index: int) -> TokenDelta:
        """What a streaming sequence has gained since the last call, as the choice `index`."""
        assert self.detokenizer is not None, "text needs a tokenizer"
        start, self._num_taken = self._num_taken, len(self.tokens)
        return TokenDelta(
            index, *self.detokenizer.take(), self.tokens[start:], self.logprobs[start:], self.top_logprobs[start:],
            self.finish_reason, max(0, self.detokenizer.reasoning_end - start), self.detokenizer.reasoning_tokens,
        )  # fmt: skip


@dataclass(eq=False)
class Request:
    """A prompt to be completed params.n times, or (with prompt_logprobs) only scored."""

    prompt: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int  # tokens of an answer
    seed: int
    stop_token_ids: tuple[int, ...]
    think_end_token: int | None = None  # set with a thinking budget
    streaming: bool = False  # tokens are read while they are generated
    opening: str = ""  # the end of the prompt that belongs to the answer's thinking (TokenDecoder.opening)
    unopened: bool = False  # the prompt opens no thinking, so its budget counts only once the model does
    grammar_state: GrammarState | None = None
    arrival: int = 0  # how many requests came before
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    prompt_logprobs: PromptLogprobs | None = None  # then there are no sequences
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sequences = [
            Sequence(
                self,
                j,
                thinking_ended=self.unopened,
                unopened=self.unopened,
                grammar_state=self.grammar_state and self.grammar_state.copy(),
            )
            for j in range(self.params.n)
        ]

    @property
    def done(self) -> bool:
        if self.prompt_logprobs is not None:
            return self.prompt_logprobs.done
        return all(sequence.finish_reason for sequence in self.sequences)

    @cached_property
    def distinct_tokens(self) -> Integers:
        """The prompt's distinct tokens, computed once: at every token it would take milliseconds."""
        return np.unique(self.prompt)
