"""Which tests `make quick` runs."""

from tests.touched import ALWAYS, touched


def test_what_imports_a_changed_module():
    assert touched({"training/formulas/own.py"}) == ["tests/training/formulas/test_own.py", *ALWAYS]


def test_what_imports_it_by_a_helper_of_the_tests():
    reached = touched({"training/models/policy.py"})
    assert "tests/applications/test_export.py" in reached and "tests/tiny_runs.py" not in reached


def test_what_names_a_changed_file():
    assert "tests/training/test_old_run.py" in touched({"tests/data/old_run"})


def test_the_longest_come_only_where_they_changed_themselves():
    long = "tests/test_survival.py"
    assert long not in touched({"benchmarks/kill_and_resume.py"}) and long in touched({long})
