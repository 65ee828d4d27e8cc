"""`rlhf-chat export`: a model of a run as a directory that others can load or upload, with its card."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from applications.model_card import Exported, is_hub_id, model_card
from inference.disk import writing
from inference.errors import UserError, typed
from inference.model_files import refuse_code
from inference.weights import SCORER, rewrite_config, rewrite_tokenizer
from training.checkpoints import checkpoint_of
from training.config import RunConfig
from training.lineage import origin_of
from training.run_directory import RunDirectory, StepDirectory, write_directory
from training.steps import COMPARED, SFT, STEPS, Step, step_of

KINDS = ("merged", "adapter")
DTYPES = ("fp32", "bf16", "fp16")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def export(path: Path, to: Path, what: str, dtype: str, name: str, trusts: bool = False) -> None:
    """Write the directory `to` and say what is in it. Raises UserError before anything is written."""
    at = checkpoint_of(path)
    run = at.run if at else RunDirectory(path)
    config = run.read_config()
    steps = ("", *(step.command for step in STEPS))
    for given, allowed, option in ((what, KINDS, "--what"), (name, steps, "--step"), (dtype, ("", *DTYPES), "--dtype")):
        if given not in allowed:
            raise UserError(f"{option} takes {', '.join(filter(None, allowed))}, not '{given}'.")
    step = step_of(name) if name else next((last for last in COMPARED if run.step(last).is_finished), SFT)
    if at is None:
        run.require_model(step)
    elif name:
        raise UserError(f"{path} says which step's model is meant: leave --step out.")
    else:
        step = at.step
    require_free(to)
    directory = at.opened(trusts) if at else run.step(step)
    refuse_code(directory.model)
    base, adapters = "", list[Path]()
    if what == "adapter":
        if dtype:
            raise UserError("--dtype is for --what merged: an adapter stays as it was trained.")
        if step.leaves_scorer:
            raise UserError("A reward model is exported whole, its score head is no part of an adapter: --what merged.")
        base, adapters = adapters_of(run, config, step, directory.adapter)

    def write(target: Path) -> None:
        if adapters:
            write_adapter(adapters, directory, base, target)
        else:
            write_merged(directory, dtype, config, target, step.leaves_scorer)
        lies_on = base_directory(adapters[0]) if adapters else None
        exported = Exported(
            to.resolve().name, directory, what, dtype or config.save_dtype, base, lies_on, at.number if at else None
        )
        card = model_card(run, config, exported, target)
        (target / "README.md").write_text(card, encoding="utf-8")

    with writing("the export", to, "or choose another place with --out"):
        write_directory(to.resolve(), write)
    size = sum(file.stat().st_size for file in to.iterdir()) / 1e6
    files = ", ".join(sorted(file.name for file in to.iterdir()))
    print(f"Exported {step.command} ({what}) to {to} ({size:,.1f} MB): {files}")
    if adapters and not is_hub_id(base):
        print("adapter_config.json names the base by its path here: write there what others call it.")
    print(f"Read README.md before you upload it: hf upload OWNER/{typed(to.resolve().name)} {typed(to)}")


def require_free(to: Path) -> None:
    """Raise UserError unless `to` is new or an empty directory."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} exists and is not empty; nothing is overwritten, choose another place with --out.")


def write_merged(step: StepDirectory, dtype: str, config: RunConfig, target: Path, is_scorer: bool) -> None:
    """The step's model with its tokenizer; in another number format if `dtype` says so."""
    skipped = WEIGHTS if dtype else ()
    copy_files(step.model, target, skipped)
    if dtype:
        save_weights(step.model, dtype, target, is_scorer)
    if is_scorer:  # all is as step 2 saves it, unless an older version of ours did
        from inference.chat_format import ChatFormat

        rewrite_config(target, **SCORER)
        ChatFormat.load(step.model).save(target, scored=True)
        return
    rewrite_config(target)
    rewrite_tokenizer(target)
    file = target / "generation_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values |= {"do_sample": True, "max_new_tokens": config.data.max_response_tokens}
    values |= {"temperature": config.rlhf.temperature}
    file.write_text(json.dumps(values, indent=2) + "\n")


def copy_files(source: Path, target: Path, skipped: Sequence[str]) -> None:
    """All files but those of the patterns `skipped`, as new ones: a run that may only be read has other rights."""
    for file in source.rglob("*"):
        if file.is_file() and not any(file.match(pattern) for pattern in skipped):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def save_weights(model_directory: Path, dtype: str, target: Path, is_scorer: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    import training.hybrid_engine.deepspeed_setup  # noqa: F401  transformers imports DeepSpeed to save: without a word
    from inference.weights import quiet_transformers, read_weights
    from training.models.loading import TORCH_DTYPES

    model: Any
    loader = AutoModelForSequenceClassification if is_scorer else AutoModelForCausalLM
    model, _ = read_weights(loader, model_directory, dtype=TORCH_DTYPES[dtype])
    with quiet_transformers():
        model.save_pretrained(target)


def adapters_of(run: RunDirectory, config: RunConfig, step: Step, adapter: Path) -> tuple[str, list[Path]]:
    """The base model's name and the adapters that lie on it, first to last. Raises UserError where there are none."""
    if not adapter.is_dir():
        raise UserError(f"The {step.name} model has no adapter, all its weights were trained: use --what merged.")
    source = config.sft_model or str(run.step(SFT).model) if step.starts_from else config.model
    below = origin_of(source)
    if below is None:
        return source, [adapter]
    lies_below = Path(source).with_name("adapter")
    if not lies_below.is_dir():
        raise UserError(
            f"The adapter lies on the {below.step.name} model of {below.run.path}, all of whose weights were trained, "
            f"and fits no model that others have; export with --what merged."
        )
    base, adapters = adapters_of(below.run, below.run.read_config(), below.step, lies_below)
    return base, [*adapters, adapter]


def base_directory(adapter: Path) -> Path:
    """Where the model lies that an adapter was trained on."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return Path(settings["base_model_name_or_path"]).absolute()


def write_adapter(adapters: list[Path], step: StepDirectory, base: str, target: Path) -> None:
    """One PEFT adapter that does what `adapters` do one after the other, with the tokenizer.

    W + s1 B1 A1 + s2 B2 A2 is W + [s1 B1, s2 B2] [A1; A2]: an adapter whose rank is the sum, scaled by 1.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    try:
        settings = [json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")) for adapter in adapters]
        weights = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]  # no other format is read
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"The adapter of {step.path} cannot be read ({error}): export with --what merged.") from error
    if any(tensors.keys() != weights[0].keys() for tensors in weights):
        raise UserError("Steps 1 and 3 have adapters on different layers, which make no single one: use --what merged.")
    scales = [adapter["lora_alpha"] / adapter["r"] for adapter in settings]
    joined = {}
    for key in weights[0]:
        parts = [tensors[key] for tensors in weights]
        if re.search(r"\.lora_(embedding_)?B\b", key):
            joined[key] = torch.cat([scale * part for scale, part in zip(scales, parts, strict=True)], dim=1)
        elif re.search(r"\.lora_(embedding_)?A\b", key):
            joined[key] = torch.cat(parts, dim=0)
        else:
            raise UserError(f"The adapter holds {key}, which is no LoRA matrix; export with --what merged.")
    rank = sum(adapter["r"] for adapter in settings)
    base_name = base if is_hub_id(base) else str(base_directory(adapters[0]))
    merged = settings[-1] | {"r": rank, "lora_alpha": rank, "base_model_name_or_path": base_name}
    save_file({key: value.contiguous() for key, value in joined.items()}, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text(json.dumps(merged, indent=2) + "\n")
    skipped = (*WEIGHTS, "config.json", "generation_config.json")
    copy_files(step.model, target, skipped)
    rewrite_tokenizer(target)


def write_text(file: Path, text: str) -> None:
    """Write a file and make the directories above it. Raises UserError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); name a file in a directory of yours.") from error
