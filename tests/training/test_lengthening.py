"""A step that is to be longer than it was: what is set aside, what is refused, and what is trained then."""

import json
import os
import shutil
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from inference.errors import UserError
from inference.families import build_tiny_model
from tests.supervised_steps import make_run, metrics_of, stage_of
from training.changes import PLAN, journal_of, make_way, not_planned_so, plan_change, was_lengthened
from training.config_files import load_config
from training.opening import open_run
from training.run_directory import RunDirectory
from training.step2_dpo import dpo
from training.steps import DPO, PPO, REWARD, SFT

BEGUN = ["model=m", "sft.max_steps=6", "rlhf.iterations=3"]
SIGNS = ("evaluation.json", "comparison.jsonl", "report.html", "evaluations/rlhf-against-first-sft.json")


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """All three steps finished and compared, with names instead of weights; 200 rows are 6 optimiser steps an epoch."""
    run = RunDirectory(tmp_path / "a")
    open_run(run, load_config([], BEGUN))
    for step, number in ((SFT, 6), (REWARD, 6), (PPO, 3)):
        directory = run.step(step)
        for name in ("model/model.safetensors", "metrics.jsonl", f"checkpoints/{number}/weights", "best/2/weights"):
            (directory.path / name).parent.mkdir(parents=True, exist_ok=True)
            (directory.path / name).write_text(step.command)
        (directory.checkpoints / str(number) / "state.json").write_text("{}")
        directory.result_file.write_text(json.dumps({"iterations": 3} if step is PPO else {"rows": 200}))
    for name in SIGNS:
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text(name)
    return run


def reopen(run: RunDirectory, *settings: str) -> None:
    open_run(run, load_config([], [*BEGUN, *settings]))


def files(place: Path) -> set[str]:
    return {str(file.relative_to(place)) for file in place.rglob("*") if file.is_file()}


def of_step(folder: str) -> set[str]:
    return {f"{folder}/{name}" for name in ("model/model.safetensors", "metrics.jsonl", "result.json")}


def test_a_longer_last_step_goes_on_and_its_comparisons_are_made_anew(run):
    reopen(run, "rlhf.iterations=5")
    earlier = RunDirectory(run.path / "earlier_1")
    assert files(earlier.path) == {"config.yaml", *SIGNS, *of_step("step3_rlhf")}
    assert earlier.read_config().rlhf.iterations == 3 and run.read_config().rlhf.iterations == 5
    assert earlier.step(PPO).is_finished and not run.step(PPO).is_finished
    kept = {name for name in files(run.path) if not name.startswith(("earlier_1", "."))}
    assert kept >= {
        "step3_rlhf/model/model.safetensors",
        "step3_rlhf/checkpoints/3/weights",
        "step3_rlhf/best/2/weights",
    }
    assert not kept & {*SIGNS} and run.step(SFT).is_finished and run.step(REWARD).is_finished
    assert was_lengthened(run.step(PPO)) == ["lengthened after iteration 3 (rlhf.iterations 3, then 5)"]
    assert not_planned_so(run.step(PPO)).endswith("what there was of the shorter one is in earlier_1.")
    run.step(PPO).result_file.write_text("{}")
    reopen(run, "rlhf.iterations=9")
    assert len(was_lengthened(run.step(PPO))) == 2 and (run.path / "earlier_2").is_dir()


def test_later_steps_that_began_with_the_shorter_one_are_set_aside_whole(run):
    reopen(run, "sft.max_steps=9", "sft.epochs=2", "rlhf.iterations=5")
    later = {f"step3_rlhf/{name}" for name in ("checkpoints/3/weights", "checkpoints/3/state.json", "best/2/weights")}
    expected = {"config.yaml", *SIGNS, *of_step("step1_sft"), *of_step("step3_rlhf"), *later}
    assert files(run.path / "earlier_1") == expected
    assert not run.step(PPO).path.exists() and run.step(REWARD).is_finished
    assert was_lengthened(run.step(SFT)) and not was_lengthened(run.step(PPO))  # which begins anew, with this plan


@pytest.mark.parametrize(
    ("change", "settings", "sentence"),
    [
        (None, ["rlhf.iterations=2"], r"iterations: 3 there, 2 now.*--from .*a --name NEW --set rlhf\.iterations=2"),
        (None, ["sft.max_steps=5", "sft.epochs=9"], r"sft\.\w+: \d there, \d now"),
        ("step1_sft/checkpoints", ["sft.max_steps=9", "sft.epochs=2"], r"no checkpoint.*--set sft\.epochs=2 --set sft"),
        ('{"stopped": true}', ["rlhf.iterations=5"], r"was ended by rlhf\.kl\.stop, .*--set rlhf\.kl\.stop=\d"),
    ],
)
def test_what_cannot_be_longer_is_refused_and_left_as_it_is(run, change, settings, sentence):
    if change and change.startswith("{"):
        (run.step(PPO).checkpoints / "3" / "state.json").write_text(change)
    elif change:
        (run.path / change).rename(run.path / ".gone")
    before = files(run.path), run.config_file.read_text()
    with pytest.raises(UserError, match=sentence):
        reopen(run, *settings)
    assert before == (files(run.path), run.config_file.read_text())


@pytest.mark.parametrize("same", ["sft.epochs=9", "dpo.max_steps=1"])
def test_a_length_that_trains_nothing_more_changes_nothing(run, same):
    """Six optimiser steps have an end in sft.max_steps already; DPO has learned nothing yet."""
    before = files(run.path)
    reopen(run, same)
    assert files(run.path) == before and not was_lengthened(run.step(SFT))


def state_of(run: RunDirectory) -> tuple:
    """Files that are no leftovers, lengths, and what is said of step 1."""
    there = {name for name in files(run.path) if not any(part.startswith(".") for part in Path(name).parts)}
    return there, run.read_config().sft.max_steps, not_planned_so(run.step(SFT))


def test_a_command_that_is_killed_anywhere_has_done_nothing_or_is_finished_by_any_other(run, monkeypatch):
    """Before each change of a name on the disk; of what a dead process would do then nothing comes."""
    longer = ["sft.max_steps=9", "sft.epochs=2", "evaluation.prompts=9"]
    kept = shutil.copytree(run.path, run.path.with_name("kept"))
    before, seen = state_of(run), []
    for number in count():
        left = number
        shutil.rmtree(run.path)
        shutil.copytree(kept, run.path)

        def alive(act, *given, **named):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return act(*given, **named)

        with monkeypatch.context() as patched:
            for name in ("rename", "replace", "unlink", "rmdir"):
                patched.setattr(os, name, partial(alive, getattr(os, name)))
            try:
                reopen(run, *longer)
                break
            except KeyboardInterrupt:
                pass
        for file in run.path.glob(".*.rights"):  # another process would have another name for it
            file.unlink()
        open_run(run, None)
        seen.append(state_of(run))
    after = state_of(run)
    at = seen.index(after)
    assert at > 1 and len(seen) > at + 4 and seen == [before] * at + [after] * (len(seen) - at)


def test_a_line_that_a_kill_cut_short_is_written_once(run):
    longer = load_config([], [*BEGUN, "rlhf.iterations=5"])
    plan_change(run, run.read_config(), longer)
    run.write_config(longer, {})
    plan, journal = (run.path / PLAN).read_text(), journal_of(run.step(PPO))
    make_way(run)
    whole = journal.file.read_text()
    for cut in (9, -1, None):
        journal.file.write_text(whole[:cut])
        (run.path / PLAN).write_text(plan)
        make_way(run)
        assert journal.file.read_text() == whole and whole.count("\n") == 1


def test_a_plan_from_elsewhere_moves_and_deletes_nothing_outside_the_run(run, tmp_path):
    (tmp_path / "mine").write_text("")
    plan = {"settings": "", "finished": [], "later": [], "longer": {}, "measured": ["../mine"]}
    (run.path / PLAN).write_text(json.dumps(plan | {"place": "../earlier_1"}))
    with pytest.raises(UserError, match="delete it"):
        reopen(run)
    (run.path / PLAN).write_text(json.dumps(plan | {"place": "earlier_1"}))
    reopen(run)
    assert (tmp_path / "mine").exists()


def test_adapters_that_are_set_aside_name_the_model_there(run):
    config = run.step(PPO).path / "adapter" / "adapter_config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"base_model_name_or_path": str(run.step(SFT).model)}))
    reopen(run, "rlhf.iterations=5")
    reopen(run, "rlhf.iterations=5", "sft.max_steps=9", "sft.epochs=2")
    for earlier in ("earlier_1", "earlier_2"):
        named = json.loads((run.path / earlier / config.relative_to(run.path)).read_text())["base_model_name_or_path"]
        assert Path(named) == run.path / "earlier_2" / "step1_sft" / "model"


def test_another_evaluation_makes_way_for_its_comparison_alone(run):
    reopen(run, "evaluation.prompts=9")
    assert files(run.path / "earlier_1") == {"config.yaml", *SIGNS}
    assert run.step(PPO).is_finished and not was_lengthened(run.step(PPO))


def test_a_longer_run_goes_on_where_the_shorter_one_ended(tmp_path, one_rank):
    """At a constant rate it is a run planned so, to the bit, the evaluation at the shorter one's end aside. DPO asks
    the reference about pairs that the shorter one never saw."""
    build_tiny_model(tmp_path / "tiny")
    texts = [f"Word number {n}" for n in range(8)]
    rows = [{"prompt": [{"role": "user", "content": t}], "chosen": t, "rejected": t[:6]} for t in texts]
    common = [f"model={tmp_path / 'tiny'}", f"sft_model={tmp_path / 'tiny'}", "method=dpo", "dtype=fp32"]
    common += ["dpo.batch_size=2", "dpo.eval_every=0", "dpo.optimizer={learning_rate: 1.0e-3, warmup: 0}"]

    def train(name: str, schedule: str, *lengths: int) -> list[dict]:
        run = make_run(tmp_path / name, "pairs", rows[:6], rows[6:])
        for steps in lengths:
            settings = [*common, f"dpo.optimizer.schedule={schedule}", f"dpo.max_steps={steps}"]
            open_run(run, load_config([], settings))
            dpo.train(stage_of(run, DPO, settings, one_rank))
        return metrics_of(run, DPO)[0]

    assert train("longer", "constant", 1, 3) == train("planned", "constant", 3)
    rates = [line["lr"] for line in train("falling", "linear", 1, 3) if line["number"]]
    assert rates == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
