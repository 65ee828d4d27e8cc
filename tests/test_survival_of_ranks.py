"""As test_survival.py, with two processes; a file of its own, for it takes as long again."""

from tests.test_survival import require_survival


def test_killed_ranks_end_with_the_same_weights_and_metrics(tmp_path, capsys):
    require_survival(tmp_path, 2, capsys)
