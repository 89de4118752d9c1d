from rorqual.engine.blocks import SPARE, Blocks, block_key


def test_a_block_has_one_owner_until_it_is_given_back():
    blocks = Blocks(5)
    taken = [blocks.take() for _ in range(4)]
    assert sorted(taken) == [1, 2, 3, 4]
    assert SPARE not in taken
    assert blocks.take() is None
    assert blocks.free == 0
    blocks.hold(taken[0])
    blocks.release(taken[:2])
    assert blocks.free == 1
    assert blocks.take() == taken[1]
    blocks.release([taken[0]])
    assert blocks.take() == taken[0]


def test_what_is_remembered_goes_when_room_is_needed_least_recently_used_first():
    blocks = Blocks(4)
    a, b, c = (blocks.take() for _ in range(3))
    for block, key in ((a, b"a"), (b, b"b"), (c, b"c")):
        blocks.remember(block, key)
    blocks.release([a])
    blocks.release([b, c])  # a sequence: c is its end, and of less use than b
    assert blocks.free == 3
    assert blocks.find(b"a") == a
    blocks.hold(a)
    blocks.release([a])  # used again
    assert blocks.take() == c
    assert blocks.find(b"c") is None
    assert blocks.take() == b
    assert blocks.find(b"a") == a
    blocks.forget()
    assert blocks.find(b"a") is None
    assert blocks.take() == a


def test_one_key_names_one_block():
    blocks = Blocks(4)
    a, b = blocks.take(), blocks.take()
    blocks.remember(a, b"k")
    blocks.remember(b, b"k")
    assert blocks.find(b"k") == a
    blocks.release([a, b])
    assert blocks.free == 3
    assert {blocks.take() for _ in range(3)} == {1, 2, 3}


def test_a_key_names_all_tokens_before():
    first = block_key(b"", [1, 2])
    assert block_key(first, [3, 4]) != block_key(block_key(b"", [2, 1]), [3, 4])
    assert block_key(first, [3, 4]) == block_key(block_key(b"", (1, 2)), (3, 4))
