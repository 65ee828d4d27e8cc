"""The one error that a user can cause."""


class UserError(Exception):
    """Something the user can put right: one sentence that says what is wrong and the way out.

    The command line prints the sentence without a traceback and exits with code 2.
    """
