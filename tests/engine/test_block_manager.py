from rorqual.engine.block_manager import NULL_BLOCK, BlockManager, block_key


def test_a_block_has_one_owner_until_it_is_given_back():
    blocks = BlockManager(5)
    taken = [blocks.allocate() for _ in range(4)]
    assert sorted(taken) == [1, 2, 3, 4]
    assert NULL_BLOCK not in taken
    assert blocks.allocate() is None
    assert blocks.free == 0
    blocks.incref(taken[0])
    blocks.free_blocks(taken[:2])
    assert blocks.free == 1
    assert blocks.allocate() == taken[1]
    blocks.free_blocks([taken[0]])
    assert blocks.allocate() == taken[0]


def test_what_is_remembered_goes_when_room_is_needed_least_recently_used_first():
    blocks = BlockManager(4)
    a, b, c = (blocks.allocate() for _ in range(3))
    for block, key in ((a, b"a"), (b, b"b"), (c, b"c")):
        blocks.insert(block, key)
    blocks.free_blocks([a])
    blocks.free_blocks([b, c])  # a sequence: c is its end, and of less use than b
    assert blocks.free == 3
    assert blocks.lookup(b"a") == a
    blocks.incref(a)
    blocks.free_blocks([a])  # used again
    assert blocks.allocate() == c
    assert blocks.lookup(b"c") is None
    assert blocks.allocate() == b
    assert blocks.lookup(b"a") == a
    blocks.reset_prefix_cache()
    assert blocks.lookup(b"a") is None
    assert blocks.allocate() == a


def test_one_key_names_one_block():
    blocks = BlockManager(4)
    a, b = blocks.allocate(), blocks.allocate()
    blocks.insert(a, b"k")
    blocks.insert(b, b"k")
    assert blocks.lookup(b"k") == a
    blocks.free_blocks([a, b])
    assert blocks.free == 3
    assert {blocks.allocate() for _ in range(3)} == {1, 2, 3}


def test_a_key_names_all_tokens_before():
    first = block_key(b"", [1, 2])
    assert block_key(first, [3, 4]) != block_key(block_key(b"", [2, 1]), [3, 4])
    assert block_key(first, [3, 4]) == block_key(block_key(b"", (1, 2)), (3, 4))
