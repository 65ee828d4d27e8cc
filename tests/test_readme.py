"""The commands of the README, and of its second page, run as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = "README.md", "docs/preferences.md"
BLOCKS = [
    block.replace("runs/demo", "runs/readme")  # which the README's first command made of `tiny`
    for page in PAGES
    for block in re.findall(r"<!-- test -->\n```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
]


NOT_FOR_CHAT = {
    "accelerate", "datasets", "deepspeed", "peft", "scipy", "sklearn", "torch._dynamo", "torch._inductor",
    "torch.distributed.tensor", "training.stage", "training.stage_script",
}  # fmt: skip
"""To import them takes a second or more, and a chat needs none of them."""


@pytest.fixture(scope="module")
def fresh_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "tests" / "data", directory / "tests" / "data")
    return directory


def test_the_readme_has_commands_to_test():
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip()[:60])
def test_command(block, fresh_directory):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=fresh_directory,
        env={**os.environ, "PATH": path, **({"PYTHONPROFILEIMPORTTIME": "1"} if "rlhf-chat chat" in block else {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.strip()
    if "rlhf-chat chat" in block:
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "torch" in imported and not imported & NOT_FOR_CHAT
