"""Fill-in-the-middle in prefix–suffix–middle order: `begin prefix hole suffix end middle` (V3 §4.1).

Applied to whole documents before packing, as in V3: the text is then available, so that cuts fall between any two
characters rather than between tokens, and packing uses the true lengths.
"""

from dataclasses import dataclass
from hashlib import blake2b

from rorqual.data.tokenizer import FIM_TOKENS
from rorqual.errors import UserError
from rorqual.tokenizer_protocol import Tokenizer

# Names of (begin, hole, end) in our tokenizers, DeepSeek's and Qwen's.
KNOWN_TOKENS = (
    FIM_TOKENS,
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
)


@dataclass(frozen=True)
class FillInTheMiddle:
    """Rearranges a fraction `rate` of documents; the choice and the cuts depend only on the seed and the text."""

    rate: float
    seed: int
    begin: int
    hole: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, rate: float, seed: int) -> "FillInTheMiddle":
        """With the tokenizer's FIM tokens. Raises UserError when it lacks them."""
        vocabulary = tokenizer.get_vocab()
        for names in KNOWN_TOKENS:
            if all(name in vocabulary for name in names):
                return cls(rate, seed, *(vocabulary[name] for name in names))
        raise UserError(
            f"data.fim_rate = {rate}: the tokenizer has no fill-in-the-middle tokens; add {', '.join(FIM_TOKENS)} "
            f"to tokenizer.special_tokens or set fim_rate = 0"
        )

    def cut(self, text: str) -> tuple[str, str, str] | None:
        """Prefix, middle and suffix, cut at two uniformly random places; None for a document left unchanged."""
        digest = blake2b(text.encode(), digest_size=24, key=str(self.seed).encode()).digest()
        chosen, first, second = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
        if chosen >= self.rate * 2**64:
            return None
        left, right = sorted((first % (len(text) + 1), second % (len(text) + 1)))
        return text[:left], text[left:right], text[right:]

    def arrange(self, prefix: list[int], middle: list[int], suffix: list[int]) -> list[int]:
        """Token ids in the order `begin prefix hole suffix end middle`."""
        return [self.begin, *prefix, self.hole, *suffix, self.end, *middle]
