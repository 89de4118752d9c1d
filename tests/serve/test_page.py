"""The chat page: what it is made of, and what a reply becomes."""

import asyncio
import os
import shutil

import httpx
import pytest

from rorqual.serve.page import add_page, answer
from rorqual.serve.protocol import ChatRequest


def test_a_reply_is_a_fold_of_thoughts_an_answer_and_figures(server):
    body = ChatRequest(messages=[{"role": "user", "content": "what is 12?"}], max_tokens=30, thinking_budget=8, seed=2)

    async def read():
        return [shown async for shown in answer(server.service, body)]

    steps = asyncio.run(read())
    folds = [shown[0]["metadata"] for shown, _ in steps if "metadata" in shown[0]]
    assert folds[0]["status"] == "pending"
    assert folds[0]["title"].startswith("Thinking")
    assert folds[-1]["status"] == "done"
    assert "8 tokens" in folds[-1]["title"]
    shown, figures = steps[-1]
    assert len(shown) == 2
    assert "think>" not in shown[1]["content"]
    assert "30 tokens" in figures or steps[-1][0][1]["content"]
    assert "prompt tokens from the cache" in figures
    assert server.settled() == 0


@pytest.fixture
def paged(start):
    return start(page=add_page)


def test_the_page_and_the_api_share_an_address(paged):
    page = httpx.get(paged.url + "/")
    assert page.status_code == 200
    assert "Rorqual" in page.text
    assert httpx.get(paged.url + "/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(paged.url + "/health").status_code == 200


def test_a_page_with_keys_wants_one(start):
    server = start(page=add_page, keys=("kittiwake-4711",))
    page = httpx.get(server.url + "/")
    assert page.status_code == 200
    assert "API key" in page.text
    assert "kittiwake-4711" not in page.text


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_somebody_talks_through_the_page(paged, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})  # a phone
        page.goto(paged.url)
        box = page.get_by_role("textbox").last
        box.fill("what is 12 and 7?")
        box.press("Enter")
        page.get_by_text("prompt tokens from the cache").wait_for(timeout=60_000)
        page.get_by_text("Thought").first.wait_for(timeout=60_000)
        page.screenshot(path=os.environ.get("RORQUAL_SCREENSHOT", str(tmp_path / "page.png")))
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing to scroll sideways for"
        browser.close()
