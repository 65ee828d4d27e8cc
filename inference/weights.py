"""Reading a model's weights, all of them and no others: what transformers passes over in silence is a sentence."""

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from textwrap import shorten
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from inference.errors import UserError, copied_again
from inference.families import text_config
from inference.model_files import is_unsafe_pickle, require_usable, unsafe_pickle
from inference.quiet import quiet_transformers

OLD_BUFFERS = re.compile(r"(attn|attention)\.(bias|masked_bias|causal_mask)$|inv_freq$|position_ids$")
"""No weights: what older versions of transformers stored with them."""
OTHER_SENSES = re.compile(r"vision|visual|audio|image|speech|multi_modal|multimodal|mm_projector")
"""Parts of a model that reads more than text, of which only the language model is wanted."""
EXAMPLES = 3


class WrongWeights(UserError):
    """The files hold other weights than the model has."""

    def __init__(self, said: str, missing: set[str], unexpected: set[str], mismatched: Collection[tuple]):
        super().__init__(said)
        self.missing, self.unexpected, self.mismatched = missing, unexpected, mismatched


def read_weights(
    loader: Any,
    directory: Path,
    name: str = "",
    may_miss: Collection[str] = (),
    may_have: Callable[[str], bool] = lambda key: False,
    **options: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """What `loader` (an Auto class) makes of a directory, and which of the weights `may_miss` it made up.

    `may_have` says whether the files may hold a weight that the model has not. `name` is what the user calls the
    directory; `options` are those of from_pretrained: with device_map="meta" all is checked and no weights are read.
    Raises UserError.
    """
    require_usable(directory, name)
    try:
        with quiet_transformers():
            model, report = loader.from_pretrained(
                str(directory),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, in words
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                **options,
            )
    except Exception as error:  # safetensors, json and transformers each raise their own kinds
        raise unloadable(directory, error, name) from error
    whole = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    composite = text_config(whole) is not whole  # of some families the model knows only its own part (Llama 4)
    unexpected = {
        key
        for key in report["unexpected_keys"]
        if not OLD_BUFFERS.search(key) and not (composite and OTHER_SENSES.search(key)) and not may_have(key)
    }
    made_up = set(report["missing_keys"]) & set(may_miss)
    require_same_weights(directory, name, set(report["missing_keys"]) - made_up, unexpected, report["mismatched_keys"])
    return model, made_up


def require_same_weights(
    directory: Path, name: str, missing: set[str], unexpected: set[str], mismatched: Collection[tuple]
) -> None:
    """Raise WrongWeights unless the files hold the model's weights in their shapes, and no others."""
    if not (missing or unexpected or mismatched):
        return
    faults = [f"weights are missing ({some(missing)})"] if missing else []
    if unexpected:
        faults.append(f"there are others, which it has no place for ({some(unexpected)})")
    for weight, has, wanted in sorted(mismatched)[:1]:
        faults.append(f"{weight} has the shape {tuple(has)}, not {tuple(wanted)}")
    raise WrongWeights(
        f"The weights in {name or directory} are not those of the model that its config.json describes: "
        f"{', and '.join(faults)}; {way_out(directory)}.",
        missing,
        unexpected,
        mismatched,
    )


def some(names: Collection[str]) -> str:
    """A few of many names, and how many there are."""
    shown = sorted(names)[:EXAMPLES]
    return ", ".join(shown) + (f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else "")


def unloadable(directory: Path, error: Exception, name: str = "") -> UserError:
    """The sentence for what transformers raised while it loaded a model; a UserError stays what it is."""
    if isinstance(error, UserError):
        return error
    if is_unsafe_pickle(error):
        return UserError(unsafe_pickle(directory))
    for file in sorted(directory.glob("*")):
        if file.is_file() and not os.access(file, os.R_OK):  # safetensors would say that it is not there
            return UserError(f"{file} cannot be read (Permission denied); {copied_again('Permission denied')}.")
    reason = shorten(str(error).strip() or type(error).__name__, 200, placeholder=" ...").rstrip(".")
    return UserError(f"The model in {name or directory} cannot be loaded ({reason}); {way_out(directory)}.")


def way_out(directory: Path) -> str:
    """Of a damaged model: that of a finished step is written anew from the step's last checkpoint."""
    if (directory.parent / "result.json").is_file():
        return f"delete {directory} and give the command of its step again, which writes it anew"
    return "fetch it again, or give another one"
