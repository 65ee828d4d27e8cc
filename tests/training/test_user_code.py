"""A reward file is loaded as `python mine.py` would, and what it does wrong is a sentence."""

import importlib.util
import os
import pickle
import py_compile
import sys

import pytest
import torch

from inference.errors import UserError
from rlhf_chat import HOME
from training.reward_sources import RewardFailed, RewardFunction

PROMPTS, RESPONSES, ROWS = [[{"role": "user", "content": "Which?"}]] * 2, ["a red one", "none"], [{}, {}]


@pytest.fixture(autouse=True)
def modules_as_before(tmp_path):
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path):
    """With a blank in its name, and a helper beside the file."""
    folder = tmp_path / "my rewards"
    folder.mkdir()
    (folder / "words_of_mine.py").write_text("WORDS = ['red']\n")
    return folder


def scores(folder, body: str, name: str = "of_mine.py") -> list[float]:
    (folder / name).write_text(body)
    return RewardFunction(f"{folder / name}:score").scores(PROMPTS, RESPONSES, ROWS)


COUNT = (
    "def score(prompts, responses):\n    return [float(any(word in text for word in WORDS)) for text in responses]\n"
)


@pytest.mark.parametrize(
    "begin",
    [
        "from words_of_mine import WORDS\n",
        "from .words_of_mine import WORDS\n",  # as in a folder that is a package
        "import os, sys\nWORDS = ['red'] * os.path.samefile(os.path.dirname(__file__), sys.path[0])\n",
        "import os\nWORDS = open(os.path.join(os.path.dirname(__file__), 'words_of_mine.py')).read()[10:13].split()\n",
        "if __name__ == '__main__':\n    raise SystemExit\nWORDS = ['red']\n",
        "# -*- coding: latin-1 -*-\nWORDS = ['red']\n",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Rule:\n"
        "    words: list[str]\n    weight: float = 1.0\nWORDS = Rule(['red']).words\n",
        "import typing\nclass Rule(typing.NamedTuple):\n    word: 'str'\n"
        "typing.get_type_hints(Rule)\nWORDS = ['red']\n",
    ],
)
def test_what_python_would_find_is_found(folder, begin):
    assert scores(folder, begin + COUNT) == [1.0, 0.0]


def test_what_is_imported_in_the_call_is_found_too_and_the_path_stays_ours(folder):
    before = list(sys.path)
    body = "def score(p, r):\n    from words_of_mine import WORDS\n    return [len(WORDS)] * len(r)\n"
    assert scores(folder, body) == [1.0, 1.0]
    assert sys.path == before


def test_what_it_adds_to_the_path_stays(folder, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "deep_of_mine.py").write_text("VALUE = 7\n")
    body = (
        f"import sys\nsys.path.append({str(tmp_path / 'lib')!r})\n"
        "def score(p, r):\n    from deep_of_mine import VALUE\n    return [VALUE] * len(r)\n"
    )
    try:
        assert scores(folder, body) == [7.0, 7.0]
    finally:
        sys.path.remove(str(tmp_path / "lib"))


def test_its_own_working_directory_is_not_ours(folder):
    here = os.getcwd()
    body = (
        "import os\nos.chdir(os.path.dirname(__file__))\n"
        "def score(p, r):\n    return [float('red' in open('words_of_mine.py').read())] * len(r)\n"
    )
    assert scores(folder, body) == [1.0, 1.0] and os.getcwd() == here


def test_a_directory_that_it_removes_under_itself_is_nobodys(folder):
    here = os.getcwd()
    body = (
        "import os, tempfile\n"
        "def score(p, r):\n"
        "    with tempfile.TemporaryDirectory() as place:\n        os.chdir(place)\n    return [1.0] * len(r)\n"
    )
    assert scores(folder, body) == [1.0, 1.0] and os.getcwd() == here


def test_the_command_line_is_that_of_the_file_alone(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "runs/demo"])
    body = (
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--weight', type=float, default=2)\n"
        "WEIGHT = parser.parse_args().weight\n"
        "def score(p, r):\n    return [WEIGHT + parser.parse_args().weight] * len(r)\n"
    )
    assert scores(folder, body) == [4.0, 4.0] and sys.argv == ["main.py", "runs/demo"]


def test_what_it_sets_in_torch_is_for_itself(folder):
    body = (
        "import torch\ntorch.set_grad_enabled(False)\ntorch.set_default_dtype(torch.float64)\n"
        "torch.set_default_device('meta')\n"
        "def score(p, r):\n    made = torch.ones(1)\n"
        "    return [float(torch.is_grad_enabled()), float(made.is_meta and made.dtype == torch.float64)]\n"
    )
    assert scores(folder, body) == [0.0, 1.0]
    made = torch.ones(1)
    assert torch.is_grad_enabled() and made.dtype == torch.float32 and made.device.type == "cpu"


def test_its_functions_go_through_pickle_and_a_pool_of_processes(folder):
    body = (
        "import multiprocessing\nfrom concurrent.futures import ProcessPoolExecutor\nclass Rule:\n    word = 'red'\n"
        "def one(text):\n    return float(Rule().word in text)\n"
        "def score(p, r):\n"
        "    with ProcessPoolExecutor(1, multiprocessing.get_context('fork')) as pool:\n"
        "        return list(pool.map(one, r))\n"
    )
    assert scores(folder, body, "pool_of_mine.py") == [1.0, 0.0]
    rule = sys.modules["pool_of_mine"].Rule
    assert type(pickle.loads(pickle.dumps(rule()))) is rule


@pytest.mark.parametrize("name", ["json.py", "torch.py", "training.py", "rewards.v2.py", "my-reward.py"])
def test_its_name_may_be_one_that_is_taken(folder, name):
    taken = {each: sys.modules.get(each) for each in ("json", "torch", "training")}
    body = "from words_of_mine import WORDS\nclass Rule:\n    pass\n" + COUNT
    assert scores(folder, body, name) == [1.0, 0.0]
    assert {each: sys.modules.get(each) for each in taken} == taken


def test_a_file_that_was_changed_is_loaded_anew(folder):
    for value in (1, 2):  # of one size, within one second: compiled code beside it would be taken for the same
        assert scores(folder, f"def score(p, r): return [{value}.0] * len(r)\n") == [value, value]
    assert not (folder / "__pycache__").exists()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("import sys\nsys.exit(3)\n", "cannot be loaded .it ended the program, sys.exit.3."),
        ("def score(p, r):\n    exit()\n", "failed .it ended the program, sys.exit.."),
        ("class Stop(BaseException): pass\ndef score(p, r):\n    raise Stop('now')\n", "failed .Stop: now."),
        ("def score(p, r)\n    return 1\n", r"cannot be loaded .SyntaxError: .*of_mine.py, line 1"),
        ("from .. import above\n", "cannot be loaded .ImportError: attempted relative import"),
        ("def score(p): return [0.0]\n", r"is defined as score\(p\); it must take \(prompts, responses\) or"),
        ("def score(p, r, rows, model): return [0.0]\n", r"is defined as score\(p, r, rows, model\); it must take"),
        ("def score(p, r, *, words): return [0.0]\n", "it must take"),
        ("async def score(p, r): return [0.0, 1.0]\n", "must return a list of numbers"),
        ("def score(p, r): return '12'\n", "must return a list of numbers, not '12'"),
        ("def score(p, r): return {0: 1.0, 1: 2.0}\n", "must return a list of numbers"),
        ("def score(p, r): return {1.0, 2.0}\n", "must return a list of numbers"),
        ("def score(p, r): return frozenset((1.0, 2.0))\n", "must return a list of numbers"),
        ("def score(p, r): return [None, 1.0]\n", "must return a list of numbers"),
        ("def score(p, r): return [10**400, 1.0]\n", "must return a list of numbers"),
        ("import torch\ndef score(p, r): return torch.zeros(2, 2)\n", "must return a list of numbers"),
        ("def score(p, r):\n    yield 1.0\n    raise KeyError('late')\n", "failed .KeyError: 'late'"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_what_is_wrong_with_it_is_one_sentence(folder, body, sentence):
    with pytest.raises(UserError, match=sentence) as raised:
        scores(folder, body)
    assert str(folder / "of_mine.py") in str(raised.value) and "\n" not in str(raised.value)
    assert "of_mine" not in sys.modules or "cannot be loaded" not in sentence


def test_ctrl_c_in_it_is_ours(folder):
    with pytest.raises(KeyboardInterrupt):
        scores(folder, "def score(p, r):\n    raise KeyboardInterrupt\n")


@pytest.mark.parametrize(
    ("signature", "given"),
    [
        ("p, r", 2),
        ("p, r, rows", 3),
        ("p, r, extras", 3),
        ("p, r, rows=None", 3),
        ("p, r, extras=None", 3),
        ("p, r, *, rows", 3),
        ("p, r, weight=1.0, rows=None", 3),
        ("p, r, rows, /", 3),
        ("p, r, table=numpy.zeros(2)", 2),
        ("*all", 3),
        ("p, r, weight=1.0", 2),  # rows would be multiplied
        ("p, r, **others", 2),
    ],
)
def test_rows_go_to_a_function_that_takes_them(folder, signature, given):
    body = f"import numpy\ndef score({signature}):\n"
    body += "    found = locals()\n    return [sum(map(is_rows, found.values()))] * 2\n"
    body += "def is_rows(value):\n    kind = type(value)\n"
    body += "    return kind is list and value == [{}, {}] or kind is tuple and len(value) == 3\n"
    assert scores(folder, body) == [float(given == 3)] * 2


@pytest.mark.parametrize(
    "result", ["iter([1, 2])", "(x for x in (1, 2))", "numpy.array([1, 2])", "torch.tensor([1, 2])", "(True, 2)"]
)
def test_any_row_of_numbers_will_do(folder, result):
    assert scores(folder, f"import numpy, torch\ndef score(p, r): return {result}\n") == [1.0, 2.0]


def test_what_it_changes_is_its_own(folder):
    prompts, rows = [[{"role": "user", "content": "Which?"}] for _ in range(2)], [{"answer": 1.0}, {"answer": 2.0}]
    body = "def score(p, r, rows):\n    p[0].clear()\n    r.pop()\n    return [row.pop('answer') for row in rows]\n"
    (folder / "of_mine.py").write_text(body)
    function = RewardFunction(f"{folder}/of_mine.py:score")
    for _ in range(2):  # the second iteration sees the same rows
        assert function.scores(prompts, list(RESPONSES), rows) == [1.0, 2.0]
    assert prompts[0] and rows == [{"answer": 1.0}, {"answer": 2.0}]


def test_an_error_of_one_rank_reaches_the_others(folder):
    with pytest.raises(RewardFailed) as raised:
        scores(folder, "def score(p, r):\n    exit(1)\n")
    assert "exit(1)" in pickle.loads(pickle.dumps(raised.value)).__notes__[0]


@pytest.mark.parametrize(
    "body",
    [
        "from training import rate",
        "from training.rating import rate",
        "import training\nrate = training.rate",
        "def rate(text):\n    import training\n    return training.rate(text)",
    ],
)
def test_its_own_package_with_the_name_of_one_of_ours(folder, body):
    theirs = folder / "training"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("rate = len\n")
    with pytest.raises(
        UserError, match=rf"asks for training, .*, {HOME}/training, and not {theirs}: give your package"
    ):
        scores(folder, f"{body}\ndef score(prompts, responses):\n    return [rate(text) for text in responses]")


@pytest.mark.parametrize("module", ["words_of_mine", "package.words"])
def test_what_runs_is_the_source_not_what_was_compiled_of_another(folder, module):
    """Python would take a file in __pycache__ that says it need not be checked, or one without a source."""
    source = folder / f"{module.replace('.', '/')}.py"
    source.parent.mkdir(exist_ok=True)
    other = folder / "other.py"
    other.write_text("raise SystemExit('something else ran')")
    for compiled in (importlib.util.cache_from_source(source), folder / "alone.pyc"):
        py_compile.compile(str(other), compiled, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    source.write_text("WORDS = ['red']\n")
    assert scores(folder, f"from {module} import WORDS\n" + COUNT) == [1.0, 0.0]
    with pytest.raises(UserError, match="No module named 'alone'"):
        scores(folder, "import alone\n" + COUNT, "second.py")
    assert not list(folder.glob("__pycache__/of_mine*"))
