"""The page on which people say which answer is better, in Chromium, where there is one."""

import json
import re

import pytest
from playwright.sync_api import Page, Route, expect

from tests.inference.serving.conftest import PROMPTS, Judged, both, collecting, serving
from tests.inference.serving.test_page import TOPS

COUNT = "#count"
WALKS = (
    "I went for a walk along the river this morning, and the *first* snow lay on the fields. It was lovely! What do "
    "you do when the sun comes out?",
    "Fine, thanks.",
)


def open_page(page: Page, url: str, name: str = "Ada", **fields: str) -> None:
    page.goto(f"{url}/prefer")
    page.fill("#by", name)
    page.press("#by", "Tab")
    expect(page.locator(COUNT)).to_have_text(re.compile(r"\d+ judged"))
    expect(page.locator("#suggest")).to_be_visible()


def ask(page: Page, message: str = "How was your day?") -> None:
    page.fill("#message", message)
    page.press("#message", "Enter")
    expect(page.locator("#preferences")).to_be_visible()


def answers(page: Page) -> list[str]:
    return page.evaluate("state.pair.answers")


def answer_with(page: Page, *texts: str) -> None:
    """The server's pairs, each of these two texts; their preferences are not known to it."""

    def respond(route: Route) -> None:
        asked = json.loads(route.request.post_data)["messages"] or PROMPTS[0]
        route.fulfill(json={"id": "x", "messages": asked, "answers": texts})

    page.route("**/v1/pairs", respond)


def winners(judged: Judged) -> list[tuple[str, str]]:
    return [(kept.by, kept.winner) for kept in judged.file.read()]


def test_by_mouse(page, complaints, judged, pictures):
    page.set_viewport_size({"width": 1280, "height": 800})
    page.goto(judged.served.url)
    page.click("text=Judge answers")
    told: list[dict] = []
    page.on("response", lambda response: told.append(response.json()) if "/v1/" in response.url else None)
    open_page(page, judged.served.url)
    for number, (button, winner) in enumerate(
        (("1 is better", "a"), ("2 is better", "b"), ("About the same", "tie"), ("Both bad", "both bad")), 1
    ):
        ask(page)
        left, right = page.locator(".answers .answer").evaluate_all(TOPS)
        assert left == right
        assert page.locator(".answers h3").all_text_contents() == ["Answer 1", "Answer 2"]
        shown = answers(page)
        page.click(f"#preferences button:has-text('{button}')")
        expect(page.locator(COUNT)).to_have_text(f"{number} judged")
        kept = judged.file.read()[-1]
        assert (kept.by, kept.winner, [kept.response_a, kept.response_b]) == ("Ada", winner, shown)
        assert kept.prompt == [{"role": "user", "content": "How was your day?"}]
    assert {name for each in told for name in each} == {
        "count",
        "others",
        "suggests",
        "id",
        "messages",
        "answers",
        "kept",
    }
    kept = page.evaluate(
        "JSON.stringify([Object.keys(localStorage), Object.keys(JSON.parse(sessionStorage.prefer).state)])"
    )
    assert json.loads(kept) == [["by"], ["pair", "later", "conversation", "skipped"]]
    assert complaints == []


def test_by_keys_with_undo_and_skip(page, complaints, judged):
    open_page(page, judged.served.url)
    expected = []
    for key, winner in (
        ("1", "a"),
        ("ArrowRight", "b"),
        ("=", "tie"),
        ("0", "both bad"),
        ("ArrowLeft", "a"),
        ("2", "b"),
    ):
        ask(page)
        page.keyboard.press(key)
        expected.append(("Ada", winner))
        expect(page.locator("#message")).to_be_focused()
        assert winners(judged) == expected
    page.locator("#message").press_sequentially("u = 1, 2, s, n")  # what is typed is no preference
    page.keyboard.press("Enter")
    expect(page.locator("#preferences")).to_be_visible()
    assert winners(judged) == expected
    here = answers(page)
    page.keyboard.press("u")
    expect(page.locator("#said")).to_have_text("Taken back: judge it again, or skip it.")
    assert winners(judged) == expected[:-1] and answers(page) != here
    expect(page.locator(COUNT)).to_have_text("5 judged")
    page.keyboard.press("1")
    expect(page.locator(COUNT)).to_have_text("6 judged")
    assert winners(judged) == [*expected[:-1], ("Ada", "a")] and answers(page) == here  # where the person was
    page.keyboard.press("s")
    expect(page.locator("#message")).to_be_focused()
    assert len(winners(judged)) == 6
    page.fill("#by", "Eve")
    page.press("#by", "Tab")
    expect(page.locator(COUNT)).to_have_text("0 judged")
    page.click("#undo")
    expect(page.locator("#problem")).to_have_text("There is no preference of Eve to take back.")
    assert [text for text in complaints if "404" not in text] == []


def test_suggestions_follow_each_other(page, judged):
    open_page(page, judged.served.url)
    page.focus("#send")
    page.keyboard.press("n")
    for number in (1, 2, 3):
        expect(page.locator("#preferences")).to_be_visible()
        first, last = page.locator(".said .text").all_text_contents()
        assert first == "Be brief." and re.fullmatch(r"Number \d\?", last)
        expect(page.locator("[data-winner=a]")).to_be_enabled()
        page.keyboard.press("1")
        expect(page.locator(COUNT)).to_have_text(f"{number} judged")
    assert len({kept.id for kept in judged.file.read()}) == 3
    page.select_option("#then", "write")
    expect(page.locator("#preferences")).to_be_visible()
    page.keyboard.press("2")
    expect(page.locator("#message")).to_be_focused()
    assert page.input_value("#then") == "write"


def test_what_others_have_judged_is_judged_again(page, judged):
    for _ in range(2):
        judged.judge(judged.pair()["id"])
    open_page(page, judged.served.url)
    page.click("#others")
    for number in (1, 2):
        expect(page.locator("[data-winner=a]")).to_be_enabled()
        page.keyboard.press("2")
        expect(page.locator(COUNT)).to_have_text(f"{number} judged")
    expect(page.locator("#problem")).to_have_text("Nothing that others have judged is left for Ada.")
    expect(page.locator("#others")).to_be_hidden()  # used up
    assert page.input_value("#then") == "write"
    kept = judged.file.read()
    assert [each.pair for each in kept[2:]] == [each.pair for each in kept[:2]]
    assert [each.by for each in kept] == ["ada", "ada", "Ada", "Ada"]


def test_two_at_once_judge_what_the_other_judges_without_a_reload(page, judged):
    """What is fetched ahead and thrown away, by a reload, comes again; what was skipped does not."""
    open_page(page, judged.served.url)
    expect(page.locator("#others")).to_be_hidden()
    theirs = [judged.pair() for _ in range(3)]
    for pair in theirs:
        judged.judge(pair["id"], by="Eve")
    ask(page)
    page.keyboard.press("1")
    page.click("#others")
    expect(page.locator("#preferences")).to_be_visible()
    seen = [sorted(answers(page))]
    page.wait_for_function("ahead && ahead.promise.then(() => true)")
    page.reload()
    for key in "s11":
        expect(page.locator("[data-winner=a]")).to_be_enabled()
        seen.append(sorted(answers(page)))
        page.keyboard.press(key)
    expect(page.locator("#problem")).to_have_text("Nothing that others have judged is left for Ada.")
    first, *rest = (sorted(pair["answers"]) for pair in theirs)
    assert seen == [first, first, *rest]
    expect(page.locator(COUNT)).to_have_text("3 judged")
    expect(page.locator("#others")).to_be_hidden()
    judged.judge(judged.pair()["id"], by="Eve")
    page.evaluate("window.dispatchEvent(new Event('focus'))")
    expect(page.locator("#others")).to_be_visible()


def test_going_on_from_the_better_answer(page, judged):
    open_page(page, judged.served.url)
    page.select_option("#then", "on")
    ask(page, "One")
    better = answers(page)[1]
    page.keyboard.press("2")
    expect(page.locator("#restart")).to_be_visible()
    ask(page, "Two")
    assert page.evaluate("state.pair.messages.map(m => m.content)") == ["One", better, "Two"]
    page.reload()  # loses nothing
    assert page.evaluate("state.pair.messages.map(m => m.content)") == ["One", better, "Two"]
    page.keyboard.press("0")
    expect(page.locator("#restart")).to_be_visible()  # as it was before "Two"
    assert page.locator(".said").count() == 1 and len(judged.file.read()[1].prompt) == 3
    page.click("#restart")
    ask(page, "Three")
    assert page.evaluate("state.pair.messages.length") == 1


def test_a_preference_that_is_not_kept_stays_to_be_given_again(page, judged):
    open_page(page, judged.served.url)
    ask(page)
    here = answers(page)
    folder = judged.file.path.parent
    moved = folder.with_name("elsewhere")
    folder.rename(moved)
    folder.write_text("")
    try:
        page.keyboard.press("1")
        expect(page.locator("#problem")).to_have_text(re.compile("^This preference is not kept. .* cannot be written"))
        assert answers(page) == here and page.locator(COUNT).text_content() == "0 judged"
    finally:
        folder.unlink()
        moved.rename(folder)
    page.evaluate("() => { window.reached = fetch; window.fetch = () => Promise.reject(new TypeError()); }")
    page.keyboard.press("1")
    expect(page.locator("#problem")).to_have_text(
        re.compile("^This preference is not kept. The server cannot be reached")
    )
    page.evaluate("() => { window.fetch = reached; }")
    page.keyboard.press("1")
    expect(page.locator(COUNT)).to_have_text("1 judged")
    assert winners(judged) == [("Ada", "a")] and page.locator("#problem").text_content() == ""


def test_a_pair_of_a_server_that_was_started_again(page, judged):
    open_page(page, judged.served.url)
    answer_with(page, "One", "Two")
    ask(page)
    page.keyboard.press("1")
    expect(page.locator("#problem")).to_have_text(re.compile("^The server does not know these two answers any more"))
    page.keyboard.press("s")
    expect(page.locator("#message")).to_be_focused()
    assert winners(judged) == []


def test_a_name_comes_first_and_is_remembered(page, judged):
    page.goto(f"{judged.served.url}/prefer")
    expect(page.locator("#by")).to_be_focused()
    page.fill("#message", "Hello")
    page.press("#message", "Enter")
    expect(page.locator("#problem")).to_have_text("Say who judges: your name comes first.")
    expect(page.locator("#by")).to_be_focused()
    open_page(page, judged.served.url, "Zoë")
    page.goto("about:blank")
    page.goto(f"{judged.served.url}/prefer")
    expect(page.locator("#suggest")).to_be_visible()
    assert page.input_value("#by") == "Zoë" and page.input_value("#message") == "Hello"
    ask(page)
    page.locator("[data-winner=a]").click()
    expect(page.locator(COUNT)).to_have_text("1 judged")
    assert winners(judged) == [("Zoë", "a")]


def test_stop_gives_the_message_back(page, judged):
    open_page(page, judged.served.url)
    page.route("**/v1/pairs", lambda route: None)  # no answer ever comes
    page.fill("#message", "Hello")
    page.press("#message", "Enter")
    expect(page.locator("#stop")).to_be_visible()
    assert page.locator(".answer[aria-busy=true]").count() == 2
    page.keyboard.press("Escape")
    expect(page.locator("#stop")).to_be_hidden()
    assert page.input_value("#message") == "Hello" and page.locator("#problem").text_content() == ""


@pytest.mark.parametrize(("width", "height", "is_phone"), [(1280, 800, False), (390, 844, True), (320, 640, True)])
def test_on_a_desktop_and_on_a_phone_in_the_dark(chromium, served, pictures, width, height, is_phone):
    page = chromium.new_page(
        viewport={"width": width, "height": height},
        color_scheme="dark" if is_phone else "light",
        is_mobile=is_phone,
        has_touch=is_phone,
    )
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    open_page(page, served.url)
    page.screenshot(path=pictures / f"prefer_{width}_ask.png")
    answer_with(page, *WALKS)
    ask(page)
    first, second = page.locator(".answers .answer").evaluate_all(TOPS)
    assert first < second if is_phone else first == second
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("#preferences kbd").first.is_visible() != is_phone
    for button in page.locator("footer button:visible").all():
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= height
        assert not button.get_attribute("data-winner") or box["height"] >= 44  # for a thumb
    last, footer = page.locator(".answers .answer").last.bounding_box(), page.locator("footer").bounding_box()
    assert last["y"] + last["height"] < footer["y"] + 1  # the end of both is seen
    unnamed = "fields => fields.filter(field => !field.labels.length).length"
    assert page.locator("input, textarea, select").evaluate_all(unnamed) == 0
    page.screenshot(path=pictures / f"prefer_{width}.png")
    assert complaints == []
    page.context.close()


def test_tabs_reach_every_button(page, judged):
    open_page(page, judged.served.url)
    ask(page)
    names = []
    for _ in range(9):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.dataset.winner || document.activeElement.id"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid" or not names[-1]
    assert names[:7] == ["a", "b", "tie", "both bad", "undo", "skip", "then"]
    page.focus("[data-winner=b]")
    page.keyboard.press("Enter")
    expect(page.locator(COUNT)).to_have_text("1 judged")
    assert winners(judged) == [("Ada", "b")]


def test_a_server_that_keeps_no_preferences_says_so(page, model):
    with serving(both(model)) as running:
        page.goto(running.url)
        expect(page.locator("h1")).to_have_text("rlhf-chat")
        assert page.locator("text=Judge answers").count() == 0
        page.goto(f"{running.url}/prefer")
        expect(page.locator("body")).to_have_text(re.compile("^This server keeps no preferences: start it with"))


def test_a_token_is_asked_for_and_comes_from_the_chat_page(page, model, tmp_path):
    with serving(both(model), collecting=collecting(tmp_path / "file"), token="secret") as running:
        page.goto(f"{running.url}/prefer")
        page.fill("#by", "Ada")
        page.press("#by", "Tab")
        expect(page.locator("#token_field")).to_be_visible()
        page.goto("about:blank")
        page.goto(f"{running.url}/#token=secret")
        page.click("text=Judge answers")
        expect(page.locator(COUNT)).to_have_text("0 judged")
