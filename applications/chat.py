"""`rlhf-chat chat`: models of a run, or a model of any kind, in the terminal or a pipe."""

import gc
from pathlib import Path

from inference.chat_target import find_chat_models
from inference.collecting import without_collecting
from inference.errors import UserError


def chat_command(
    target: Path,
    compare: bool,
    temperature: float,
    top_p: float,
    top_k: int,
    max_tokens: int,
    seed: int,
    system: str | None,
) -> None:
    """`rlhf-chat chat`."""
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"--seed takes a whole number of 64 bits, not {seed}.")
    found = find_chat_models(target, compare)
    with without_collecting():
        from inference.private_surfaces import import_transformers_lightly

        import_transformers_lightly()
        from inference.chat import chat
        from inference.chat_model import ChatModel
        from inference.generation.sample import SamplingSettings

        models = [(label, ChatModel.load(path)) for label, path in found]
        gc.freeze()  # looking through all that is loaded takes longer than the first word
    chat(models, SamplingSettings(max_tokens, temperature, top_p, top_k), seed, system)
