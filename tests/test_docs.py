"""README.md and the pages: commands parse, settings and names exist, links lead somewhere. Nothing is run."""

import json
import re

import pytest
import yaml

from tests import pages
from tests.pages import PAGES, ROOT, own_words
from training.config_files import load_config
from training.data.formats import read_row

EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@EVERY_PAGE
def test_commands_are_accepted(page):
    assert pages.wrong_commands(own_words(page)) == []


@EVERY_PAGE
def test_options_exist(page):
    assert pages.wrong_options(own_words(page)) == []


@EVERY_PAGE
def test_settings_exist(page):
    assert pages.wrong_settings(own_words(page)) == []


@EVERY_PAGE
def test_links_and_anchors_resolve(page):
    assert pages.wrong_links(page, page.read_text(encoding="utf-8")) == []


@EVERY_PAGE
def test_paths_exist(page):
    assert pages.wrong_paths(own_words(page)) == []


@EVERY_PAGE
def test_names_are_those_of_the_code(page):
    assert pages.wrong_names(own_words(page)) == []


@EVERY_PAGE
def test_metrics_are_found_in_the_trainers_as_they_are_written(page):
    assert pages.wrong_metrics(own_words(page)) == []


@EVERY_PAGE
def test_examples_can_be_used(page):
    text = page.read_text(encoding="utf-8")
    assert pages.wrong_imports(text) == []
    for block in pages.blocks(text, "json"):
        assert all(read_row(json.loads(line), keeps_labels=True).rows for line in block.splitlines())
    for block in pages.blocks(text, "yaml"):
        load_config([], [], {"model": "tiny", **yaml.safe_load(block)})


@pytest.mark.parametrize("name", pages.command_names())
def test_help_has_two_examples_that_are_accepted(name):
    text = f"```\n{pages.command_named(name).help}\n```\n"
    assert len(pages.commands(text)) >= 2
    assert pages.wrong_commands(text) == []


def test_there_is_something_to_check():
    found = [words for page in PAGES for words in pages.commands(own_words(page))]
    assert len([words for words in found if words[0] == "rlhf-chat"]) > 80
    assert len([words for words in found if words[:2] == ["python", "-m"]]) > 15


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("rlhf-chat trian runs/demo", "no command trian"),
        ("rlhf-chat run --modle tiny", "No such option: --modle"),
        ("rlhf-chat chat runs/demo --temperature hot", "Invalid value for '--temperature'"),
        ("rlhf-chat plan --nodes 2", "Missing option '--model'"),
        ("rlhf-chat data shwo mine.jsonl", "no command shwo"),
        ("rlhf-chat run --model opt-13c", "did you mean 'opt-13b'?"),
        ("rlhf-chat sft runs/mine --set sft.epoch=2", "There is no setting 'sft.epoch'"),
        ("rlhf-chat sft runs/mine --set sft.epochs=0", "Setting sft.epochs"),
        ("rlhf-chat run --config applications/presets/none.yaml", "no file applications/presets/none.yaml"),
        ("python -m benchmarks.floor --size s --sort x", "no option --sort"),
        ("python -m benchmarks.ceiling --size s", "no file benchmarks/ceiling.py"),
        ("torchrun --nproc-per-node 8 training/step1_sft/train.py runs/big", "no file training/step1_sft/train.py"),
        ("torchrun --nproc-per-node 8 training/step1_sft/main.py runs/big --preset x", "no option --preset"),
        ("make deploy", "no such target"),
        ("pip install -e '.[everything]'", "no such extra"),
    ],
)
def test_a_wrong_command_is_found(line, says):
    for text in (f"```\n{line}  # a comment\n```\n", f"Try `{line}`."):
        (found,) = pages.wrong_commands(text)
        assert says in found


def test_right_commands_are_accepted():
    text = (
        "```bash\nrlhf-chat run --model opt-1.3b \\\n    --dry-run\necho Hi | rlhf-chat chat runs/demo --seed 1\n```\n"
        "`rlhf-chat plan`, `rlhf-chat data lint`, `rlhf-chat COMMAND --help`"
    )
    assert len(pages.commands(text)) == 5
    assert pages.wrong_commands(text) == []


def test_wrong_options_are_found():
    assert pages.wrong_options("`chat --compare`, `plan --gpu this-machine`, `--kills 5`, `--only_optimize_lora`") == []
    wrong = "`chat --dry-run`, `data lint --kind sft`, `--kill 5 --seed 1`"
    assert pages.wrong_options(wrong) == ["--dry-run", "--kind", "--kill"]


def test_wrong_settings_are_found():
    right = (
        "`rlhf.kl.{target,stop}=0.1`, `rlhf.{actor,reward}.*`, `sft.optimizer.KEY`, `data.py`, `data/sft_train.jsonl`"
    )
    assert pages.wrong_settings(right) == []
    assert pages.wrong_settings("`rlhf.kl.{target,stopp}=3` and `dpo.betta`") == ["rlhf.kl.stopp", "dpo.betta"]
    (refused,) = pages.wrong_settings("`--set rlhf.advantage=rloo`")
    assert "needs samples_per_prompt of 2 or more" in refused


def test_wrong_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# A `word`, and more\n```\n# not a heading\n```\n")
    page.write_text("")
    text = "[a](other.md#a-word-and-more) [b](other.md#not-a-heading) [c](gone.md) [d](https://x.y/z) [e](#here)"
    assert pages.wrong_links(page, text) == ["other.md#not-a-heading", "gone.md", "#here"]


def test_wrong_paths_and_names_are_found():
    text = (
        "`training/stage.py`, `stage.py`, mine.py:score, `gone.py`, `tests/nowhere`, `benchmarks/results/fusion_*.json`"
    )
    assert pages.wrong_paths(text) == ["gone.py", "tests/nowhere"]
    assert pages.wrong_names("`GenerationEngine`, `ROWS_PER_DIALOGUE`, `PPO.iterate`") == []
    text = "`GenerationMachine`, `PPO.iterrate_it`, `NO_SUCH_THING`"
    assert pages.wrong_names(text) == ["GenerationMachine", "PPO.iterrate_it", "NO_SUCH_THING"]


def test_wrong_metrics_are_found():
    table = "## Metrics\n\n| name | |\n|---|---|\n| `{}`, `eval/loss` | the `loss` of |\n\n## More\n| `gone` | |\n"
    assert pages.wrong_metrics("`kl/reference_k1`, `warning/...`, `data/counts.json`" + table.format("grad_norm")) == []
    assert pages.wrong_metrics("`kl/referrence`\n" + table.format("grad")) == ["grad", "kl/referrence"]


def test_wrong_imports_are_found():
    example = "```python\nfrom training.planner.schedules.best import {}\n```\n"
    assert pages.wrong_imports(example.format("find_schedule")) == []
    assert pages.wrong_imports(example.format("find_schedules")) == ["training.planner.schedules.best.find_schedules"]


def test_columns_of_other_tools_are_left_out():
    page = ROOT / "docs" / "other_tools.md"
    assert "--enable_ema" in page.read_text(encoding="utf-8") and "--enable_ema" not in own_words(page)


def test_the_code_in_the_page_on_an_iteration_is_the_code():
    blocks = pages.blocks((ROOT / "docs" / "iteration.md").read_text(encoding="utf-8"), "python")
    assert len(blocks) > 3
    for block in blocks:
        file, *lines = block.splitlines()
        code = (ROOT / file.removeprefix("# ")).read_text(encoding="utf-8").splitlines()
        assert set(lines) <= {line.strip() for line in code}


def test_the_page_on_the_house_names_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    ground_plan = page.partition("## Ground plan")[2].partition("\n## ")[0]
    named = [
        f"{folder}{entry.split()[0].strip('`')}.py"
        for folder, entries in re.findall(r"\n- `(\S+/)` (.+?)(?=\n- |\n\n)", ground_plan, re.DOTALL)
        for entry in " ".join(entries.split()).split(" · ")
    ]
    wings = [ROOT / name for name in ("rlhf_chat", "applications", "training", "inference")]
    modules = [
        str(file.relative_to(ROOT)) for wing in wings for file in wing.rglob("*.py") if file.name != "__init__.py"
    ]
    assert sorted(named) == sorted(modules)
