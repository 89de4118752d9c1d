"""IFEval's verifiers on a table of responses; the loader, and the four published metrics."""

import json

import pytest

from rorqual.errors import UserError
from rorqual.evals.benchmarks.ifeval import followed
from rorqual.evals.benchmarks.instructions import NEEDS, VERIFIERS, sentences, words_in_capitals
from rorqual.evals.tasks import open_task

LESS, LEAST = "less than", "at least"
# instruction, its arguments, responses that follow it, responses that do not
TABLE = [
    ("keywords:existence", {"keywords": ["whale", "krill"]}, ["Whales eat Krill."], ["Whales eat.", "krill"]),
    ("keywords:frequency", {"keyword": "sea", "relation": LEAST, "frequency": 2}, ["Sea, the sea"], ["sea"]),
    ("keywords:frequency", {"keyword": "sea", "relation": LESS, "frequency": 2}, ["sea", "none"], ["sea sea"]),
    ("keywords:forbidden_words", {"forbidden_words": ["can", "C++"]}, ["A candle."], ["I CAN.", "yes we can"]),
    (
        "keywords:letter_frequency",
        {"letter": "K", "let_relation": LEAST, "let_frequency": 2},
        ["Krill kept"],
        ["krill"],
    ),
    (
        "language:response_language",
        {"language": "de"},
        ["Der Wal schwimmt heute im großen Meer."],
        ["The whale swims in the big sea today."],
    ),
    (
        "length_constraints:number_sentences",
        {"relation": LEAST, "num_sentences": 3},
        ["One. Two! Three?", "Dr. Fin swam. It was 3.5 m. Good"],
        ["One. Two", "Mr. A. B. Fin came. He left."],
    ),
    (
        "length_constraints:number_sentences",
        {"relation": LESS, "num_sentences": 3},
        ["Hi, i.e. hello. Bye."],
        ["One. Two. Three."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***"],
        ["a", "a\n***\n\n***\nb", "a\n***\nb\n***\nc"],
    ),
    ("length_constraints:number_words", {"relation": LEAST, "num_words": 4}, ["It isn't so"], ["one two three"]),
    ("length_constraints:number_words", {"relation": LESS, "num_words": 4}, ["one two three"], ["It isn't so"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Sea"},
        ["a\n\nsea, b", "a\n\n'Sea' b"],
        ["sea\n\nb", "a\n\nseal", "a\n\nsea\n\nc", "a"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] at [place of work]"], ["[name] only"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\nP.S. krill", "p. s. x"], ["Bye.", "PS x"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S more", "p.p. s more"], ["P.S. more"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b"],
        ["* a", "* a\n** b\n- c\n- d"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is no.", "Well: My answer is maybe."],
        ["No.", "my answer is no"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and **b**", "*a b* *c*"],
        ["*a* b", "* *  **"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "Section 1\nSection 2"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1]}', '```json\n{"a": 1}\n```', "[1]"],
        ["{a: 1}", "x {}", "```json"],
    ),
    ("detectable_format:title", {}, ["<<A title>>\nText"], ["A title", "<< >>", "<<a\nb>>"]),
    (
        "combination:two_responses",
        {},
        ["a******b", "******a******b"],
        ["a", "a******a", "a******b******c", "a************b"],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi. "}, ["say hi. Hi!", "Say hi."], ["Hi! Say hi."]),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, ['So. any questions?"'], ["Any questions? Yes."]),
    ("startend:quotation", {}, [' "So it is." '], ['"So', "'So'", '"']),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": LEAST, "capital_frequency": 2},
        ["I saw NASA.", "TWO-PART A"],
        ["I saw Nasa."],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": LESS, "capital_frequency": 2},
        ["NO, not Me"],
        ["NO WAY"],
    ),
    (
        "change_case:english_capital",
        {},
        ["THE WHALE SWIMS IN THE BIG SEA TODAY."],
        ["The whale swims.", "DER WAL SCHWIMMT IM GROSSEN MEER"],
    ),
    ("change_case:english_lowercase", {}, ["the whale swims in the big sea today."], ["The whale swims in the sea."]),
    ("punctuation:no_comma", {}, ["No such mark."], ["Well, yes."]),
]


@pytest.mark.parametrize(("kind", "given", "right", "wrong"), TABLE)
def test_verdicts(kind, given, right, wrong):
    assert set(NEEDS.get(kind, ())) == set(given)
    assert [text for text in right if not VERIFIERS[kind](text, given)] == []
    assert [text for text in wrong if VERIFIERS[kind](text, given)] == []


def test_all_25_are_there_and_in_the_table():
    assert len(VERIFIERS) == 25
    assert {kind for kind, *_ in TABLE} == set(VERIFIERS)


def test_counts():
    texts = ("", "No end", "One. Two.", "He said “Go!” Then he went.", "3.14 is pi.", "Wait... what?")
    assert [sentences(text) for text in texts] == [0, 1, 2, 2, 1, 2]
    assert words_in_capitals("I like NASA's X-15, and Eu (EU).") == 3  # NASA's is not, as its s is small


ROW = {
    "key": 1, "prompt": "Write two bullets without commas.",
    "instruction_id_list": ["punctuation:no_comma", "detectable_format:number_bullet_lists"],
    "kwargs": [{"num_bullets": None, "relation": None}, {"num_bullets": 2, "relation": None}],
}  # fmt: skip


def test_strict_and_loose_at_both_levels(tmp_path):
    (tmp_path / "input_data.jsonl").write_text(json.dumps(ROW) + "\n")
    task = open_task("ifeval", data=str(tmp_path / "input_data.jsonl"))
    (problem,) = task.problems(9, 0)
    assert problem.question == ROW["prompt"]
    texts = ["- a\n- b", "Sure, here:\n- a\n- b", "- a, b", "<think>\n, </think>- a\n- b", "<think>- a\n- b", ""]
    assert task.score([problem] * 6, texts, [None] * 6) == [True, False, False, True, False, False]
    assert task.second_score([problem] * 6, texts, [None] * 6) == [True, True, False, True, False, False]
    assert followed(problem, texts[1], loose=False) == [False, True]
    assert task.parts(problem, texts[1]) == {
        "inst_level_strict_acc": (1, 2), "prompt_level_loose_acc": (1, 1), "inst_level_loose_acc": (2, 2),
    }  # fmt: skip
    assert task.parts(problem, "")["inst_level_strict_acc"] == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction_id_list": ["no:such"], "kwargs": [{}]}, "instruction 'no:such' is none of IFEval's 25"),
        ({"kwargs": [{}]}, "instruction_id_list and kwargs are no lists of one length"),
        ({"kwargs": [{}, {}]}, "kwargs of detectable_format:number_bullet_lists has no num_bullets"),
        ({"prompt": None}, "field prompt is missing"),
    ],
)
def test_broken_rows_are_one_sentence(change, message, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(ROW | change) + "\n")
    with pytest.raises(UserError, match=message) as caught:
        open_task("ifeval", data=str(tmp_path / "d.jsonl")).problems(9, 0)
    assert str(caught.value).startswith(f"{tmp_path / 'd.jsonl'}, line 1: ")
