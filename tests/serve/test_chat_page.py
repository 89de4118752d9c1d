"""The chat page: what a reply becomes, and the page itself in a browser."""

import asyncio
import re
import shutil
import signal
import time
from types import SimpleNamespace

import httpx
import pytest

from rorqual.engine import SamplingParams
from rorqual.serve.chat_page import add_page, build_page
from rorqual.serve.chat_state import fold, markdown
from rorqual.serve.chat_state import without_thinking as spoken

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture
def paged(start):
    server = start(page=add_page, recommended=SamplingParams(max_tokens=120))
    server.service.engine.eos = ()  # replies are as long as they may be
    return server


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("the $n$ of $x_1 + y$.", r"the \(n\) of \(x_1 + y\)."),
        ("from $5 to $6, or $7-$8", "from $5 to $6, or $7-$8"),
        ("*so* 3*4*5 is `3*4*$5$`", r"*so* 3\*4\*5 is `3*4*$5$`"),
        ("```\n$x$*y\n``` $a*b$", "```\n$x$*y\n``` \\(a*b\\)"),
        (r"$$a*b$$ and \[a*b\]", r"$$a*b$$ and \[a*b\]"),
        ("```\nunfinished $x$", "```\nunfinished $x$"),
    ],
)
def test_formulas_and_products_are_no_markdown(said, shown):
    assert markdown(said) == shown
    told = spoken([{"role": "assistant", "content": markdown("3*4")}, fold("Thought", "hm")], " ")
    assert told == [{"role": "assistant", "content": "3*4"}], "and the model is told what it had said"


def test_the_page_and_the_api_share_an_address(paged):
    page = httpx.get(paged.url + "/")
    assert page.status_code == 200
    assert "Rorqual" in page.text
    assert httpx.get(paged.url + "/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(paged.url + "/health").status_code == 200
    assert httpx.get(paged.url + "/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(paged.url + "/v1/chat/completions").status_code == 405


def test_nothing_of_gradio_but_the_page_can_be_reached(paged):
    upload = httpx.post(paged.url + "/gradio_api/upload", files={"files": b"x" * 100})
    assert upload.status_code == 404
    for path in ("/gradio_api/file=/etc/hostname", "/gradio_api/openapi.json", "/monitoring", "/login"):
        assert httpx.get(paged.url + path).status_code == 404


def test_a_page_with_keys_wants_one(start):
    server = start(page=add_page, keys=("kittiwake-4711",))
    page = httpx.get(server.url + "/")
    assert page.status_code == 200
    assert "API key" in page.text
    assert "kittiwake-4711" not in page.text


@pytest.mark.parametrize("wrong", [{"seed": 2**70}, {"seed": 1.5}, {"temperature": 200}, {"system": "a\ud800"}])
def test_settings_that_cannot_be_are_told_on_the_page(server, wrong):
    (reply, *_) = (f.fn for f in build_page(server.service).fns.values() if getattr(f.fn, "__name__", "") == "reply")
    given = {
        "history": [{"role": "user", "content": "both?"}], "system": "", "temperature": 1, "top_p": 1, "longest": 4,
        "budget": None, "seed": None, "key": "", "request": SimpleNamespace(session_hash="a"),
    }  # fmt: skip

    async def last():
        return [shown async for shown in reply(**given | wrong)][-1]

    history, _ = asyncio.run(last())
    assert history[0]["content"] == "both?"
    name = "messages" if "system" in wrong else next(iter(wrong))
    assert history[-1]["metadata"]["title"].startswith(f"⚠ {name}")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


class Visitor:
    """Somebody at the page; `elsewhere`: what the page asked of other servers, `errors`: of what it complained."""

    def __init__(self, browser, url, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | options)
        self.page, self.elsewhere, self.errors = self.context.new_page(), [], []
        self.page.on("request", lambda r: r.url.startswith((url, "data:", "blob:")) or self.elsewhere.append(r.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("response", lambda r: r.ok or self.errors.append(f"{r.status} {r.url}"))
        self.page.goto(url)
        self.box.wait_for()

    @property
    def box(self):
        return self.page.get_by_placeholder("Ask something")

    @property
    def figures(self):
        return self.page.locator(".figures.prose").inner_text()

    @property
    def questions(self):
        return [q.strip() for q in self.page.get_by_test_id("user").all_inner_texts()]

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True)

    def ask(self, question):
        self.box.fill(question)
        self.box.press("Enter")

    def answered(self):
        """Wait for the end of a reply."""
        self.page.get_by_text("prompt tokens from the cache").wait_for()
        self.button("Send").wait_for()
        assert not self.elsewhere
        assert not self.errors


@pytest.fixture
def visit(browser, paged):
    visitors = []

    def open_page(**options):
        visitors.append(Visitor(browser, paged.url, **options))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.context.close()


@in_a_browser
def test_somebody_asks_and_reads(visit):
    visitor = visit()
    visitor.ask("what is the sum of both, or of 12 and 7, and what of both?")
    visitor.answered()
    assert visitor.questions == ["what is the sum of both, or of 12 and 7, and what of both?"]
    title = visitor.page.get_by_text("Thought · ").inner_text()
    assert re.search(r"Thought · [\d.]+ s · \d+ tokens", title)
    assert visitor.figures.startswith("120 tokens · ")
    visitor.ask("and the sum?")
    visitor.page.get_by_text("Thought · ").nth(1).wait_for()
    visitor.answered()
    assert re.search(r" (1[6-9]|[2-9]\d|\d{3}) of \d+ prompt tokens from the cache", visitor.figures), visitor.figures


@in_a_browser
def test_a_reply_can_be_stopped_and_made_again_and_its_question_edited(visit, paged, monkeypatch):
    step, pause = paged.service.engine.step, [0.02]
    monkeypatch.setattr(paged.service.engine, "step", lambda *begins: (time.sleep(pause[0]), step(*begins))[1])
    visitor = visit()
    visitor.ask("what is 12 and 7?")
    visitor.page.get_by_text("Thinking · ").wait_for()
    visitor.button("Stop").click()
    visitor.answered()
    assert visitor.figures.endswith("stopped")
    assert paged.settled() == 0
    assert int(visitor.figures.split()[0]) < 120
    pause[0] = 0.0

    visitor.page.get_by_label("Retry").last.click()
    visitor.page.get_by_text("120 tokens · ").wait_for()
    visitor.answered()
    assert visitor.questions == ["what is 12 and 7?"]

    visitor.page.get_by_label("Edit").first.click()
    visitor.page.locator(".edit-textarea").fill("or the sum of both?")
    visitor.page.get_by_label("Submit").first.click()
    visitor.page.get_by_text("or the sum of both?").last.wait_for()
    visitor.answered()
    assert visitor.questions == ["or the sum of both?"]


@in_a_browser
def test_conversations_outlive_the_page_and_can_be_left_and_deleted(visit):
    visitor = visit()
    for question in ("what is 12?", "is it 7?"):
        visitor.button("New conversation").click()
        visitor.ask(question)
        visitor.page.get_by_role("radio", name=question).wait_for()
        visitor.answered()
    visitor.page.reload()
    visitor.box.wait_for()
    visitor.page.get_by_role("radio", name="what is 12?").click()
    visitor.page.locator(".message").first.wait_for()
    assert visitor.questions == ["what is 12?"]
    visitor.ask("and 7?")
    visitor.answered()
    assert visitor.questions == ["what is 12?", "and 7?"]
    visitor.page.get_by_label("Clear").click()
    visitor.page.get_by_role("radio", name="what is 12?").wait_for(state="detached")
    assert visitor.page.get_by_role("radio").count() == 1
    visitor.page.reload()
    visitor.page.get_by_role("radio", name="is it 7?").wait_for()
    assert visitor.page.get_by_role("radio").count() == 1


@in_a_browser
def test_whoever_closes_the_page_frees_what_it_held(visit, paged, monkeypatch):
    step = paged.service.engine.step
    monkeypatch.setattr(paged.service.engine, "step", lambda *begins: (time.sleep(0.2), step(*begins))[1])
    visitor = visit()
    visitor.ask("what?")
    visitor.page.get_by_text("Thinking · ").wait_for()
    visitor.context.close()
    assert paged.settled() == 0
    assert paged.service.engine.status().counters.generated_tokens < 110


@in_a_browser
def test_a_full_queue_is_said_and_the_question_kept(visit, paged):
    paged.service.engine_thread.limit = 0
    visitor = visit()
    visitor.ask("what?")
    visitor.page.get_by_text("the server's queue is full").wait_for()
    visitor.button("Send").wait_for()
    paged.service.engine_thread.limit = 8
    visitor.page.get_by_label("Retry").last.click()
    visitor.answered()
    assert visitor.questions == ["what?"]


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_by_day_and_by_night(visit, scheme):
    visitor = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    visitor.ask("what is 12 and 7?")
    visitor.answered()
    sizes = "[document.documentElement.scrollWidth, document.querySelector('.gradio-container').scrollWidth]"
    assert visitor.page.evaluate(sizes) == [390, 390], "there is something to scroll sideways for"
    send = visitor.button("Send").bounding_box()
    assert send["x"] + send["width"] <= 390
    shade = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", shade)[:3])) < 3 * 128) == (scheme == "dark")


@in_a_browser
def test_an_open_page_does_not_keep_the_server_from_ending(browser, serve):
    server = serve("--port", "0")
    visitor = Visitor(browser, server.url)
    visitor.ask("what is 12 and 7?")
    visitor.answered()
    assert server.end(signal.SIGTERM) == 0
    visitor.context.close()
    assert "Traceback" not in server.log.read_text()
