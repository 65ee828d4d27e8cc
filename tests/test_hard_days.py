"""The tests that docs/hard_days.md names are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_each_row_names_tests_that_are_there():
    rows = [line for line in (ROOT / "docs" / "hard_days.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| case |")]
    assert len(rows) > 40
    for row in rows:
        named = row.rpartition(" | ")[2]
        files = re.findall(r"tests/[\w/]+\.py", named)
        assert files, row
        code = "".join((ROOT / file).read_text() for file in files)
        for name in re.findall(r"::(\w+)", named):
            assert f"def {name}(" in code, f"{name} is in none of {files}"
