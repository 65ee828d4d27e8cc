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
    trusts: bool = False,
) -> None:
    """`rlhf-chat chat`."""
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"--seed takes a whole number of 64 bits, not {seed}.")
    name = ""
    if "@" in target.name:
        from training.checkpoint_models import checkpoint_of

        if at := checkpoint_of(target):
            name, target = at.name, at.model(trusts)
    found = find_chat_models(target, compare, model_before(target, trusts) if compare else None)
    with without_collecting():
        from inference.private_surfaces import import_transformers_lightly

        import_transformers_lightly()
        from inference.chat import chat
        from inference.chat_model import ChatModel
        from inference.generation.sample import SamplingSettings

        models = [(name or label, ChatModel.load(path)) for label, path in found]
        gc.freeze()  # looking through all that is loaded takes longer than the first word
    chat(models, SamplingSettings(max_tokens, temperature, top_p, top_k), seed, system)


def model_before(run: Path, trusts: bool) -> tuple[str, Path] | None:
    """What a run was given for SFT, such as the model of the round before; None where it trains its own."""
    from applications.prefer import to_stderr
    from training.kept_models import local_model
    from training.lineage import label_of
    from training.run_directory import RunDirectory
    from training.trust import require_yes
    from training.uses import of_models

    if not (run / "config.yaml").is_file():
        return None
    config = RunDirectory(run).read_config()
    if not config.sft_model:
        return None
    require_yes(run, of_models(RunDirectory(run), config), trusts)
    directory = local_model(RunDirectory(run), config.sft_model, to_stderr)
    return label_of(directory, config.sft_model), directory
