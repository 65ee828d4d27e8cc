"""Talking to a tiny model with random weights: through a pipe, in a terminal, and what is refused."""

import contextlib
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig

from inference.chat import Session, Terminal, change_settings, chat, check_settings
from inference.chat_format import ChatFormat, Prompt
from inference.chat_model import ChatModel
from inference.chat_target import find_chat_models, refuse_reward_model
from inference.errors import UserError
from inference.generation.sampler import OwnSample, Sample, SamplingKey, SamplingSettings
from inference.model_store import check_model_directory
from inference.serving.answers import Completion
from inference.serving.service import ContinuousBatch
from inference.streams import EXIT_READER_GONE, guard_output, printable
from tests.inference.templates import CHATML, Family, bytes_tokenizer

SETTINGS = SamplingSettings(max_tokens=24, temperature=0.7, top_p=0.95)
WILD = SamplingSettings(max_tokens=60, temperature=1.0)  # the random model then writes raw bytes
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tiny_model_directory) -> ChatModel:
    return ChatModel.load(tiny_model_directory)


@pytest.fixture
def damaged(tiny_model_directory, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model_directory, tmp_path / "damaged"))


class TypedLines(io.StringIO):
    """A terminal: what the user types, or what is shown."""

    def isatty(self) -> bool:
        return True


def user(text: str) -> list:
    return [{"role": "user", "content": text}]


def through_pipe(models, text: str, settings=SETTINGS, seed=1, system=None) -> str:
    sink = io.StringIO()
    chat(models, settings, seed, system, io.StringIO(text), sink)
    return sink.getvalue()


def in_terminal(models, *lines: str, settings=SETTINGS, seed=1, system=None) -> str:
    sink = TypedLines()
    chat(models, settings, seed, system, TypedLines("".join(line + "\n" for line in lines)), sink)
    return sink.getvalue()


class Echo(ChatModel):
    """Has no model: says what it was asked, so that a test sees histories and turns."""

    def __init__(self, name: str = "echo"):
        self.name = name
        self.asked: list[list[dict]] = []

    @property
    def description(self):
        return "an echo"

    def prompt(self, messages, settings):
        return Prompt([0])

    def reply(self, messages, settings, seed, turn):
        self.asked.append(list(messages))
        yield f"{self.name} "
        yield f"{messages[-1]['content']}/{turn}"


# Streaming


def test_pieces_join_to_the_decoded_whole_and_never_break_a_character(model):
    for turn in range(8):
        (sample,) = model.engine.generate(
            [torch.tensor(model.format.prompt_ids(user("hi")))], WILD, SamplingKey(3, turn)
        )
        pieces = list(model.reply(user("hi"), WILD, seed=3, turn=turn))
        assert "".join(pieces) == model.format.decode(sample.response_ids)
        assert all(pieces)


class ScriptedEngine:
    def __init__(self, token_ids: list[int]):
        self.token_ids = token_ids
        self.prompts: list[torch.Tensor] = []

    def stream(self, prompt, settings, key, index=0):
        self.prompts.append(prompt)
        sample = Sample(index, prompt, settings.max_tokens)
        for token in self.token_ids[: settings.max_tokens]:
            sample.response_ids.append(token)
            yield sample


def test_emoji_and_cjk_come_whole(model, monkeypatch):
    text = "Hi 🙂🇩🇪 你好, naïve"
    ids = model.format.response_ids(text)
    assert len(ids) > len(text)  # the characters are split into bytes
    monkeypatch.setattr(model, "engine", ScriptedEngine(ids))
    pieces = list(model.reply(user("x"), SamplingSettings(max_tokens=100), 1, 0))
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_at_the_end_is_not_lost(model, monkeypatch):
    ids = model.format.response_ids("ok 🙂")[:-2]  # without the end token and the last byte
    monkeypatch.setattr(model, "engine", ScriptedEngine(ids))
    pieces = list(model.reply(user("x"), SamplingSettings(max_tokens=100), 1, 0))
    assert "".join(pieces) == model.format.decode(ids) == "ok \ufffd"


def test_seed_and_turn_decide_the_answer(model):
    def answer(seed: int, turn: int) -> str:
        return "".join(model.reply(user("Hello"), WILD, seed, turn))

    assert answer(1, 0) == answer(1, 0)
    assert len({answer(1, 0), answer(2, 0), answer(1, 1)}) == 3


def test_long_conversations_keep_within_the_context(model, monkeypatch):
    monkeypatch.setattr(model, "engine", ScriptedEngine([5] * 1000))
    messages = [*user("early " * 300), {"role": "assistant", "content": "yes"}, *user("the last question")]
    list(model.reply(messages, SamplingSettings(max_tokens=100), 1, 0))
    (prompt,) = model.engine.prompts
    assert len(prompt) <= 512 - 100  # the tiny model has 512 positions
    assert "the last question" in model.format.decode(prompt.tolist())
    assert "early" not in model.format.decode(prompt.tolist())


def test_what_a_conversation_has_lost_is_said(model, capsys, monkeypatch):
    monkeypatch.setattr(model, "engine", ScriptedEngine([100] * 200))
    said = "The conversation is longer than the model's context: its oldest"
    lines, settings = ["one " * 60, "two " * 60, "three " * 60], SamplingSettings(max_tokens=200, temperature=0)
    shown = in_terminal([("SFT", model)], *lines, settings=settings)
    first, second, third = shown.split("> ")[1:4]
    assert said not in first and f"({said} 2 messages had to be left out.)" in second and f"({said} 4 " in third
    answers = through_pipe([("SFT", model), ("RLHF", model)], "\n".join(lines), settings)
    told = capsys.readouterr().err.splitlines()
    assert said not in answers and [line[: len(said) + 2] for line in told] == [f"{said} 2", f"{said} 4"]
    assert "the beginning of the last one" in in_terminal([("SFT", model)], "word " * 400, settings=settings)


def test_an_answer_leaves_half_of_the_context_to_the_prompt(model):
    answer = "".join(model.reply(user("word " * 400), SamplingSettings(max_tokens=5000, min_tokens=5000), 1, 0))
    assert answer  # no position beyond the model's last was asked for


def test_every_end_token_of_generation_config_ends_an_answer(damaged):
    """In chat and in the server, which have engines of their own."""
    question, greedy = user("How are you?"), SamplingSettings(max_tokens=20, temperature=0)
    plain = ChatModel.load(damaged)
    prompt = plain.format.prompt_ids(question)
    *_, whole = plain.engine.stream(torch.tensor(prompt), greedy, SamplingKey(0))
    end = whole.response_ids[5]
    config = damaged / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [plain.format.end_of_turn_id, end]}))
    model = ChatModel.load(damaged)
    *_, ended = model.engine.stream(torch.tensor(prompt), greedy, SamplingKey(0))
    assert ended.ended and ended.response_ids == whole.response_ids[: whole.response_ids.index(end) + 1]
    text = model.format.decode(ended.response_ids[:-1])
    assert "".join(model.reply(question, greedy, 0, 0)) == text
    batch = ContinuousBatch(model, 1, 200)
    batch.warm_up()
    sample = OwnSample(0, torch.tensor(prompt), 20, settings=greedy, key=SamplingKey(0))
    batch.admit(Completion([sample], model.format.decode))
    events = []
    while not batch.is_idle:
        events += batch.step()
    assert [(delta.text, delta.finish) for _, delta in events] == [(text, "stop")]


def test_a_pad_token_that_the_model_has_no_row_for_is_not_fed_to_it():
    """Of a family that pads, as it comes: only training makes the row."""
    family = Family(CHATML, ("<|im_end|>", "<|im_start|>"), "<|im_end|>")
    form = ChatFormat(bytes_tokenizer(family))
    config = BloomConfig(vocab_size=258, hidden_size=32, n_layer=1, n_head=2)
    model = ChatModel(AutoModelForCausalLM.from_config(config), form)
    assert form.pad_id == 258
    prompts = [torch.tensor(form.prompt_ids(user(text))) for text in ("a", "hello there")]
    samples = list(model.engine.generate(prompts, SamplingSettings(3), SamplingKey(0)))
    batch = ContinuousBatch(model, 2, 100)
    batch.warm_up()
    own = [OwnSample(0, prompt, 3, settings=SamplingSettings(3), key=SamplingKey(0)) for prompt in prompts]
    for sample in own:
        batch.admit(Completion([sample], form.decode))
    while not batch.is_idle:
        batch.step()
    assert len(samples) == len(own) and all(sample.is_over for sample in own)


def test_a_template_that_refuses_is_a_user_error(damaged):
    AutoTokenizer.from_pretrained(damaged).save_pretrained(damaged)
    (damaged / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{{ m['content'] }}</s>{% endfor %}"
    )
    model = ChatModel.load(damaged)
    with pytest.raises(UserError, match="no system message"):
        list(model.reply([{"role": "system", "content": "s"}, *user("hi")], SETTINGS, 1, 0))
    shown = in_terminal([("SFT", model)], "/system be short", "hi", "/system", "hi")
    assert shown.count("no system message") == 1  # the chat goes on


# Loading


def test_loaded_for_use(model, tiny_model_directory):
    assert not model.model.training
    assert model.model.dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert model.context_length == 512
    assert ChatModel.load(tiny_model_directory, "bf16").model.dtype == torch.bfloat16


def test_large_weights_stay_small_on_a_cpu(tiny_model_directory, monkeypatch):
    monkeypatch.setattr("inference.chat_model.LARGE_BYTES", 1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ChatModel.load(tiny_model_directory).model.dtype == torch.bfloat16


def truncate_weights(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])


def remove_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def break_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "opt", ')


def remove_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def remove_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


def forget_a_layer(directory: Path) -> None:
    file = directory / "model.safetensors"
    kept = {name: weight for name, weight in load_file(file).items() if "layers.1." not in name}
    save_file(kept, file, {"format": "pt"})


def shrink_vocabulary(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(1)
    model.save_pretrained(directory)


@pytest.mark.parametrize(
    "damage, words",
    [
        (truncate_weights, "cannot be loaded"),
        (remove_weights, "cannot be loaded"),
        (break_config, r"config\.json cannot be read"),
        (remove_config, "no config.json"),
        (remove_tokenizer, "no tokenizer files"),
        (forget_a_layer, "weights are missing"),
        (shrink_vocabulary, "more tokens than the model"),
    ],
)
def test_damage_is_one_sentence(damaged, damage, words, capfd):
    damage(damaged)
    with pytest.raises(UserError, match=words) as error:
        ChatModel.load(damaged)
    assert "\n" not in str(error.value)
    assert str(damaged) in str(error.value)


def test_weights_that_may_not_be_read_are_not_missing(damaged, monkeypatch):
    file = damaged / "model.safetensors"
    file.write_bytes(b"")  # as good as unreadable
    monkeypatch.setattr("inference.weights.os.access", lambda path, mode: Path(path) != file)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read .*give yourself the right to read it\.$"):
        ChatModel.load(damaged)


def test_an_unknown_dtype_is_refused(tiny_model_directory):
    with pytest.raises(UserError, match="int4"):
        ChatModel.load(tiny_model_directory, "int4")


# Through a pipe


def test_only_the_answers_are_written(model):
    first = "".join(model.reply(user("hello"), SETTINGS, 1, 0))
    history = [*user("hello"), {"role": "assistant", "content": first}, *user("and then?")]
    second = "".join(model.reply(history, SETTINGS, 1, 1))
    assert through_pipe([("SFT", model)], "hello\n\nand then?") == f"{first}\n{second}\n"


def test_same_seed_same_answers(model):
    text = "hello\nwhat now?\n"
    first = through_pipe([("SFT", model)], text, WILD, seed=5)
    assert first == through_pipe([("SFT", model)], text, WILD, seed=5)
    assert first != through_pipe([("SFT", model)], text, WILD, seed=6)


def test_empty_input_is_fine(model):
    assert through_pipe([("SFT", model)], "") == ""


def test_commands_are_plain_text_in_a_pipe():
    assert through_pipe([("SFT", Echo())], "/help\n") == "echo /help/0\n"


def test_compared_models_answer_one_under_the_other_with_their_own_histories():
    sft, rlhf = Echo("s"), Echo("r")
    shown = through_pipe([("SFT", sft), ("RLHF", rlhf)], "one\ntwo\n", system="be kind")
    assert shown == "SFT: s one/0\nRLHF: r one/0\nSFT: s two/1\nRLHF: r two/1\n"
    roles = [{"role": "system", "content": "be kind"}, *user("one")]
    assert sft.asked[1] == [*roles, {"role": "assistant", "content": "s one/0"}, *user("two")]
    assert rlhf.asked[1] == [*roles, {"role": "assistant", "content": "r one/0"}, *user("two")]


def test_models_may_end_at_different_times_or_say_nothing():
    class Silent(Echo):
        def reply(self, messages, settings, seed, turn):
            return iter(())

    assert through_pipe([("A", Silent()), ("B", Echo())], "x\n") == "A: \nB: echo x/0\n"
    assert through_pipe([("A", Silent()), ("B", Silent())], "x\n") == "A: \nB: \n"
    assert through_pipe([("A", Silent())], "x\ny\n") == "\n\n"


def test_a_real_pipe_with_bytes_that_are_no_text(model, tiny_model_directory):
    program = (
        "import sys; from pathlib import Path; from inference.chat import ChatModel, chat;"
        "from inference.generation.sampler import SamplingSettings;"
        "chat([('SFT', ChatModel.load(Path(sys.argv[1])))], SamplingSettings(max_tokens=40), 1)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tiny_model_directory)],
        input=b"hello \xff\n",
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        timeout=120,
    )
    answer = "".join(model.reply(user("hello \ufffd"), SamplingSettings(max_tokens=40), 1, 0))
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode() == answer + "\n"  # nothing else, from no library either


def in_child(talk: Callable[[], None], terminal: bool = False) -> tuple[int, int]:
    """Run `talk` in a forked process; returns its id and, with `terminal`, the descriptor of its terminal."""
    process, descriptor = pty.fork() if terminal else (os.fork(), -1)
    if process == 0:
        signal.alarm(20)  # whatever goes wrong, no process stays behind
        try:
            talk()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return process, descriptor


def test_a_reader_that_leaves_ends_the_chat_quietly():
    read_end, write_end = os.pipe()
    os.close(read_end)

    def talk() -> None:
        os.dup2(write_end, 1)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        guard_output(ends=True)
        with pytest.raises(SystemExit) as ended:
            chat([("SFT", Echo())], SETTINGS, 1, None, io.StringIO("hi\nhi\n"))
        sys.stdout.close()  # flushes what is left, as Python does at exit: that must not fail again
        os._exit(ended.value.code != EXIT_READER_GONE)

    process, _ = in_child(talk)
    os.close(write_end)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


# In a terminal


def test_banner_answer_and_end_of_input():
    lines = in_terminal([("RLHF", Echo())], "hi").splitlines()
    assert lines[0] == "Talking to RLHF (an echo)"
    assert "Ctrl-D" in lines[1]
    assert lines[2:] == ["> echo hi/0", "> "]


def test_quit_ends_at_once():
    shown = in_terminal([("RLHF", Echo())], "/quit", "hi")
    assert "echo hi" not in shown


def test_ctrl_c_at_the_prompt_leaves(monkeypatch):
    source, sink = TypedLines("hi\n"), TypedLines()

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(source, "readline", interrupt)
    chat([("RLHF", Echo())], SETTINGS, 1, None, source, sink)
    assert sink.getvalue().endswith("> \n")


def test_ctrl_c_stops_an_answer_and_keeps_what_came():
    class Interrupted(Echo):
        def reply(self, messages, settings, seed, turn):
            self.asked.append(list(messages))
            yield "half"
            if turn == 0:
                raise KeyboardInterrupt

    model = Interrupted()
    shown = in_terminal([("RLHF", model)], "one", "two")
    assert "> half\n(stopped)\n> half\n" in shown
    assert model.asked[1] == [*user("one"), {"role": "assistant", "content": "half"}, *user("two")]


def test_reset_starts_over():
    model = Echo()
    in_terminal([("RLHF", model)], "one", "/reset", "one")
    assert model.asked == [user("one"), user("one")]


def test_retry_draws_again():
    model = Echo()
    shown = in_terminal([("RLHF", model)], "/retry", "one", "/retry", "two")
    assert "say something first" in shown
    assert "echo one/0" in shown and "echo one/1" in shown
    assert model.asked[1] == user("one")
    assert model.asked[2] == [*user("one"), {"role": "assistant", "content": "echo one/1"}, *user("two")]


def test_system_message():
    model = Echo()
    in_terminal([("RLHF", model)], "/system be brief", "one", "/system", "two", system="be kind")
    assert model.asked == [[{"role": "system", "content": "be brief"}, *user("one")], user("two")]


def test_set_changes_the_next_answers(model):
    shown = in_terminal([("SFT", model)], "/set max_tokens=3 temperature=0", "hello")
    assert "max_tokens=3 temperature=0.0 top_p=0.95" in shown
    greedy = "".join(model.reply(user("hello"), SamplingSettings(max_tokens=3, temperature=0), 1, 0))
    assert printable(greedy) in shown


def test_wrong_commands_do_not_end_the_chat():
    shown = in_terminal([("RLHF", Echo())], "/nonsense", "/set heat=1", "/set top_p=2", "/help", "hi")
    assert "There is no command /nonsense" in shown
    assert "not 'heat=1'" in shown
    assert "top_p must be more than 0 and at most 1" in shown
    assert all(command in shown for command in ("/reset", "/retry", "/system", "/set", "/quit"))
    assert "echo hi/0" in shown


def test_columns_when_wide_one_under_the_other_when_narrow(monkeypatch):
    def last_lines(columns: int) -> list[list[str]]:
        monkeypatch.setenv("COLUMNS", str(columns))
        session = Session([("SFT", Echo("s")), ("RLHF", Echo("r"))], SETTINGS, 1)
        terminal = Terminal(session, TypedLines(), sink := TypedLines())
        terminal.show_answer("hi")
        return [line.split() for line in sink.getvalue().splitlines() if "hi/0" in line]

    assert last_lines(100)[-1] == ["s", "hi/0", "│", "r", "hi/0"]
    assert last_lines(60)[-2:] == [["s", "hi/0"], ["r", "hi/0"]]


def test_models_cannot_steer_the_terminal():
    assert printable("a\x1b[31mb\x07\r\n\tc\x9b") == "a[31mb\n\tc"

    class Rude(Echo):
        def reply(self, messages, settings, seed, turn):
            yield "\x1b[2Jgone [red]markup[/red]"

    assert "> [2Jgone [red]markup[/red]\n" in in_terminal([("X", Rude())], "hi")


def test_a_real_terminal():
    def talk() -> None:
        with open(0, encoding="utf-8") as sys.stdin, open(1, "w", encoding="utf-8") as sys.stdout:
            chat([("RLHF", Echo())], SETTINGS, 1)

    process, descriptor = in_child(talk, terminal=True)
    shown = b""
    for prompt, keys in [(1, b"hello\n"), (2, b"\x04")]:
        while shown.count(b"> ") < prompt:
            shown += os.read(descriptor, 1000)  # fails when the process ends
        os.write(descriptor, keys)
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while more := os.read(descriptor, 1000):
            shown += more
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    os.close(descriptor)
    assert b"Talking to RLHF" in shown and b"echo hello/0" in shown


# Settings


@pytest.mark.parametrize(
    "settings, words",
    [
        (SamplingSettings(max_tokens=0), "max_tokens must be 1 or more"),
        (SamplingSettings(max_tokens=1, temperature=-1), "temperature must be 0"),
        (SamplingSettings(max_tokens=1, temperature=float("nan")), "temperature must be 0"),
        (SamplingSettings(max_tokens=1, top_p=0), "top_p must be more than 0"),
        (SamplingSettings(max_tokens=1, top_k=-1), "top_k must be 0"),
        (SamplingSettings(max_tokens=1, min_tokens=-1), "min_tokens must be 0"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        check_settings(settings)
    with pytest.raises(UserError, match=words):
        chat([("X", Echo())], settings, 1, None, io.StringIO("hi\n"), io.StringIO())


def test_change_settings():
    assert change_settings(SETTINGS, "top_k=5 temperature=1") == SamplingSettings(24, 1.0, 0.95, 5)
    assert change_settings(SETTINGS, "") == SETTINGS
    with pytest.raises(UserError, match="takes a whole number"):
        change_settings(SETTINGS, "max_tokens=2.5")
    with pytest.raises(UserError, match="a number, not 'hot'"):
        change_settings(SETTINGS, "temperature=hot")


# What the target of the command may be


def finish(run: Path, step: str) -> Path:
    directory = run / step / "model"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (run / step / "result.json").write_text("{}")
    return directory


@pytest.fixture
def run_directory(tmp_path) -> Path:
    run = tmp_path / "demo"
    run.mkdir()
    (run / "config.yaml").write_text("model: tiny\n")
    return run


def test_a_run_gives_its_newest_model(run_directory, capsys):
    sft = finish(run_directory, "step1_sft")
    assert find_chat_models(run_directory, compare=False) == [("SFT", sft)]
    assert f"rlhf-chat rlhf {run_directory}" in capsys.readouterr().err
    rlhf = finish(run_directory, "step3_rlhf")
    assert find_chat_models(run_directory, compare=False) == [("RLHF", rlhf)]
    assert find_chat_models(run_directory, compare=True) == [("SFT", sft), ("RLHF", rlhf)]
    assert capsys.readouterr() == ("", "")


def test_a_run_by_dpo(run_directory, capsys):
    sft = finish(run_directory, "step1_sft")
    (run_directory / "step2_dpo").mkdir()
    assert find_chat_models(run_directory, compare=False) == [("SFT", sft)]
    assert f"Step 2 (DPO) of {run_directory} is not finished yet" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"step2_dpo.*rlhf-chat dpo {run_directory}"):
        find_chat_models(run_directory, compare=True)
    dpo = finish(run_directory, "step2_dpo")
    assert find_chat_models(run_directory, compare=False) == [("DPO", dpo)]
    assert find_chat_models(run_directory, compare=True) == [("SFT", sft), ("DPO", dpo)]
    rlhf = finish(run_directory, "step3_rlhf")
    assert find_chat_models(run_directory, compare=False) == [("RLHF", rlhf)]
    assert find_chat_models(run_directory, compare=True) == [("SFT", sft), ("DPO", dpo), ("RLHF", rlhf)]


def test_a_run_that_began_with_an_sft_model_is_compared_with_it(run_directory):
    before = ("old/rlhf", run_directory / "elsewhere")
    with pytest.raises(UserError, match=f"needs step3_rlhf, which is not finished; run rlhf-chat rlhf {run_directory}"):
        find_chat_models(run_directory, True, before)
    rlhf = finish(run_directory, "step3_rlhf")
    assert find_chat_models(run_directory, True, before) == [before, ("RLHF", rlhf)]


def test_a_step_without_its_result_is_not_finished(run_directory):
    sft = finish(run_directory, "step1_sft")
    rlhf = finish(run_directory, "step3_rlhf")
    (rlhf.parent / "result.json").unlink()
    assert find_chat_models(run_directory, compare=False) == [("SFT", sft)]
    with pytest.raises(UserError, match=f"step3_rlhf.*rlhf-chat rlhf {run_directory}"):
        find_chat_models(run_directory, compare=True)
    (sft.parent / "result.json").unlink()
    with pytest.raises(UserError, match="rlhf-chat run --name demo"):
        find_chat_models(run_directory, compare=False)
    with pytest.raises(UserError, match=f"step1_sft.*rlhf-chat sft {run_directory}"):
        find_chat_models(run_directory, compare=True)


def test_a_model_directory_is_itself(tiny_model_directory):
    assert find_chat_models(tiny_model_directory, compare=False) == [("tiny", tiny_model_directory)]
    with pytest.raises(UserError, match="is one model"):
        find_chat_models(tiny_model_directory, compare=True)


def test_other_targets_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_chat_models(tmp_path / "nowhere", compare=False)
    with pytest.raises(UserError, match="neither a run directory"):
        find_chat_models(tmp_path, compare=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="neither a run directory"):
        find_chat_models(tmp_path / "file", compare=False)
    model = finish(tmp_path, "step1_sft")
    with pytest.raises(UserError, match=f"use {model}"):
        find_chat_models(tmp_path / "step1_sft", compare=False)
    (model / "config.json").write_text(json.dumps({"architectures": ["OPTForSequenceClassification"]}))
    with pytest.raises(UserError, match="reward model"):
        find_chat_models(model, compare=False)
    (model / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        find_chat_models(model, compare=False)


def test_a_file_that_may_not_be_read_is_not_to_be_copied_again(tmp_path, monkeypatch):
    model = finish(tmp_path, "step1_sft")

    def refuse(file, *_, **__):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "read_text", refuse)
    for read in (refuse_reward_model, check_model_directory):
        with pytest.raises(UserError, match=r"Permission denied.*; give yourself the right to read it"):
            read(model)


def test_finding_a_model_imports_nothing_heavy(tiny_model_directory):
    program = (
        "import sys; from pathlib import Path; from inference.chat_target import find_chat_models;"
        "find_chat_models(Path(sys.argv[1]), compare=False);"
        "sys.exit(bool({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program, str(tiny_model_directory)], env=environment).returncode == 0
