"""Reference counts of the KV cache's blocks, and the prefix cache.

A block holds BLOCK tokens of one sequence. Sequences of one prompt share its blocks; so do prompts with a common
prefix, through `match_prefix`.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BLOCK = 16  # tokens: small enough to waste little at a sequence's end, large enough to keep block tables short
NULL_BLOCK = 0  # padding rows write to it; never allocated


def block_key(previous: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a full block's tokens and, through the key of the previous block, of all tokens before them.

    A cryptographic hash: with a collision one prompt would read another's KV cache.
    """
    return hashlib.blake2b(previous + array("q", tokens).tobytes(), digest_size=16).digest()


def first_key(adapter: str | None) -> bytes:
    """What stands for the blocks before the first: an adapter's prefixes are its own."""
    return b"" if adapter is None else hashlib.blake2b(adapter.encode(), digest_size=16).digest()


class BlockManager:
    """Allocates `count` blocks, NULL_BLOCK among them. prefix_cache: keep full blocks for prompts with their prefix."""

    def __init__(self, count: int, prefix_cache: bool = False) -> None:
        self.count, self.prefix_cache = count, prefix_cache
        self.ref_counts = [0] * count
        self._free = list(range(count - 1, NULL_BLOCK, -1))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # In the prefix cache, and no reference; the least recently used first.
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks that `allocate` can still return, those of the prefix cache without a reference included."""
        return len(self._free) + len(self._evictable)

    def allocate(self) -> int | None:
        """A block with one reference, evicted from the prefix cache if need be; None when every block is in use."""
        return self._allocate() if self._free or self._evictable else None

    def allocate_many(self, count: int) -> list[int]:
        """`count` blocks, at most those `free`."""
        return [self._allocate() for _ in range(count)]

    def _allocate(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self.ref_counts[block] = 1
        return block

    def incref(self, block: int) -> None:
        """One more reference to a block that is in use or in the prefix cache."""
        self.ref_counts[block] += 1
        self._evictable.pop(block, None)

    def free_blocks(self, blocks: Iterable[int]) -> None:
        """One reference less to each of a sequence's blocks, given first to last."""
        for block in reversed(list(blocks)):  # a sequence's last block is least useful as a prefix: evict it first
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                if block in self._key_of:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def match_prefix(self, tokens: tuple[int, ...], adapter: str | None = None) -> list[int]:
        """The longest run of full blocks in the prefix cache with which these tokens begin, each with a reference.

        adapter: whose keys and values they are.
        """
        found: list[int] = []
        key = first_key(adapter)
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK) if self.prefix_cache else ():
            key = block_key(key, tokens[start : start + BLOCK])
            block = self.lookup(key)
            if block is None:
                break
            self.incref(block)
            found.append(block)
        return found

    def cache_blocks(self, tokens: tuple[int, ...], blocks: list[int], adapter: str | None = None) -> None:
        """Add the full ones among a sequence's blocks, which hold its `tokens`, to the prefix cache."""
        key = first_key(adapter)
        for block, start in zip(blocks, range(0, len(tokens) - BLOCK + 1, BLOCK), strict=False):
            key = block_key(key, tokens[start : start + BLOCK])
            self.insert(block, key)

    def insert(self, block: int, key: bytes) -> None:
        """Add a full block to the prefix cache."""
        if block not in self._key_of and key not in self._block_of:
            self._key_of[block], self._block_of[key] = key, block

    def lookup(self, key: bytes) -> int | None:
        """The block of the prefix cache with this `block_key`."""
        return self._block_of.get(key)

    def reset_prefix_cache(self) -> None:
        """Forget all blocks, as is due when the weights have changed."""
        self._free += self._evictable
        self._evictable.clear()
        self._key_of.clear()
        self._block_of.clear()
