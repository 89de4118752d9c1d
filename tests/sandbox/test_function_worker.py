import pickle

import pytest

from rorqual.sandbox.function_worker import FunctionError, FunctionWorker, load

SOURCE = """
import os

def judge(text):
    if text == "loop":
        while True:
            pass
    if text == "raise":
        raise ValueError("no such text")
    if text == "end":
        os._exit(3)
    print("read", text)
    return {"nan": float("nan"), "text": "4", "none": None}.get(text, len(text))

class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def judge(self, text):
        return self.factor * len(text)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_a_call_that_gives_no_number_says_why_and_the_next_is_answered(file):
    worker = FunctionWorker(f"{file}:judge", timeout=1.0)
    for text, reason in (
        ("loop", r"took longer than 1 seconds"),
        ("raise", r"it raised ValueError: no such text"),
        ("nan", r"returned nan, not a finite number"),
        ("text", r"returned '4', not a finite number"),
        ("none", r"returned None, not a number"),
        ("end", r"it ended its process"),
    ):
        with pytest.raises(FunctionError, match=reason):
            worker({"text": text})
        assert worker({"text": "abc"}) == 3.0
    worker.close()


def test_a_method_of_an_object_made_with_a_config(file):
    assert FunctionWorker(f"{file}:Scaled", 10.0, {"factor": 2.5}, "judge")({"text": "ab"}) == 5.0


def test_arguments_that_cannot_be_sent(file):
    with pytest.raises(FunctionError, match="cannot be sent to another process"):
        FunctionWorker(f"{file}:judge", 10.0)({"text": lambda: 0})


def test_an_object_of_a_class_in_the_file_can_be_sent(file):
    scaled = load(f"{file}:Scaled")(3)
    assert pickle.loads(pickle.dumps(scaled)).factor == 3


def test_what_cannot_be_loaded(file):
    with pytest.raises(LookupError, match=r"it has no juge, only judge, Scaled"):
        load(f"{file}:juge")
    with pytest.raises(FileNotFoundError):
        load(f"{file.with_name('other.py')}:judge")
