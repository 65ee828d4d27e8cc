"""The chat page in Chromium, where there is one."""

import json
import os
from pathlib import Path

import pytest

from inference.serving.service import Service
from tests.inference.serving.browser import Browser, find_browser
from tests.inference.serving.conftest import LIMITS, alone, serving

MESSAGE = '<img src=x onerror=alert(1)> & "you" 🙂?'
IDLE = "!document.getElementById('send').disabled"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on this machine")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def pictures(tmp_path) -> Path:
    """RLHF_CHAT_PICTURES keeps the screenshots, to be looked at."""
    return Path(os.environ.get("RLHF_CHAT_PICTURES", tmp_path))


def open_page(browser: Browser, address: str) -> None:
    browser.complaints.clear()
    browser.call("Page.navigate", url="about:blank")
    browser.call("Page.navigate", url=address)
    browser.wait_for("document.readyState === 'complete' && typeof models === 'object'")


def set_field(browser: Browser, name: str, value: object) -> None:
    browser.run(f"document.getElementById({name!r}).value = {json.dumps(str(value))}")


def send(browser: Browser, message: str) -> None:
    set_field(browser, "message", message)
    browser.run("document.getElementById('send').click()")


def texts(browser: Browser, turn: int) -> list[str]:
    """Of a turn: what was said, then the answers."""
    return browser.run(
        f"[...document.querySelectorAll('.turn')[{turn}].querySelectorAll('.text')].map(t => t.textContent)"
    )


def test_both_models_answer_side_by_side(browser, served, model, pictures):
    browser.resize(1100, 800)
    browser.prefer("light")
    open_page(browser, served.url)
    browser.wait_for("models.length === 2")
    assert browser.run("document.getElementById('served').textContent") == "SFT | RLHF"
    for name, value in {"temperature": 0.9, "seed": 7, "max_tokens": 30}.items():
        set_field(browser, name, value)
    send(browser, MESSAGE)
    browser.wait_for(IDLE)
    asked = [{"role": "user", "content": MESSAGE}]
    first = alone(model, 7, asked, temperature=0.9, max_tokens=30)
    assert texts(browser, 0) == [MESSAGE, first, first]  # both models of the test are the same one
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("[...document.querySelectorAll('.answer h3')].map(h => h.textContent)") == ["SFT", "RLHF"]
    boxes = browser.run("[...document.querySelectorAll('.answer')].map(a => a.getBoundingClientRect().top)")
    assert boxes[0] == boxes[1]
    send(browser, "Why?")
    browser.wait_for(IDLE)
    asked += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    assert texts(browser, 1)[1:] == [alone(model, 7, asked, temperature=0.9, max_tokens=30)] * 2
    browser.screenshot(pictures / "page_wide.png")
    assert browser.complaints == []


def test_on_a_phone_and_in_the_dark(browser, served, pictures):
    browser.resize(360, 740)
    browser.prefer("dark")
    open_page(browser, served.url)
    browser.wait_for("models.length === 2")
    browser.run("document.querySelector('details').open = true")
    set_field(browser, "max_tokens", 30)
    send(browser, "averylongwordwithoutanyblanks" * 6)
    browser.wait_for(IDLE)
    boxes = browser.run("[...document.querySelectorAll('.answer')].map(a => a.getBoundingClientRect().top)")
    assert boxes[0] < boxes[1]  # one under the other
    last = "[...document.querySelectorAll('.answer')].at(-1).getBoundingClientRect().bottom"
    assert browser.run(f"{last} <= document.querySelector('footer').getBoundingClientRect().top")  # what is new is seen
    assert browser.run("document.documentElement.scrollWidth") == 360
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 21)"
    unnamed = "[...document.querySelectorAll('input, textarea')].filter(field => !field.labels.length).length"
    assert browser.run(unnamed) == 0
    browser.screenshot(pictures / "page_phone.png")
    assert browser.complaints == []


def test_stop_frees_the_slots(browser, served, slowly):
    open_page(browser, served.url)
    browser.wait_for("models.length === 2")
    for name, value in {"temperature": 2, "seed": 1, "max_tokens": 200}.items():
        set_field(browser, name, value)
    send(browser, "Tell me a story.")
    browser.wait_for(
        "[...document.querySelectorAll('.answer .text')].filter(t => t.textContent.length > 5).length === 2"
    )
    assert served.health("sft")["running"] == served.health("rlhf")["running"] == 1
    browser.run("document.getElementById('stop').click()")
    browser.wait_for(IDLE, 2)
    assert browser.run("document.querySelector('.note').textContent") == "(stopped)"
    kept = texts(browser, 0)[1]
    assert browser.run("histories.sft.map(m => m.content)") == ["Tell me a story.", kept]
    browser.wait_for(
        "fetch('health').then(r => r.json()).then(h => h.models.sft.running + h.models.rlhf.running === 0)", 2
    )
    browser.run("document.getElementById('reset').click()")
    assert browser.run("document.querySelectorAll('.turn').length + histories.sft.length") == 0


def test_refusals_are_shown_and_a_token_comes_with_the_address(browser, model):
    with serving(Service({"sft": model}, LIMITS), token="sec ret", loopback_only=True) as running:
        open_page(browser, running.url)
        browser.wait_for("document.getElementById('problem').textContent.startsWith('A token is needed')")
        assert browser.run("!document.getElementById('token_field').hidden")
        open_page(browser, f"{running.url}/#token=sec%20ret")
        browser.wait_for("models.length === 1")
        assert "token" not in browser.run("location.href")
        set_field(browser, "max_tokens", 9999)
        send(browser, "Hello")
        browser.wait_for(IDLE)
        assert (
            browser.run("document.querySelector('.note.wrong').textContent")
            == "max_tokens can be at most 200 here, not 9999."
        )
        assert browser.run("histories.sft.length") == 0
