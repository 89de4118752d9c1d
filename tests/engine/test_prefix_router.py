"""Where requests go, by their prefixes and by how busy places are."""

import pytest

from rorqual.engine import prefix_router
from rorqual.engine.prefix_router import MAX_LEAD, PIECE, PrefixRouter, prefix_keys

IDLE = {"a": 0, "b": 0, "c": 0}


def keys(*pieces):
    return prefix_keys(b"".join(piece.encode() * PIECE for piece in pieces))


def test_prompts_share_the_keys_of_their_common_pieces():
    assert len(prefix_keys(b"x" * (3 * PIECE - 1))) == 2
    first, second = keys("x", "y", "z"), keys("x", "y", "w")
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert keys("y")[0] not in first  # a key is of everything before it


def test_idle_places_take_turns_and_prefixes_stay():
    router = PrefixRouter()
    first = {piece: router.choose(keys(piece), IDLE) for piece in "xyz"}
    assert sorted(first.values()) == ["a", "b", "c"]
    assert {piece: router.choose(keys(piece, "more"), IDLE) for piece in "zyx"} == first
    assert router.choose([], IDLE | {first["x"]: 1, first["z"]: 1}) == first["y"]


def test_the_longest_prefix_counts():
    router = PrefixRouter()
    one = router.choose(keys("x", "y"), IDLE)
    other = router.choose(keys("x", "z"), IDLE | {one: MAX_LEAD + 1})
    assert other != one
    assert router.choose(keys("x", "y", "u"), IDLE) == one
    assert router.choose(keys("x", "z", "u"), IDLE) == other


@pytest.mark.parametrize(("lead", "stays"), [(MAX_LEAD, True), (MAX_LEAD + 1, False)])
def test_a_place_that_is_too_busy_is_left(lead, stays):
    router = PrefixRouter()
    one = router.choose(keys("x"), IDLE)
    loads = dict.fromkeys(IDLE, 5) | {one: 5 + lead}
    second = router.choose(keys("x"), loads)
    assert (second == one) is stays
    if not stays:  # both have it from now on, and the one less busy is taken
        assert router.choose(keys("x"), dict.fromkeys(IDLE, 5) | {one: 6}) == second
        assert router.choose(keys("x"), dict.fromkeys(IDLE, 5) | {second: 6}) == one


def test_places_that_are_gone_and_old_prefixes_are_forgotten(monkeypatch):
    monkeypatch.setattr(prefix_router, "MAX_KEYS", 2)
    router = PrefixRouter()
    one = router.choose(keys("x"), IDLE)
    assert router.choose(keys("x"), {place: 0 for place in IDLE if place != one}) != one
    router = PrefixRouter()
    one = router.choose(keys("x"), IDLE)
    router.forget(one)
    assert router.choose(keys("x"), {"a": 1, "b": 1, "c": 1} | {one: 2}) != one
    router.choose(keys("y", "z"), IDLE)  # x is the third key
    assert keys("x")[0] not in router._places
