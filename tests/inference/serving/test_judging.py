"""Two answers and a preference between them, through the server's own paths."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from inference.preferences import Preference
from inference.serving import judging
from inference.serving.service import Service
from tests.full_disk import small_disk
from tests.inference.serving.conftest import LIMITS, MESSAGES, PROMPTS, Judged, alone, both, collecting, hold, serving


def test_a_preference_is_in_the_file_with_all_that_led_to_it(judged, model):
    pair = judged.pair()
    judged.judge(pair["id"], "b", " Ada  L. ")
    (kept,) = judged.file.read()
    assert (kept.by, kept.winner, kept.prompt, kept.temperature, kept.max_tokens) == ("Ada L.", "b", MESSAGES, 0.9, 8)
    assert [kept.response_a, kept.response_b] == pair["answers"] and {kept.model_a, kept.model_b} == {
        "demo/sft",
        "demo/rlhf",
    }
    for text, seed in ((kept.response_a, kept.seed_a), (kept.response_b, kept.seed_b)):  # can be drawn again
        assert text == alone(model, seed, temperature=0.9, top_p=1.0, max_tokens=8)
    assert judged.count("Ada L.") == 1 and judged.count("bob") == 0


def test_sides_are_drawn_and_no_answer_tells_a_model(judged):
    with ThreadPoolExecutor(8) as people:
        pairs = list(people.map(lambda _: judged.pair(), range(40)))
    for pair in pairs:
        assert set(pair) == {"id", "messages", "answers"} and pair["messages"] == MESSAGES
        judged.judge(pair["id"])
    left = [preference.model_a for preference in judged.file.read()]
    assert 5 <= left.count("demo/sft") <= 35  # else: once in two million


def test_suggestions_come_in_turn(judged):
    given = [judged.pair([])["messages"] for _ in range(3)]
    assert given[0] in PROMPTS and given[1] in PROMPTS and given[0] != given[1] and given[2] == given[0]


def test_undo_gives_the_newest_back_to_be_judged_again(judged):
    first, second = judged.pair(), judged.pair()
    judged.judge(first["id"])
    judged.judge(second["id"], by="bob")
    again = judged.undo()
    assert again["answers"] == first["answers"] and again["messages"] == MESSAGES
    assert [preference.by for preference in judged.file.read()] == ["bob"]
    assert judged.undo(status=404)["message"] == "There is no preference of ada to take back."
    judged.judge(again["id"], "tie")
    assert [(kept.by, kept.winner) for kept in judged.file.read()] == [("bob", "a"), ("ada", "tie")]
    assert judged.judge(first["id"], status=404)["code"] == "pair_not_found"  # its preference was taken back


def test_a_second_person_judges_what_others_have_judged(judged):
    pairs = [judged.pair() for _ in range(3)]
    for pair in pairs:
        judged.judge(pair["id"])
    judged.judge(judged.ask("POST", "pairs", json={"unjudged_by": "bob"})["id"], "b", "bob")
    assert judged.ask("GET", "preferences", params={"by": "bob"}) == {"count": 1, "others": 2, "suggests": True}
    second, third = (sorted(pair["answers"]) for pair in pairs[1:])
    for _ in range(2):  # what was fetched and thrown away is given again
        looked_at = judged.ask("POST", "pairs", json={"unjudged_by": "bob", "skip": ["unknown"]})
        assert sorted(looked_at["answers"]) == second
        ahead = judged.ask("POST", "pairs", json={"unjudged_by": "bob", "skip": [looked_at["id"]]})
        assert sorted(ahead["answers"]) == third
    sides = {tuple(judged.ask("POST", "pairs", json={"unjudged_by": f"{n}"})["answers"]) for n in range(20)}
    assert len(sides) == 2  # of the first pair; else once in 500,000
    for by in ("ada", "bob"):
        error = judged.ask("POST", "pairs", 404, json={"unjudged_by": by, "skip": [looked_at["id"], ahead["id"]]})
        assert error["message"] == f"Nothing that others have judged is left for {by}."
    kept = judged.file.read()
    assert kept[0].pair == kept[3].pair and (kept[3].by, kept[3].winner) == ("bob", "b")


def test_a_preference_sent_twice_counts_once(judged):
    pair = judged.pair()["id"]
    with ThreadPoolExecutor(4) as preferences:
        list(preferences.map(lambda _: judged.judge(pair), range(4)))
    assert len(judged.file.read()) == 1
    assert (
        judged.judge(pair, "b", status=409)["message"]
        == "Which of these two is better was said already; undo it first."
    )


def test_ten_people_at_once(judged):
    def preference(person: int) -> None:
        for winner in ("a", "b", "both bad"):
            judged.judge(judged.pair()["id"], winner, f"person {person}")

    with ThreadPoolExecutor(10) as people:
        list(people.map(preference, range(10)))
    kept = [(each.by, each.winner) for each in judged.file.read()]
    assert sorted(kept) == [(f"person {n}", winner) for n in range(10) for winner in ("a", "b", "both bad")]


def test_what_cannot_be_a_preference_or_a_message(judged):
    pair = judged.pair()["id"]
    assert judged.judge(pair, by="  ", status=400)["message"].startswith("Say who judges: a name of 1 to 80")
    assert judged.judge(pair, "left", status=400)["param"] == "winner"
    assert judged.judge("unknown", status=404)["message"].startswith("The server does not know these two answers any")
    assert judged.ask("POST", "pairs", 400, json={"model": "sft"})["code"] == "unknown_parameter"
    assert judged.ask("POST", "pairs", 400, content=b"[]", headers={"content-type": "application/json"})
    assert judged.ask("POST", "preferences", 415, content=b"{}", headers={"content-type": "text/plain"})
    for said in ([{"role": "assistant", "content": "x"}], [{"role": "user", "content": " "}]):
        assert judged.pair(said, 400)["message"] == "messages: the last one must be what a user says."
    long = judged.pair([{"role": "user", "content": "word " * 600}], 400)
    assert long["code"] == "context_length_exceeded"
    assert judged.ask("PUT", "preferences", 405)
    assert judged.file.read() == []


def test_pairs_that_nobody_judges_are_forgotten(judged, monkeypatch):
    monkeypatch.setattr(judging, "MOST_PAIRS", 2)
    pairs = [judged.pair()["id"] for _ in range(3)]
    assert judged.judge(pairs[0], status=404)["code"] == "pair_not_found"
    judged.judge(pairs[1])
    judged.judge(pairs[2])
    assert len(judged.file.read()) == 2


def test_equal_answers_are_drawn_again_and_then_refused(model, tmp_path, monkeypatch):
    """At temperature 0 both are always the same."""
    setup, begun = collecting(tmp_path / "file", temperature=0.0), []
    begin = Service.begin
    monkeypatch.setattr(Service, "begin", lambda self, request: begun.append(request) or begin(self, request))
    with serving(both(model), collecting=setup) as running:
        refused = Judged(running).pair(status=422)
    assert (
        refused["message"] == "Both answers were the same, or one was empty, 3 times: say something else."
        and len(begun) == 6
    )


def test_a_busy_server_says_so_and_frees_the_other_answer(model, tmp_path, monkeypatch):
    setup = collecting(tmp_path / "file")
    with serving(both(model), collecting=setup) as running:
        here = Judged(running)
        running.service.served["rlhf"].taken = LIMITS.capacity
        assert here.pair(status=429)["code"] == "busy"
        running.service.served["rlhf"].taken = 0
        assert here.pair() and running.service.served["sft"].taken == 0


def test_a_client_that_leaves_frees_both_slots(judged, monkeypatch):
    go = hold(monkeypatch, lambda batch: True)
    with pytest.raises(httpx.ReadTimeout):
        judged.ask("POST", "pairs", json={"messages": MESSAGES}, timeout=httpx.Timeout(60, read=1))
    models = judged.served.service.served.values()
    deadline = time.monotonic() + 60
    while any(model.taken for model in models):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    go.set()


def test_a_full_disk_keeps_the_pair_for_another_try(model, tmp_path):
    with small_disk(tmp_path / "disk", 8) as make_room:
        setup = collecting(tmp_path / "disk" / "preferences.jsonl")
        with serving(both(model), collecting=setup) as running:
            here = Judged(running)
            (tmp_path / "disk" / "ballast").write_bytes(b"x" * 2**13)
            pair = here.pair()["id"]
            refused = here.judge(pair, status=507)
            assert refused["message"].endswith("could not be written: make room, then judge it again.")
            make_room(64)
            here.judge(pair)
            assert [kept.by for kept in setup.file.read()] == ["ada"]


def test_a_damaged_file_is_named_and_still_takes_preferences_but_one_of_another_kind_does_not(judged):
    judged.judge(judged.pair()["id"])
    first = judged.file.path.read_text()
    judged.file.path.write_text(first + "{}\n")
    error = judged.ask("GET", "preferences", 500, params={"by": "ada"})
    assert "line 2, is no preference" in error["message"]
    judged.judge(judged.pair()["id"])
    assert Preference.of(judged.file.path.read_text().splitlines()[2]).by == "ada"
    judged.file.path.write_text("# Notes\n")
    assert "is no file of preferences" in judged.judge(judged.pair()["id"], status=500)["message"]
    assert judged.file.path.read_text() == "# Notes\n"


def test_a_server_that_keeps_none_says_how(model):
    calls = ("POST", "pairs"), ("GET", "preferences"), ("POST", "preferences"), ("DELETE", "preferences")
    with serving(Service({"sft": model}, LIMITS)) as running:
        errors = [Judged(running).ask(method, path, 404) for method, path in calls]
    for error in errors:
        assert (
            error["message"]
            == "This server keeps no preferences: start it with rlhf-chat serve MODEL --preferences FILE."
        )


def test_a_token_is_asked_for_here_too(model, tmp_path):
    setup = collecting(tmp_path / "file")
    with serving(both(model), collecting=setup, token="secret") as running:
        here = Judged(running)
        assert here.ask("POST", "pairs", 401, json={})["code"] == "invalid_api_key"
        assert here.ask("GET", "preferences", 401, params={"by": "ada"})
        assert httpx.get(f"{running.url}/prefer").status_code == 200
        assert httpx.get(f"{running.url}/prefer", headers={"host": "model.example.org"}).status_code == 403
