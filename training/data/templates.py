"""Rows that the model's chat template refuses are bad rows, as those that cannot be read are."""

from collections.abc import Sequence

from inference.chat_format import ChatFormat
from training.data.entries import BadRow
from training.data.rows import Row


def require_accepted(rows: Sequence[Row], chat_format: ChatFormat) -> None:
    """Raise BadRow where the template refuses a prompt, with the way out that there is."""
    prompt = rows[-1]["prompt"]  # of a conversation the longest, which begins with all the others
    if why := chat_format.refusal(prompt):
        what = "the model's chat template refuses the row"
        if prompt[0]["role"] == "system" and not chat_format.refusal(prompt[1:]):
            what = "the model's chat template refuses a system message, whose text can stand before the question"
        raise BadRow(f"{what} ({why})")
