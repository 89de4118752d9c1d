"""Models in a terminal: a real one, with its keys."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import sys
import time

import pytest

from helpers.reasoning_model import save_reasoner
from rorqual.cli.entry import main
from rorqual.cli.terminal import complete_blocks, markdown, questions, read_prompt, talk
from rorqual.errors import UserError

UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"
ANSWER = """It is *so*:

1. one

2. two

   with more

```python
x = 1

y = 2
```

| a | b |
|---|---|
| 1 | 2 |

The end."""


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_reasoner(tmp_path_factory.mktemp("terminal") / "tiny")


class Terminal:
    """`rorqual` in a terminal of its own."""

    def __init__(self, home, *words):
        code = "from rorqual.cli.entry import main; main()"
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts with "&" ignores it, and so would this
            env = os.environ | {"TERM": "xterm-256color", "XDG_STATE_HOME": str(home), "OMP_NUM_THREADS": "1",
                                "COLUMNS": "80", "LINES": "24"}  # fmt: skip
            os.execve(sys.executable, [sys.executable, "-c", code, *map(str, words)], env)
        self.said = ""

    def type(self, keys):
        self.said = ""
        os.write(self.fd, keys.encode())

    def until(self, pattern, seconds=60):
        """Read until it has said this."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.said)):
            assert time.monotonic() < end, self.said
            if select.select([self.fd], [], [], 0.1)[0]:
                self.said += os.read(self.fd, 4096).decode(errors="replace")
        return found

    def interrupt(self):
        """Ctrl-C at the prompt, until there is a new one: CPython's input() notices one that comes while it echoes with
        the next key only, and on a busy machine it echoes for long.
        """
        for _ in range(20):
            self.type(CTRL_C)
            with contextlib.suppress(AssertionError):
                self.until("> $", seconds=3)
                return
        raise AssertionError(self.said)

    def end(self):
        """Its exit status, once it has ended."""
        try:
            while os.read(self.fd, 4096):
                pass
        except OSError:  # how Linux says that the other side is closed
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(tmp_path):
    """Start such terminals."""
    running = []

    def begin(*words):
        running.append(Terminal(tmp_path, *words))
        running[-1].until("> $")
        return running[-1]

    yield begin
    for one in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(one.pid, 0)
        os.close(one.fd)


AT_THE_PROMPT = r"prompt tokens from the cache\S*\s+\S*> $"


def test_a_conversation(model, terminal):
    talk = terminal("chat", model, "--temperature", 0, "--max-tokens", 60, "--thinking-budget", 9)
    talk.type("what is 12 and 7?\r")
    talk.until(r"thought for [\d.]+ s")
    assert "\x1b[2m" in talk.said, "thoughts are dimmed"
    assert "think>" not in talk.said
    made = talk.until(r"(\d+) tokens, 9 of them thoughts · [\d.]+ tokens/s")
    assert 9 < int(made[1]) <= 60
    talk.until(AT_THE_PROMPT)
    talk.type("\r")  # nothing is no question, and no end
    talk.until("> $")
    talk.type("\x1b[200~what is 12\nor 7?\x1b[201~\r")  # pasted
    talk.until(AT_THE_PROMPT)
    assert talk.said.count("prompt tokens from the cache") == 1, "two lines are one question"
    talk.type(CTRL_D)
    assert talk.end() == 0

    talk = terminal("chat", model, "--temperature", 0, "--max-tokens", 20)
    talk.type(UP + UP + UP)
    talk.until("what is 12 and 7[?]")
    talk.type("\r")
    talk.until(AT_THE_PROMPT)
    talk.type(CTRL_D)
    assert talk.end() == 0


def test_ctrl_c_stops_the_reply_or_the_line_and_nothing_else(model, terminal):
    talk = terminal("chat", model, "--temperature", 0, "--max-tokens", 2000)
    talk.type("half a question")
    talk.until("question")
    talk.interrupt()
    for question in ("what is 12 and 7?", "or the sum?"):
        talk.type(question + "\r")
        talk.until("\x1b\\[2m")
        talk.type(CTRL_C)
        stopped = talk.until(r"\[stopped\](.|\s)*?(\d+) tokens")
        assert int(stopped[2]) < 2000
        talk.until(AT_THE_PROMPT)
    talk.type(CTRL_D)
    assert talk.end() == 0


def test_what_is_not_utf8_becomes_replacement_characters(monkeypatch):
    typed = "café?\n".encode("latin-1") + "half of の".encode()[:-1] + b"\nand on\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8", errors="strict"))
    assert list(questions()) == ["caf\ufffd?", "half of \ufffd", "and on"]


@pytest.fixture
def generate(monkeypatch, capsys, model):
    """`rorqual generate` with this standard input; gives (exit status, standard output, standard error)."""

    def run(*words, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["rorqual", "generate", str(model), *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        status = 0
        try:
            main()
        except SystemExit as e:
            status = e.code or 0
        return status, *capsys.readouterr()

    return run


def test_generate_reads_its_prompt_and_tells_tokens_and_times(generate):
    options = ("--max-tokens", 12, "--temperature", 0, "--json")
    status, out, _ = generate("-", *options, stdin=b"what is 12 and 7?\n")
    assert status == 0
    found = json.loads(out)
    assert found["text"] == json.loads(generate("what is 12 and 7?", *options)[1])["text"]
    assert len(found["tokens"]) == 12
    assert found["finish_reason"] == "length"
    assert 0 < found["first_token_seconds"] <= found["seconds"]
    assert found["tokens_per_second"] > 0
    assert found["load_seconds"] > 0
    assert found["prompt_tokens"] > 5


@pytest.mark.parametrize(("stdin", "says"), [(b"", "empty"), (b" \n", "empty"), (b"caf\xe9", "UTF-8")])
def test_generate_refuses_what_is_no_prompt(generate, stdin, says):
    status, _, err = generate("-", stdin=stdin)
    assert status == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_blocks_are_printed_for_good_only_when_they_are_whole():
    cuts = {complete_blocks(ANSWER[:end]) for end in range(len(ANSWER) + 1)}
    pieces = [ANSWER[a:b] for a, b in zip(sorted(cuts), [*sorted(cuts)[1:], len(ANSWER)], strict=True)]
    assert [p.split("\n")[0] for p in pieces] == [
        "It is *so*:",
        "1. one",
        "2. two",
        "```python",
        "| a | b |",
        "The end.",
    ]
    assert "".join(pieces) == ANSWER
    assert "y = 2\n```" in pieces[3]
    assert "with more" in pieces[2]


def test_formulas_and_products_are_what_they_were():
    shown = markdown(r"\(x\) *and* 3*4 or `\n*2`" + "\n```\na\\b*c*d\n```").markup
    assert shown == r"\\(x\\) *and* 3\*4 or `\n*2`" + "\n```\na\\b*c*d\n```"


def test_a_prompt_that_is_not_text_is_a_sentence(monkeypatch):
    """Python hands such bytes over as half characters."""
    with pytest.raises(UserError, match="the prompt is not UTF-8"):
        read_prompt("caf\udce9")
    monkeypatch.setattr("sys.stdin", io.StringIO("caf\udce9"))
    with pytest.raises(UserError, match="standard input is not UTF-8"):
        read_prompt("-")
    with pytest.raises(UserError, match="--system is not UTF-8"):
        talk(None, None, "caf\udce9")
