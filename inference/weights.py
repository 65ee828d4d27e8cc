"""Reading a model's weights, all of them and no others: what transformers passes over in silence is a sentence."""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from inference.errors import UserError, copied_again
from inference.families import text_config
from inference.model_files import is_unsafe_pickle, require_usable, unsafe_pickle


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no load report from transformers: what is wrong becomes a UserError."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


OLD_BUFFERS = re.compile(r"(attn|attention)\.(bias|masked_bias|causal_mask)$|inv_freq$|position_ids$")
"""No weights: what older versions of transformers stored with them."""
OTHER_SENSES = re.compile(r"vision|visual|audio|image|speech|multi_modal|multimodal|mm_projector")
"""Parts of a model that reads more than text, of which only the language model is wanted."""


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
    """The first three names, and how many more there are."""
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
    """What to do about a damaged model: that of a finished step is written again from the step's last checkpoint."""
    if (directory.parent / "result.json").is_file():
        return f"delete {directory} and give the command of its step again, which writes it again"
    return "fetch it again, or give another one"


READ_BY_OLDER = frozenset(
    "bloom codegen cohere cohere2 falcon gemma gemma2 gemma3 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox "
    "gptj granite llama mistral mpt opt phi phi3 qwen2 qwen2_moe qwen3 smollm3 stablelm".split()
)
"""Families (`model_type`) of which 4.57 made the same tokens, logits and scores (`make older`)."""
ABSOLUTE_POSITIONS = ("gpt2", "gpt_bigcode", "gpt_neo")
"""Families in which plain transformers counts positions from the first token, padding or not."""
SCORER = {"problem_type": "regression"}
"""Stands in the configuration of a reward model, so that a pipeline leaves the score as it is."""
OF_THIS_MACHINE = ("is_local", "local_files_only", "_name_or_path", "_model_name_or_path")
"""What loading leaves behind, and says nothing of the model."""
SAME_IN_BOTH = ("rope_theta", "partial_rotary_factor")


def rewrite_config(directory: Path, **more: Any) -> None:
    """config.json of a saved model, in place, with `more` in it."""
    rewrite(directory / "config.json", lambda values: old_names(values | more))


def has_old_names(directory: Path) -> bool:
    """Whether config.json says all that 4 reads. A directory that another machine has is taken for one of the hub's."""
    file = directory / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return old_names(values).keys() <= values.keys()


def rewrite_tokenizer(directory: Path, **more: Any) -> None:
    """tokenizer_config.json of a saved model, in place, with `more` in it."""
    rewrite(directory / "tokenizer_config.json", lambda values: tokenizer_values(values | more))


def rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    values = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def old_names(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration and its parts, with what only 5 calls so under the old names too."""
    renamed = {
        key: old_names(part) if isinstance(part, dict) else part
        for key, part in values.items()
        if key not in OF_THIS_MACHINE
    }
    if rope := values.get("rope_parameters"):
        renamed |= old_rope(values.get("model_type", ""), rope)
    if "num_local_experts" in values:
        renamed["num_experts"] = values["num_local_experts"]
    return renamed


def old_rope(kind: str, rope: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of a family as 4 has them: base, share of a head's width, scaling."""
    whole, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if whole and sliding:  # one for each kind of layer
        return {"rope_theta": whole["rope_theta"], "rope_local_base_freq": sliding["rope_theta"]} | scaling(whole)
    if "rope_theta" not in rope:  # other kinds of layers, which 4 does not know
        return {}
    base, share = ("rotary_emb_base", "rotary_pct") if kind.startswith("gpt_neox") else SAME_IN_BOTH
    names = dict(zip(SAME_IN_BOTH, (base, share), strict=True))
    return {old: rope[new] for new, old in names.items() if new in rope} | scaling(rope)


def scaling(rope: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in rope.items() if key not in SAME_IN_BOTH}
    if rest.get("rope_type") == "longrope":  # Phi 3 takes these three alone; the rest stands beside rope_scaling
        rest = {"type": "longrope", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return {"rope_scaling": rest} if rest.keys() - {"rope_type"} else {}


def tokenizer_values(values: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's configuration for both; what a fast one does stands in its tokenizer.json."""
    renamed = {key: value for key, value in values.items() if key not in OF_THIS_MACHINE}
    if renamed.get("tokenizer_class") == "TokenizersBackend":
        renamed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(renamed.get("extra_special_tokens"), list):
        renamed["additional_special_tokens"] = renamed.pop("extra_special_tokens")
    return {"model_input_names": ["input_ids", "attention_mask"]} | renamed  # by itself 4 adds token types
