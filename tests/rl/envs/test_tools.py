import json
import math
from random import Random

import pytest

from rorqual.errors import UserError
from rorqual.rl.envs.search import Index
from rorqual.rl.envs.tools import python, search


def test_bm25_by_hand(tmp_path):
    """Three passages of 2, 1 and 3 words, 2 on average: "cat" is in two of them, twice in the last."""
    (tmp_path / "a.md").write_text("The cat\n\ndog\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "cat dog cat"}) + "\n")
    found = Index(str(tmp_path)).scores("Cat?")
    rarity = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    assert found == {
        0: pytest.approx(rarity * 1 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / 2))),
        2: pytest.approx(rarity * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 3 / 2))),
    }
    assert search(str(tmp_path), results=1)("cat") == "cat dog cat"
    assert search(str(tmp_path))("bird") == "(nothing was found)"


def test_there_must_be_documents(tmp_path):
    with pytest.raises(UserError, match="holds no document"):
        search(str(tmp_path))


def test_a_program_prints_the_same_each_time():
    code = "print(random.random(), sorted(map(hash, 'ab')))"
    assert python(code, Random(1)) == python(code, Random(1)) != python(code, Random(2))


def test_what_a_program_does_wrong_is_its_result():
    assert python("print(1 + 1)", Random(0)) == "2"
    assert "ZeroDivisionError" in python("1 / 0", Random(0))
    assert python("x = 1", Random(0)) == "(nothing was printed)"
