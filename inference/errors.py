"""Errors that end in a sentence instead of a traceback, and the exit codes that go with them."""

import shlex

EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3


class UserError(Exception):
    """Something the user can put right: one sentence that says what is wrong and the way out.

    The command line prints the sentence without a traceback and exits with code 2.
    """


def typed(name: object) -> str:
    """A path or name as it can be typed into a shell, in a command that is printed to be copied."""
    text = str(name)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def reason(error: Exception) -> str:
    """What an error of a library says, for a sentence of ours: the first line, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")


def copied_again(error: object) -> str:
    """The way out for a file of a model that cannot be read; nothing is wrong with it where that is not permitted."""
    return "give yourself the right to read it" if "Permission denied" in str(error) else "copy the model again"
