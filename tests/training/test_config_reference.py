"""docs/configuration.md is what the settings say, and the settings all say something."""

from pathlib import Path

from training.config import RunConfig
from training.config_files import setting_keys
from training.config_reference import description, groups, reference, settings_of

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def row_of(page: str, heading: str, key: str) -> list[str]:
    """The cells of a setting's row below the heading."""
    part = page[page.index(f"## {heading}\n") :]
    line = next(line for line in part.splitlines() if line.startswith(f"| `{key}` |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "run: python -m training.config_reference > docs/configuration.md"
    )


def test_every_setting_has_a_description():
    silent = [
        f"{group.model.__name__}.{name}"
        for group in groups()
        for name, info in settings_of(group.model)
        if not description(info)
    ]
    assert not silent, f"settings without a docstring in training/config.py: {silent}"


def test_no_setting_is_left_out():
    told = {
        f"{prefix}.{name}".lstrip(".")
        for group in groups()
        for prefix in group.prefixes
        for name, _ in settings_of(group.model)
    }
    containers = {prefix for group in groups() for prefix in group.prefixes}
    assert told | (containers - {""}) == set(setting_keys(RunConfig))


def test_types_bounds_and_defaults():
    page = reference()
    top, kl = "Top level", "`rlhf.kl`"
    assert row_of(page, top, "model")[1:3] == ["text", "required"]
    assert row_of(page, top, "processes")[1:3] == ["whole number, at least 1", "`1`"]
    assert row_of(page, top, "dtype")[1] == "one of `auto`, `fp32`, `bf16`, `fp16`"
    assert row_of(page, "`data`", "data.split")[1:3] == ["3 numbers", "`[2, 4, 4]`"]
    assert row_of(page, "`data`", "data.held_out")[1] == "number, over 0, under 0.5"
    assert row_of(page, kl, "rlhf.kl.coefficient")[1:3] == ["number, at least 0", "`0.05`"]


def test_settings_used_in_several_places_stand_once_with_each_default():
    page = reference()
    heading = "`optimizer`, `sft.optimizer`, `reward.optimizer`, `dpo.optimizer`, `rlhf.actor`, `rlhf.critic`"
    assert row_of(page, heading, "learning_rate")[2] == (
        "`1e-05`; `optimizer`: `by role`; `dpo.optimizer`: `1e-06`; `rlhf.actor`: `1e-06`; `rlhf.critic`: `9e-06`"
    )
    assert row_of(page, heading, "gradient_checkpointing")[2] == "`false`"
    assert page.count("| `weight_decay` |") == 1
