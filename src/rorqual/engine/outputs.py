"""What the engine returns: completions, new tokens of running ones, and its figures."""

from dataclasses import dataclass, field

from torch import Tensor

from rorqual.kernels.allowed_tokens import AllowedTokens

TopLogprobs = list[tuple[int, float]]  # (token, log-probability) of the most probable tokens at a position


@dataclass
class Completion:
    """One completion. `tokens` and `logprobs` include the stop token, `text` neither it nor a stop string."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop", "length" or "cancelled"
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    top_logprobs: list[TopLogprobs] = field(default_factory=list)  # if requested, at every token
    # Where the engine records it: the experts [prompt + tokens − 1, L, K] of each token but the last, which no forward
    # pass has read, in the L mixture-of-experts layers.
    routing: Tensor | None = None
    allowed: AllowedTokens | None = None  # with record_allowed: the tokens that each was sampled from


@dataclass
class TokenDelta:
    """New tokens of one sequence and their text; `finish_reason` is set in its last delta.

    `text` has the marks around thinking; `reasoning` and `content` are its two parts without them.
    """

    index: int  # which of a request's choices
    text: str
    reasoning: str
    content: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    finish_reason: str | None
    reasoning_prefix: int  # how many of these tokens, from the first on, belong to the thinking
    reasoning_tokens: int  # in total so far, of those that text was made of


@dataclass
class Counters:
    """Totals since the KV cache was allocated."""

    prompt_tokens: int = 0  # prefilled
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    generated_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0  # verified
    accepted_tokens: int = 0


@dataclass
class Status:
    """Numbers of sequences, and of KV cache blocks; blocks only kept for the prefix cache count as free."""

    running: int
    waiting: int
    blocks_used: int
    blocks: int
    kv_cache_bytes: int  # that the cache takes
    counters: Counters
    # Where processes share the experts: tokens at the busiest one's over the mean, averaged over layers; 1 is even.
    expert_balance: float | None = None
