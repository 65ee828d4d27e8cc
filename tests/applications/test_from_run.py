"""`rlhf-chat run --from RUN`: a fork or the next round, and with which settings."""

import json

import pytest

from applications.commands import TrainingOptions, asked_for, step_command
from applications.from_run import from_run
from applications.settings import resolve_settings, settings_named
from inference.errors import UserError
from training.config_files import load_config
from training.run_directory import RunDirectory
from training.steps import METHODS, PPO, SFT

PREFERENCE = {
    "id": "1", "time": "2026-01-31T12:00:00.000Z", "by": "ann", "prompt": [{"role": "user", "content": "Hi"}],
    "response_a": "Good.", "response_b": "Bad.", "winner": "a", "model_a": "demo/rlhf", "model_b": "demo/rlhf",
    "seed_a": 1, "seed_b": 2, "temperature": 0.7, "max_tokens": 12,
}  # fmt: skip


@pytest.fixture
def parent(tmp_path) -> RunDirectory:
    """Settings and names of finished steps; somebody has judged answers."""
    run = RunDirectory(tmp_path / "demo")
    true_score = "evaluation.true_score=upbeat"
    run.write_config(load_config([], ["model=tiny", "seed=7", "data.limit=30", "announce=minutes", true_score]), {})
    for step in METHODS["ppo"]:
        run.step(step).model.mkdir(parents=True)
        (run.step(step).model / "config.json").write_text("{}")
        run.step(step).result_file.write_text("{}")
    run.preferences.write_text(json.dumps(PREFERENCE) + "\n")
    return run


@pytest.fixture
def files(tmp_path):
    """Preferences of people, and pairs."""
    (tmp_path / "liked.jsonl").write_text(json.dumps(PREFERENCE) + "\n")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("liked", "pairs")}


@pytest.mark.parametrize(
    ("overrides", "data", "goes_on", "why"),
    [
        ([], [], True, "no setting differs, and it has preferences"),
        (["processes=2"], [], False, "processes differs"),
        (["evaluation.prompts=50"], [], False, "evaluation.prompts differs"),
        (["rlhf.reward_url=http://127.0.0.1:9"], [], False, "rlhf.reward_url differs"),
        (["seed=7"], [], True, "no setting differs"),  # which it has
        (["rlhf.kl.coefficient=0.2"], [], False, "rlhf.kl.coefficient differs"),
        (["method=dpo"], [], False, "method differs"),
        ([], ["liked"], True, "--data has preferences of people"),
        (["dpo.epochs=9"], ["liked", "pairs"], True, "--data has preferences of people"),
        ([], ["pairs"], False, "data.source differs"),
    ],
)
def test_what_is_typed_says_whether_it_is_the_next_round(parent, files, overrides, data, goes_on, why):
    given = {"data": {"source": [files[name] for name in data]}} if data else {}
    path, config, sentence = from_run(parent.path, None, [], overrides, given, None)
    kind = "the next round after" if goes_on else "a fork of"
    assert path.name == ("demo-round2" if goes_on else "demo-fork")
    assert sentence.startswith(f"{path} is {kind} {parent.path}") and why in sentence
    assert bool(config.fork_of) != goes_on and bool(config.sft_model) == goes_on
    for asked in (True, False):
        _, config, sentence = from_run(parent.path, path, [], overrides, given, asked)
        assert bool(config.fork_of) != asked and "as asked" in sentence


def test_without_preferences_it_is_a_fork(parent):
    parent.preferences.unlink()
    assert from_run(parent.path, None, [], [], {}, None)[1].fork_of == str(parent.path)


def test_a_fork_has_the_settings_of_its_parent_and_the_same_split(parent, files):
    before = parent.read_config()
    _, config, _ = from_run(parent.path, None, [], ["rlhf.iterations=9"], {"seed": 5}, False)
    assert (config.seed, config.split_seed, config.announce) == (5, before.seed, "")
    assert (config.rlhf.iterations, config.model, config.evaluation) == (9, before.model, before.evaluation)
    assert config.data.limit == before.data.limit and not config.data.parent
    _, liked, _ = from_run(parent.path, None, [], [], {"data": {"source": [files["liked"]]}}, False)
    assert (liked.data.parent, liked.data.limit, liked.round_of) == (liked.fork_of, 0, "")
    assert liked.evaluation.true_score == "none"  # which is of the embedded default
    _, pairs, _ = from_run(parent.path, None, [], [], {"data": {"source": [files["pairs"]]}}, False)
    assert (pairs.data.parent, pairs.data.limit) == ("", before.data.limit)


def test_a_seed_is_that_of_the_steps_that_are_chosen(parent, monkeypatch, capsys):
    def settings(steps, overrides=(), **flags):
        options = TrainingOptions(flags, None, parent.path, False, "x/y", None, list(overrides), steps)
        return asked_for(options)[1]

    chosen = settings("rlhf,2", seed=5)
    assert (chosen.seed, chosen.reward.seed, chosen.rlhf.seed, chosen.sft.seed) == (7, 5, 5, -1)
    assert (chosen.seed_of(SFT), chosen.seed_of(PPO)) == (7, 5)
    assert settings("2", method="dpo", seed=5).dpo.seed == 5
    parent.write_config(chosen, {})
    for asked in (settings(None, seed=8), settings(None, ["seed=8"])):
        assert {asked.seed_of(step) for step in chosen.steps} == {8}
    assert "x/y is a fork of" in capsys.readouterr().err
    executed = {}
    monkeypatch.setattr("applications.commands.execute", lambda *given: executed.update(enumerate(given)))
    step_command(PPO, parent.path.parent / "b", TrainingOptions({"seed": 3}, parent=parent.path))
    assert executed[1].rlhf.seed == 3 and executed[1].method == "ppo" and executed[2] == [PPO]


def test_what_is_there_stays_what_it_is(parent):
    for name, goes_on in (("round", True), ("fork", False)):
        run = RunDirectory(parent.path.parent / name)
        run.write_config(from_run(parent.path, run.path, [], [], {"seed": 9}, goes_on)[1], {})
        assert from_run(parent.path, run.path, [], [], {}, None)[1] == run.read_config()
        with pytest.raises(UserError, match=r"is there already, as .* demo|is there already, as .*: give the new run"):
            from_run(parent.path, run.path, [], [], {}, not goes_on)


def test_a_runs_own_settings_are_a_file_of_settings(parent, files, tmp_path):
    parent.write_config(parent.read_config(), {"torch": "1"})
    before = parent.read_config()
    assert load_config([parent.config_file], []) == before
    parent.write_config(before.model_copy(update={"fork_of": str(tmp_path)}), {"torch": "1"})
    assert load_config([parent.config_file], []) == settings_named(str(parent.path)) == before
    assert load_config([parent.config_file], ["fork_of=/a"]).fork_of == "/a"
    again = resolve_settings(None, [parent.config_file], ["fork_of="], {}, parent)
    assert again is not None and again.fork_of == str(tmp_path)  # the run itself goes on
    liked = from_run(parent.path, tmp_path / "liked", [], [], {"data": {"source": files["liked"]}}, False)[1]
    RunDirectory(tmp_path / "liked").write_config(liked, {"torch": "1"})
    again = load_config([tmp_path / "liked" / "config.yaml"], [])
    assert (again.data.parent, again.round_of) == (str(parent.path), "")  # its rows, and no round after it
    with pytest.raises(UserError, match="--fork and --go-on say what becomes of another run"):
        asked_for(TrainingOptions({}, "tiny", goes_on=True))
