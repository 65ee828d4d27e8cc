"""The small files of a saved model, in words that transformers 4 (tried: 4.57) reads as 5 does.

5 writes the base of rotary positions, classes and special tokens under names of its own, which 4 passes over in silence
or cannot open. Old names stand beside new ones where both are read, else in their place.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

READ_BY_OLDER = frozenset(
    "bloom codegen cohere cohere2 falcon gemma gemma2 gemma3 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox "
    "gptj granite llama mistral mpt opt phi phi3 qwen2 qwen2_moe qwen3 smollm3 stablelm".split()
)
"""Families (`model_type`) of which 4.57 made the same tokens, logits and scores (`make older`)."""
ABSOLUTE_POSITIONS = ("gpt2", "gpt_bigcode", "gpt_neo")
"""Families in which plain transformers counts positions from the first token, padding or not."""
SCORER = {"problem_type": "regression"}
"""In the configuration of a reward model, so that a pipeline leaves the score as it is."""
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
    found = {key: old_names(part) if isinstance(part, dict) else part for key, part in values.items()}
    found = {key: part for key, part in found.items() if key not in OF_THIS_MACHINE}
    if rope := values.get("rope_parameters"):
        found |= old_rope(values.get("model_type", ""), rope)
    if "num_local_experts" in values:
        found["num_experts"] = values["num_local_experts"]
    return found


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
    if (
        rest.get("rope_type") == "longrope"
    ):  # Phi 3 takes these three and no others; the rest stands beside rope_scaling
        rest = {"type": "longrope", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return {"rope_scaling": rest} if rest.keys() - {"rope_type"} else {}


def tokenizer_values(values: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's configuration for both; what a fast one does stands in its tokenizer.json."""
    found = {key: value for key, value in values.items() if key not in OF_THIS_MACHINE}
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return {"model_input_names": ["input_ids", "attention_mask"]} | found  # by itself 4 adds token types
