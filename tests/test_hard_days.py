"""The tests that docs/survival.md names are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_each_row_names_tests_that_are_there():
    rows = [line for line in (ROOT / "docs" / "survival.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| case |")]
    assert len(rows) > 35
    code = {str(file.relative_to(ROOT)): file.read_text() for file in (ROOT / "tests").rglob("*.py")}
    everywhere = "".join(code.values())
    for row in rows:
        named = row.rpartition(" | ")[2]
        files, names = re.findall(r"tests/[\w/]+\.py", named), re.findall(r"\b(test_\w+)\b(?!\.py)", named)
        assert files or names, row
        there = "".join(code[file] for file in files) or everywhere
        for name in names:
            assert f"def {name}(" in there, f"{name} is in none of {files or 'the tests'}"
