"""The chat page in Chromium, where there is one."""

import json
import re

from playwright.sync_api import Page, Route, expect

from inference.serving.service import Service
from tests.inference.serving.conftest import LIMITS, alone, serving

MESSAGE = '<img src=x onerror=alert(1)> & "you" 🙂?'
GAP = """p => {
    const range = document.createRange();
    range.selectNodeContents(p.lastChild);
    return p.getBoundingClientRect().right - [...range.getClientRects()].at(-1).right;
}"""
ENDED = ("(stopped: the page was loaded again)", "The connection ended before the answer did.")
"""Which of the two depends on what the browser ends first."""
TOPS = "answers => answers.map(answer => answer.getBoundingClientRect().top)"


def open_page(page: Page, address: str, served: str = "SFT | RLHF", **fields: object) -> None:
    page.goto(address)
    expect(page.locator("#served")).to_have_text(served)
    if not page.locator("#seed").is_visible():
        page.click("summary")
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))


def ask(page: Page, message: str) -> None:
    """Returns when all have answered."""
    page.fill("#message", message)
    page.click("#send")
    expect(page.locator("#send")).to_be_enabled()


def texts(page: Page, turn: int) -> list[str]:
    """Of a turn: what was said, then the answers, as they came."""
    return page.evaluate("n => [chat.turns[n].said, ...Object.values(chat.turns[n].answers).map(a => a.text)]", turn)


def answer_with(page: Page, *texts: str) -> None:
    """The server's answers are these, the same of both models."""
    left = [text for text in texts for _ in range(2)]

    def respond(route: Route) -> None:
        chunk = {"choices": [{"delta": {"content": left.pop(0)}, "finish_reason": "stop"}]}
        route.fulfill(body=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    page.route("**/v1/chat/completions", respond)


def shown(page: Page, selector: str) -> list[str]:
    """Of the first model's answers."""
    return page.locator(f".answer:first-child .text {selector}").all_text_contents()


def test_both_models_answer_side_by_side(page, complaints, served, model, pictures):
    page.set_viewport_size({"width": 1100, "height": 800})
    open_page(page, served.url, temperature=0.9, seed=7, max_tokens=30)
    ask(page, MESSAGE)
    asked = [{"role": "user", "content": MESSAGE}]
    first = alone(model, 7, asked, temperature=0.9, max_tokens=30)
    assert texts(page, 0) == [MESSAGE, first, first]  # both models of the test are the same one
    assert page.locator("img").count() == 0
    assert page.locator(".said p").text_content() == MESSAGE
    assert page.locator(".answer h3").all_text_contents() == ["SFT", "RLHF"]
    left, right = page.locator(".answer").evaluate_all(TOPS)
    assert left == right
    ask(page, "Why?")
    asked += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    assert texts(page, 1)[1:] == [alone(model, 7, asked, temperature=0.9, max_tokens=30)] * 2
    page.screenshot(path=pictures / "page_wide.png")
    assert complaints == []


def test_on_a_phone_and_in_the_dark(page, complaints, served, pictures):
    page.set_viewport_size({"width": 320, "height": 640})
    page.emulate_media(color_scheme="dark")
    open_page(page, served.url, max_tokens=30)
    ask(page, "averylongwordwithoutanyblanks" * 6)
    first, second = page.locator(".answer").evaluate_all(TOPS)
    assert first < second  # one under the other
    last, footer = page.locator(".answer").last.bounding_box(), page.locator("footer").bounding_box()
    assert last["y"] + last["height"] <= footer["y"]  # what is new is seen
    assert page.evaluate("document.documentElement.scrollWidth") == 320
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
    assert page.evaluate("heard('sft', 'Go on.').map(m => m.content)") == ["Tell me a story.", kept, "Go on."]
    expect(page.locator("#message")).to_be_focused()
    running = "fetch('health').then(r => r.json()).then(h => h.models.sft.running + h.models.rlhf.running)"
    page.wait_for_function(f"() => {running}.then(count => count === 0)")
    page.click("#reset")
    assert page.locator(".turn").count() == page.evaluate("chat.turns.length") == 0
    page.fill("#message", "Another one.")
    page.press("#message", "Enter")
    expect(page.locator(".answer .text").first).to_have_text(re.compile(".{6}", re.DOTALL))
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#message")).to_be_focused()


def test_refusals_are_shown_and_a_token_comes_with_the_address(page, model):
    with serving(Service({"sft": model}, LIMITS), token="sec ret", loopback_only=True) as running:
        page.goto(running.url)
        expect(page.locator("#problem")).to_have_text(re.compile("^A token is needed"))
        assert page.locator("#token_field").get_attribute("hidden") is None
        page.goto("about:blank")
        open_page(page, f"{running.url}/#token=sec%20ret", "SFT")
        assert "token" not in page.url
        assert page.input_value("#max_tokens") == "200"  # the most that this server gives
        page.fill("#max_tokens", "9999")
        ask(page, "Hello")
        expect(page.locator("#problem")).to_have_text(re.compile(r"^Most tokens \(max_tokens\): .*200"))
        expect(page.locator("#max_tokens")).to_be_focused()
        page.fill("#max_tokens", "20")
        running.service.is_closing = True
        ask(page, "Hello again")
        expect(page.locator("#problem")).to_have_text("The server is shutting down.")
        page.route("**/v1/**", lambda route: route.abort())
        page.press("#message", "Enter")
        expect(page.locator("#problem")).to_have_text(re.compile("^The server cannot be reached"))
        assert page.input_value("#message") == "Hello again"
        assert page.locator(".turn").count() == page.evaluate("chat.turns.length") == 0


def test_each_chat_has_a_seed_of_its_own_unless_it_is_kept(page, served):
    page.goto(served.url)
    seeds = [page.input_value("#seed")]
    assert page.locator("summary").text_content() == f"Settings (seed {seeds[0]})"
    open_page(page, served.url)
    for _ in range(3):
        page.click("#reset")
        seeds.append(page.input_value("#seed"))
    assert len(set(seeds)) == 4 and all(seed.isdecimal() for seed in seeds)
    page.fill("#seed", "5")
    page.click("#reset")
    assert page.input_value("#seed") == "5" and page.locator("summary").text_content() == "Settings (seed 5)"
    page.uncheck("#keep_seed")
    page.click("#reset")
    assert page.input_value("#seed") != "5"


def test_a_reload_loses_nothing_and_tabs_keep_apart(page, served, endless):
    open_page(page, served.url, temperature=2, seed=1, max_tokens=20, system="Be brief.")
    ask(page, "One")
    page.fill("#max_tokens", "200")
    page.fill("#message", "Two")
    page.click("#send")
    expect(page.locator(".turn").last.locator(".answer .text").first).to_have_text(re.compile(".{6}", re.DOTALL))
    page.fill("#message", "a draft")
    before = texts(page, 0)
    page.reload()
    assert texts(page, 0) == before and texts(page, 1)[0] == "Two" and len(texts(page, 1)[1]) >= 6
    assert page.locator(".turn").last.locator(".note").first.text_content() in ENDED
    assert [page.input_value(f"#{name}") for name in ("message", "seed", "system")] == ["a draft", "1", "Be brief."]
    assert [heard["role"] for heard in page.evaluate("heard('sft', 'x')")] == [
        "system",
        *["user", "assistant"] * 2,
        "user",
    ]
    with page.context.expect_page() as opened:
        page.evaluate("open(location.href, '_blank', 'noopener'), null")
    other = opened.value
    open_page(other, served.url, max_tokens=5)
    assert other.locator(".turn").count() == 0 and other.input_value("#message") == ""
    ask(other, "Three")
    page.reload()
    assert texts(page, 0) == before and page.input_value("#message") == "a draft"
    other.close()
    page.route("**/v1/chat/completions", lambda route: None)  # no answer ever comes
    page.click("#send")
    expect(page.locator(".turn")).to_have_count(3)
    page.reload()
    assert page.locator(".turn").count() == 2 and page.input_value("#message") == "a draft"


def test_the_oldest_turns_go_and_the_page_says_so(page, served):
    open_page(page, served.url, temperature=0, max_tokens=10)
    for number in range(4):
        ask(page, f"{number} word " * 25)
    notes = page.locator(".turn").last.locator(".note").all_text_contents()
    assert all(note.startswith("The conversation is longer than the model's context: its oldest ") for note in notes)
    assert not page.locator(".note.wrong").count() and len(texts(page, 0)[0]) > 100  # they stay in the page


FORMATTED = """\
# Rain
Take *two* of **the _big_ ones**, `a < b` and `<i>`.
2*3*4 and snake_case_name stay, \\*so\\* too.

- one
- two
  1. inner
  2. more
- three

3. third

```python
def f():
    return "<b>" * 2
```
<script>alert(1)</script> <img src=x onerror=alert(1)>
שלום עולם, `x = 1`
مرحبا
```
open"""


def test_code_emphasis_and_lists_are_shown_as_such_and_nothing_runs(page, complaints, served, pictures):
    answer_with(page, FORMATTED, "**bold *" + "`a " * 500 + "*a " * 2000)
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(served.url)
    ask(page, "Show me.")
    assert (
        shown(page, "h4") == ["Rain"]
        and shown(page, "em") == ["two", "big"]
        and shown(page, "strong") == ["the big ones"]
    )
    assert shown(page, "p")[0] == "Take two of the big ones, a < b and <i>.\n2*3*4 and snake_case_name stay, *so* too."
    assert shown(page, "code") == ["a < b", "<i>", 'def f():\n    return "<b>" * 2\n', "x = 1", "open\n"]
    assert shown(page, "> ul > li") == ["one", "twoinnermore", "three"] and shown(page, "ul ol > li") == [
        "inner",
        "more",
    ]
    assert page.locator(".answer ol[start='3']").count() == 2
    assert page.locator(".text :is(script, img, b, i)").count() == 0
    lines = page.locator(".answer:first-child .text > p").last
    assert lines.get_attribute("dir") == "auto" and lines.evaluate(GAP) < 2  # Arabic below English stands at the right
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator(".said").scroll_into_view_if_needed()
    page.screenshot(path=pictures / "page_formatted.png")
    ask(page, "And what never ends.")
    assert complaints == []


def test_by_keyboard_alone(page, complaints, served):
    answer_with(page, "Yes.")
    page.goto(served.url)
    expect(page.locator("#served")).to_have_text("SFT | RLHF")
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("Hello")
    order = []
    for _ in range(2):
        page.keyboard.press("Shift+Tab")
        order.append(page.evaluate("document.activeElement.localName"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert order == ["main", "summary"]
    page.focus("summary")
    page.keyboard.press("Enter")
    names = []
    for _ in range(8):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id || document.activeElement.localName"))
    assert names == ["temperature", "seed", "max_tokens", "keep_seed", "system", "main", "message", "send"]
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text").first).to_have_text("Yes.")
    expect(page.locator("#message")).to_be_focused()
    assert complaints == []
