"""BFCL on made-up functions in the published format."""

import json

import pytest

from helpers.scripted_models import vocabulary
from rorqual.errors import UserError
from rorqual.evals.benchmarks.bfcl import python_calls, read_calls, schema
from rorqual.evals.benchmarks.call_check import calls_match
from rorqual.evals.tasks import open_task

BOOK = {
    "name": "boat.book", "description": "Books a boat.",
    "parameters": {
        "type": "dict", "required": ["port", "seats"],
        "properties": {
            "port": {"type": "string", "description": "Where."}, "seats": {"type": "integer", "description": "Number."},
            "price": {"type": "float", "description": "At most."},
            "days": {"type": "array", "items": {"type": "string"}},
            "crew": {"type": "dict", "properties": {"captain": {"type": "string"}, "size": {"type": "integer"}}},
            "quiet": {"type": "boolean"},
            "stops": {"type": "array", "items": {"type": "dict", "properties": {"name": {"type": "string"}}}},
            "when": {"type": "any"},
        },
    },
}  # fmt: skip
SEE = {"name": "see", "description": "", "parameters": {"type": "dict", "properties": {}, "required": []}}
ACCEPTED = {
    "port": ["Saint-Malo", "St. Malo"], "seats": [2], "price": [9.5, ""], "days": [["Mon", "Tue"], ""],
    "crew": [{"captain": ["Ann"], "size": [3, ""]}, ""], "quiet": [True, ""], "stops": [[{"name": ["Cap"]}], ""],
    "when": ["now", ""],
}  # fmt: skip
BASE = {"port": "Saint-Malo", "seats": 2}
RIGHT = [
    BASE, {"port": "saint malo", "seats": 2}, {"port": "ST MALO", "seats": 2}, BASE | {"price": 9.5},
    BASE | {"days": ["mon", "TUE"]}, BASE | {"crew": {"captain": "ann"}},
    BASE | {"crew": {"captain": "Ann", "size": 3}},
    BASE | {"quiet": True}, BASE | {"stops": [{"name": "CAP"}]}, BASE | {"when": "Now"},
]  # fmt: skip
WRONG = [
    {"port": "Saint-Malo"}, {"port": "Brest", "seats": 2}, {"port": "Saint-Malo", "seats": "2"},
    {"port": "Saint-Malo", "seats": 2.0}, {"port": "Saint-Malo", "seats": 3}, BASE | {"price": 9}, BASE | {"extra": 1},
    BASE | {"days": ["Tue", "Mon"]}, BASE | {"days": "Mon"}, BASE | {"days": [1]}, BASE | {"crew": {"size": 3}},
    BASE | {"crew": {"captain": "Ann", "ship": "x"}}, BASE | {"quiet": 1}, BASE | {"quiet": "true"},
    BASE | {"stops": [{"name": "Cap"}, {"name": "Cap"}]}, BASE | {"stops": ["Cap"]}, BASE | {"when": "later"},
]  # fmt: skip


def book(arguments, name="boat.book"):
    return [(name, arguments)]


def test_one_call():
    assert [a for a in RIGHT if not calls_match(book(a), [{"boat.book": ACCEPTED}], [BOOK])] == []
    assert [a for a in WRONG if calls_match(book(a), [{"boat.book": ACCEPTED}], [BOOK])] == []
    assert not calls_match(book(BASE, "boat"), [{"boat.book": ACCEPTED}], [BOOK])
    assert not calls_match([], [{"boat.book": ACCEPTED}], [BOOK])
    assert not calls_match(book(BASE) * 2, [{"boat.book": ACCEPTED}], [BOOK])
    whole = {"price": [9], "port": ["x"], "seats": [1]}  # an accepted float as an integer, and no optional parameter
    assert calls_match(book({"port": "x", "seats": 1, "price": 9}), [{"boat.book": whole | {"price": [9.0]}}], [BOOK])
    assert not calls_match(book({"port": "x", "seats": 1}), [{"boat.book": whole}], [BOOK])


def test_several_calls_in_any_order():
    wanted = [{"see": {}}, {"boat.book": {"port": ["a"], "seats": [1]}}, {"boat.book": {"port": ["b"], "seats": [1]}}]
    calls = [("boat.book", {"port": "b", "seats": 1}), ("see", {}), ("boat.book", {"port": "a", "seats": 1})]
    assert calls_match(calls, wanted, [BOOK, SEE])
    assert not calls_match([calls[0], calls[1], calls[0]], wanted, [BOOK, SEE])


def row(name, functions, text="Book a boat."):
    return {"id": name, "question": [[{"role": "user", "content": text}]], "function": functions}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "possible_answer").mkdir()
    simple, parallel = row("simple_python_0", [BOOK]), row("live_parallel_0-0-0", [BOOK, SEE])
    answers = {
        "simple_python": (simple, [{"boat.book": ACCEPTED}]),
        "live_parallel": (parallel, [{"see": {}}, {"boat.book": ACCEPTED}]),
    }
    for category, (asked, accepted) in answers.items():
        (tmp_path / f"BFCL_v4_{category}.json").write_text(json.dumps(asked) + "\n")
        answer = {"id": asked["id"], "ground_truth": accepted}
        (tmp_path / "possible_answer" / f"BFCL_v4_{category}.json").write_text(json.dumps(answer) + "\n")
    (tmp_path / "BFCL_v4_irrelevance.json").write_text(json.dumps(row("irrelevance_0", [SEE])) + "\n")
    (tmp_path / "BFCL_v4_simple_java.json").write_text("not read\n")
    return tmp_path


def hermes(*calls):
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(given)}}}\n</tool_call>' for name, given in calls
    )


def test_verdicts_of_replies(folder):
    task = open_task("bfcl", data=str(folder))
    simple, none, parallel = task.problems(9, 0)
    assert [p.difficulty for p in (simple, none, parallel)] == ["simple_python", "irrelevance", "live_parallel"]
    call, look = ("boat_book", BASE), ("see", {})
    table = [
        (simple, hermes(call), True),
        (simple, f"<think>{hermes(look)}</think>{hermes(call)}", True),
        (simple, json.dumps({"name": "boat_book", "arguments": BASE}), True),
        (simple, json.dumps({"name": "boat_book", "parameters": BASE}), True),
        (simple, f"Here it is: {hermes(call)}", True),
        (simple, hermes(call, call), False),
        (simple, hermes(("boat_book", BASE | {"seats": 3})), False),
        (simple, f"<think>{hermes(call)}", False),
        (simple, "I cannot.", False),
        (parallel, hermes(call, look), True),
        (parallel, hermes(look, call), True),
        (parallel, hermes(call), False),
        (none, "No function fits.", True),
        (none, hermes(look), False),
        (none, "<think>", False),
    ]
    problems, texts = [problem for problem, _, _ in table], [text for _, text, _ in table]
    answers = [task.answer(p, "", t) for p, t in zip(problems, texts, strict=True)]
    found = task.score(problems, texts, answers)
    assert [text for (_, text, right), ok in zip(table, found, strict=True) if ok != right] == []
    written = [
        "[boat.book(port='Saint-Malo', seats=2)]",
        "boat_book(port='Saint-Malo', seats=2)",
        "[see()]",
        hermes(call),
    ]
    assert task.second_score([simple] * 4, written, ["[]"] * 3 + [json.dumps([call])]) == [True, True, False, True]


def test_functions_reach_the_chat_template(folder):
    template = "{% for t in tools %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    task = open_task("bfcl:categories=['simple_python']", data=str(folder))
    (problem,) = task.problems(9, 0)
    prompt = task.prompt(problem, vocabulary(template=template), "chat")
    assert '"name": "boat_book"' in prompt
    assert '"type": "object"' in prompt
    assert "Book a boat." in prompt
    with pytest.raises(UserError, match="template = 'plain': bfcl gives functions through a chat template"):
        task.prompt(problem, vocabulary(), "plain")


def test_types_become_json_schema():
    assert schema(BOOK["parameters"])["properties"]["price"] == {
        "type": "number", "format": "float", "description": "At most. This is a float type value.",
    }  # fmt: skip
    assert schema({"type": "tuple", "items": {"type": "dict", "properties": {"a": {"type": "any"}}}}) == {
        "type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}},
    }  # fmt: skip


def test_reading_calls():
    assert read_calls(hermes(("f", {"a": 1}), ("g", {})), {"f"}) == [("f", {"a": 1}), ("g", {})]
    assert read_calls("[TOOL_CALLS][" + json.dumps({"name": "f", "arguments": {}}) + "]", {"f"}) == [("f", {})]
    assert read_calls('{"a": 1}', {"f"}) == read_calls("f(a=1)", {"f"}) == []
    assert python_calls("```python\n[f(a=[1, {'b': None}]), m.g()]\n```") == [
        ("f", {"a": [1, {"b": None}]}),
        ("m_g", {}),
    ]
    for text in ("Sorry.", "f(1)", "f(a=b)", "[]", "f(**a)", "f(a=1", "import os"):
        assert python_calls(text) is None


SIMPLE = "possible_answer/BFCL_v4_simple_python.json"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / SIMPLE).unlink(), "does not exist; the accepted calls"),
        (
            lambda f: (f / SIMPLE).write_text('{"id": "x", "ground_truth": []}'),
            "possible_answer has no simple",
        ),
        (lambda f: [file.unlink() for file in f.glob("*.json")], "has no BFCL_v"),
        (lambda f: (f / "BFCL_v4_irrelevance.json").write_text('{"id": "i", "question": [[]]}'), "field function is"),
    ],
)
def test_broken_folders_are_one_sentence(break_it, message, folder):
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_task("bfcl", data=str(folder)).problems(9, 0)
    assert "\n" not in str(caught.value)


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    from rorqual.evals.benchmarks import bfcl

    monkeypatch.setattr(bfcl, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run: pip install --no-deps bfcl-eval .*, or give a local file"):
        open_task("bfcl").problems(9, 0)
    with pytest.raises(UserError, match="bfcl: category 'rest' is unknown; use simple_python"):
        open_task("bfcl:categories=['rest']")
