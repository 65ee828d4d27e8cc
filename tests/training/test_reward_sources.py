"""Scores of a function and of an address."""

import json
import pickle
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from inference.errors import UserError
from training import reward_sources
from training.reward_sources import ProxiesForOthers, RewardEndpoint, RewardFailed, RewardFunction, is_this_machine

PROMPTS = [[{"role": "user", "content": text}] for text in ("two words", "three short words")]
RESPONSES = ["yes", "no no"]
ROWS = [{"answer": 3}, {}]


def write(tmp_path, body: str, name: str = "score") -> str:
    file = tmp_path / "mine.py"
    file.write_text(body)
    return f"{file}:{name}"


def test_a_function_gets_messages_and_texts_and_rows_if_it_takes_them(tmp_path):
    two = write(tmp_path, "def score(prompts, responses):\n return [len(p[0]['content']) for p in prompts]")
    assert RewardFunction(two).scores(PROMPTS, RESPONSES, ROWS) == [9.0, 17.0]
    three = write(
        tmp_path, "def score(p, r, rows):\n return [row.get('answer', 0) + len(t) for t, row in zip(r, rows)]"
    )
    assert RewardFunction(three).scores(PROMPTS, RESPONSES, ROWS) == [6.0, 5.0]


@pytest.mark.parametrize(
    ("body", "name", "sentence"),
    [
        ("import nothing_of_that_name", "score", "cannot be loaded .ModuleNotFoundError"),
        ("x = 1", "score", "has no function score"),
        ("x = 1", "x", "has no function x"),
    ],
)
def test_a_function_that_cannot_be_had_is_refused_at_once(tmp_path, body, name, sentence):
    with pytest.raises(UserError, match=sentence):
        RewardFunction(write(tmp_path, body, name))


def test_a_file_that_there_is_not():
    with pytest.raises(UserError, match=r"there is no file nowhere\.py"):
        RewardFunction("nowhere.py:score")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("raise KeyError('gold')", "failed .KeyError: 'gold'"),
        ("return [1.0]", "returned 1 scores for 2 responses"),
        ("return None", "must return a list of numbers"),
        ("return ['a', 'b']", "must return a list of numbers"),
        ("return [1.0, float('nan')]", "returned nan"),
    ],
)
def test_what_a_function_does_wrong_is_a_sentence_that_names_it(tmp_path, body, sentence):
    spec = write(tmp_path, f"def score(prompts, responses):\n    {body}\n")
    with pytest.raises(RewardFailed, match=sentence) as raised:
        RewardFunction(spec).scores(PROMPTS, RESPONSES, ROWS)
    assert spec in str(raised.value) and "\n" not in str(raised.value)


def test_the_traceback_goes_with_the_error_to_other_ranks(tmp_path):
    spec = write(tmp_path, "def score(prompts, responses):\n    return 1 / 0\n")
    with pytest.raises(RewardFailed) as raised:
        RewardFunction(spec).scores(PROMPTS, RESPONSES, ROWS)
    assert "return 1 / 0" in pickle.loads(pickle.dumps(raised.value)).__notes__[0]


@pytest.fixture
def endpoint(monkeypatch):
    """A server that gives the answers in `answers` one after another; what it was asked is in `asked`."""
    pauses: list[float] = []
    monkeypatch.setattr(reward_sources.time, "sleep", pauses.append)
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.paths.append(self.path)
            self.headers_of.append(self.headers)
            status, body = self.answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_):
            pass

    Handler.answers, Handler.asked, Handler.pauses = [], [], pauses
    Handler.paths, Handler.headers_of = [], []
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    Handler.url = f"http://127.0.0.1:{server.server_port}/score"
    yield Handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_address_is_asked_again_until_it_answers(endpoint):
    endpoint.answers = [(503, {}), (500, {}), (200, {"scores": [0.5, 2]})]
    assert RewardEndpoint(endpoint.url, 5, retries=2).scores(PROMPTS, RESPONSES, ROWS) == [0.5, 2.0]
    assert endpoint.asked == [{"prompts": PROMPTS, "responses": RESPONSES, "rows": ROWS}] * 3
    assert endpoint.pauses == [1.0, 2.0]


@pytest.mark.parametrize(
    ("answers", "tries", "sentence"),
    [
        ([(503, {})] * 3, 3, "HTTP 503 .*3 tries"),
        ([(404, {})] * 3, 1, "HTTP 404 .*1 tries"),
        ([(200, b"<html>")], 1, "must answer .* not '<html>'"),
        ([(200, {"score": [1, 2]})], 1, "must answer"),
        ([(200, {"scores": [1]})], 1, "1 scores for 2 responses"),
    ],
)
def test_an_address_that_gives_no_scores_is_named_in_a_sentence(endpoint, answers, tries, sentence):
    endpoint.answers = list(answers)
    with pytest.raises(RewardFailed, match=sentence) as raised:
        RewardEndpoint(endpoint.url, 5, retries=2).scores(PROMPTS, RESPONSES, ROWS)
    assert endpoint.url in str(raised.value) and len(endpoint.asked) == tries


def test_an_address_where_nobody_listens(monkeypatch):
    monkeypatch.setattr(reward_sources.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(RewardFailed, match=r"refused.*2 tries"):
        RewardEndpoint("http://127.0.0.1:9/score", 1, retries=1).scores(PROMPTS, RESPONSES, ROWS)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "LOCALHOST.", "[::1]", "[::ffff:127.0.0.1]", "a.localhost"]
)
def test_a_service_of_this_machine_is_not_asked_through_a_proxy(host):
    request = urllib.request.Request(f"http://{host}:80/score")
    assert is_this_machine(request.host)
    assert ProxiesForOthers().proxy_open(request, "http://proxy:3128", "http") is None and not request.has_proxy()


@pytest.mark.parametrize(
    "host", ["reward.example.org", "10.0.0.7", "localhost.example.org", "[2001:db8::1]", "127.0.0.1.nip.io"]
)
def test_other_services_are(host):
    request = urllib.request.Request(f"http://{host}/score")
    ProxiesForOthers().proxy_open(request, "http://proxy:3128", "http")
    assert request.has_proxy() and request.host == "proxy:3128"


def test_a_proxy_of_the_environment_is_left_aside(endpoint, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    endpoint.answers = [(200, {"scores": [0.5, 2.0]})]
    assert RewardEndpoint(endpoint.url, 5, retries=0).scores(PROMPTS, RESPONSES, ROWS) == [0.5, 2.0]
