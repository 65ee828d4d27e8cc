"""The tests that docs/survival.md and hard_days.md name are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
BY_HAND = 1
"""Rows that say so: the whole data preparation on a disk of its own."""


def test_each_row_names_tests_that_are_there():
    pages = ROOT / "docs" / "survival.md", ROOT / "tests" / "hard_days.md"
    rows = [line for page in pages for line in page.read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| case |")]
    assert len(rows) > 130
    code = {str(file.relative_to(ROOT)): file.read_text() for file in (ROOT / "tests").rglob("*.py")}
    everywhere = "".join(code.values())
    unnamed = []
    for row in rows:
        named = row.rpartition(" | ")[2]
        files, names = re.findall(r"tests/[\w/]+\.py", named), re.findall(r"\b(test_\w+)\b(?!\.py)", named)
        there = "".join(code[file] for file in files) or everywhere
        for name in names:
            assert f"def {name}(" in there, f"{name} is in none of {files or 'the tests'}"
        unnamed += [] if files or names else [row]
    assert len(unnamed) <= BY_HAND, unnamed
