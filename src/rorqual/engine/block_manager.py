"""Who holds which block of the cache, and which blocks are worth keeping for a prompt that begins the same way.

A block has room for BLOCK tokens of one sequence. Sequences share the blocks of what they have in common: samples of
one prompt, and, through `find`, prompts with a common beginning.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BLOCK = 16  # tokens: small enough to waste little at a sequence's end, large enough that tables stay short
SPARE = 0  # the block that rows beyond the batch write to; nobody holds it


def block_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Names a full block by its tokens and, through the name `before` of the previous block, all before them.

    A cryptographic hash: two prompts that met in one name would read one another's past.
    """
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockManager:
    """`count` blocks, SPARE among them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.holders = [0] * count
        self._unused = list(range(count - 1, SPARE, -1))
        self._key_of: dict[int, bytes] = {}
        self._with_key: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by nobody but remembered; least recently used first

    @property
    def free(self) -> int:
        """Blocks that `take` can still give."""
        return len(self._unused) + len(self._idle)

    def allocate(self) -> int | None:
        """A block held once, its content forgotten; None when every block is held."""
        if self._unused:
            block = self._unused.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._with_key[self._key_of.pop(block)]
        else:
            return None
        self.holders[block] = 1
        return block

    def incref(self, block: int) -> None:
        """One holder more of a block that is held or remembered."""
        self.holders[block] += 1
        self._idle.pop(block, None)

    def free_blocks(self, blocks: Iterable[int]) -> None:
        """One holder less of each of a sequence's blocks, first to last."""
        for block in reversed(list(blocks)):  # a sequence's end is of less use than its beginning, so it goes first
            self.holders[block] -= 1
            if self.holders[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._unused.append(block)

    def insert(self, block: int, key: bytes) -> None:
        """Let `find` know of a full block."""
        if block not in self._key_of and key not in self._with_key:
            self._key_of[block], self._with_key[key] = key, block

    def lookup(self, key: bytes) -> int | None:
        return self._with_key.get(key)

    def reset_prefix_cache(self) -> None:
        """Remember nothing, as when the weights have changed."""
        self._unused += self._idle
        self._idle.clear()
        self._key_of.clear()
        self._with_key.clear()
