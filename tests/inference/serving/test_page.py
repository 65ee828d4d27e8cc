"""The chat page in Chromium, where there is one."""

import os
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from inference.serving.service import Service
from tests.inference.serving.conftest import LIMITS, alone, serving

MESSAGE = '<img src=x onerror=alert(1)> & "you" 🙂?'
TOPS = "answers => answers.map(answer => answer.getBoundingClientRect().top)"


@pytest.fixture
def pictures(tmp_path) -> Path:
    """RLHF_CHAT_PICTURES keeps the screenshots, to be looked at."""
    return Path(os.environ.get("RLHF_CHAT_PICTURES", tmp_path))


def open_page(page: Page, address: str, served: str = "SFT | RLHF", **fields: object) -> None:
    page.goto(address)
    expect(page.locator("#served")).to_have_text(served)
    page.click("summary")
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))


def ask(page: Page, message: str) -> None:
    """Returns when all have answered."""
    page.fill("#message", message)
    page.click("#send")
    expect(page.locator("#send")).to_be_enabled()


def texts(page: Page, turn: int) -> list[str]:
    """Of a turn: what was said, then the answers."""
    return page.locator(".turn").nth(turn).locator(".text").all_text_contents()


def test_both_models_answer_side_by_side(page, complaints, served, model, pictures):
    page.set_viewport_size({"width": 1100, "height": 800})
    open_page(page, served.url, temperature=0.9, seed=7, max_tokens=30)
    ask(page, MESSAGE)
    asked = [{"role": "user", "content": MESSAGE}]
    first = alone(model, 7, asked, temperature=0.9, max_tokens=30)
    assert texts(page, 0) == [MESSAGE, first, first]  # both models of the test are the same one
    assert page.locator("img").count() == 0
    assert page.locator(".answer h3").all_text_contents() == ["SFT", "RLHF"]
    left, right = page.locator(".answer").evaluate_all(TOPS)
    assert left == right
    ask(page, "Why?")
    asked += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    assert texts(page, 1)[1:] == [alone(model, 7, asked, temperature=0.9, max_tokens=30)] * 2
    page.screenshot(path=pictures / "page_wide.png")
    assert complaints == []


def test_on_a_phone_and_in_the_dark(page, complaints, served, pictures):
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme="dark")
    open_page(page, served.url, max_tokens=30)
    ask(page, "averylongwordwithoutanyblanks" * 6)
    first, second = page.locator(".answer").evaluate_all(TOPS)
    assert first < second  # one under the other
    last, footer = page.locator(".answer").last.bounding_box(), page.locator("footer").bounding_box()
    assert last["y"] + last["height"] <= footer["y"]  # what is new is seen
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 21)"
    unnamed = "fields => fields.filter(field => !field.labels.length).length"
    assert page.locator("input, textarea").evaluate_all(unnamed) == 0
    page.screenshot(path=pictures / "page_phone.png")
    assert complaints == []


def test_stop_frees_the_slots(page, served, endless):
    open_page(page, served.url, temperature=2, seed=1, max_tokens=200)
    page.fill("#message", "Tell me a story.")
    page.click("#send")
    for number in (0, 1):
        expect(page.locator(".answer .text").nth(number)).to_have_text(re.compile(".{6}", re.DOTALL))
    assert served.health("sft")["running"] == served.health("rlhf")["running"] == 1
    page.click("#stop")
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator(".note").first).to_have_text("(stopped)")
    kept = texts(page, 0)[1]
    assert page.evaluate("histories.sft.map(m => m.content)") == ["Tell me a story.", kept]
    running = "fetch('health').then(r => r.json()).then(h => h.models.sft.running + h.models.rlhf.running)"
    page.wait_for_function(f"() => {running}.then(count => count === 0)")
    page.click("#reset")
    assert page.locator(".turn").count() == page.evaluate("histories.sft.length") == 0


def test_refusals_are_shown_and_a_token_comes_with_the_address(page, model):
    with serving(Service({"sft": model}, LIMITS), token="sec ret", loopback_only=True) as running:
        page.goto(running.url)
        expect(page.locator("#problem")).to_have_text(re.compile("^A token is needed"))
        assert page.locator("#token_field").get_attribute("hidden") is None
        page.goto("about:blank")
        open_page(page, f"{running.url}/#token=sec%20ret", "SFT", max_tokens=9999)
        assert "token" not in page.url
        ask(page, "Hello")
        assert page.locator(".note.wrong").text_content() == "max_tokens can be at most 200 here, not 9999."
        assert page.evaluate("histories.sft.length") == 0
