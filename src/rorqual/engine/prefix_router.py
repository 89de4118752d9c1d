"""Where a request goes, of several places that each keep a prefix cache: where its prefix is known, unless too busy."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

PIECE = 256  # bytes of a prompt between two keys: 32 token ids, two blocks of the KV cache
MAX_LEAD = 8  # how many requests more than the least busy place a place may have, to be preferred for its prefix
MAX_KEYS = 1 << 18  # of prefixes remembered, some 60 MB

Place = TypeVar("Place", bound=Hashable)


def prefix_keys(prompt: bytes) -> list[bytes]:
    """A key for the prompt's first PIECE bytes, its first 2·PIECE bytes, …; prompts that begin alike share them."""
    keys: list[bytes] = []
    key = b""
    for start in range(0, len(prompt) - PIECE + 1, PIECE):
        key = hashlib.blake2b(key + prompt[start : start + PIECE], digest_size=16).digest()
        keys.append(key)
    return keys


class PrefixRouter(Generic[Place]):
    """Remembers which prefixes went where; the least recently used are forgotten, as prefix caches forget them."""

    def __init__(self) -> None:
        self._places: OrderedDict[bytes, set[Place]] = OrderedDict()
        self._last: dict[Place, int] = {}  # number of the last request that went there
        self._count = 0

    def choose(self, keys: Sequence[bytes], loads: Mapping[Place, int]) -> Place:
        """The place for a prompt with these keys, given how many requests each place has (at least one place)."""
        bound = min(loads.values()) + MAX_LEAD
        known = (
            {place for place in self._places.get(key, ()) if loads.get(place, bound + 1) <= bound}
            for key in reversed(keys)
        )
        found = next(filter(None, known), set(loads))
        place = min(found, key=lambda p: (loads[p], self._last.get(p, 0)))
        self._count += 1
        self._last[place] = self._count
        for key in keys:
            self._places.setdefault(key, set()).add(place)
            self._places.move_to_end(key)
        while len(self._places) > MAX_KEYS:
            self._places.popitem(last=False)
        return place

    def forget(self, place: Place) -> None:
        """A place whose prefix cache is gone."""
        self._last.pop(place, None)
        for places in self._places.values():
            places.discard(place)

    def clear(self) -> None:
        """All prefix caches are empty."""
        self._places.clear()
