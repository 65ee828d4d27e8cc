"""Runs that were never trained: tiny models put where the steps would leave them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from inference.chat_format import ChatFormat
from inference.families import build_tiny_model
from training.merging import merge
from training.models.loading import load_causal_lm, load_scorer, save_model
from training.models.policy import add_lora
from training.role_settings import LoRASettings
from training.run_directory import RunDirectory
from training.steps import PPO, REWARD, SFT

QUESTIONS = ("Hello?", "How was your day?", "Any plans?", "Name a colour.", "Why not?", "Tell me about the sea.")
SETTINGS = {
    "dtype": "fp32",
    "data": {"max_prompt_tokens": 48, "max_response_tokens": 12},
    "rlhf": {"micro_batch_tokens": 128, "generation_batch": 4, "temperature": 0.7},
    "evaluation": {"prompts": 6, "rows": 4, "true_score": "none"},
}


def messages(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def make_tiny_run(
    path: Path, lora_rank: int = 0, build_base: Callable[[Path], None] = build_tiny_model, has_reward: bool = True
) -> RunDirectory:
    """Base model, SFT, reward model and RLHF, all different; held-out rows of each kind.

    With a rank, SFT is the base model with an adapter and RLHF is SFT with another one.
    """
    build_base(path / "base")
    chat_format = ChatFormat.load(path / "base")
    run = RunDirectory(path / "run")
    run.data.mkdir(parents=True)
    lora = LoRASettings(rank=lora_rank, alpha=2 * lora_rank or 1)
    adapted = {"lora": {"rank": lora.rank, "alpha": lora.alpha}}
    settings = merge(SETTINGS, {"sft": {"optimizer": adapted}, "rlhf": {"actor": adapted}})
    run.config_file.write_text(yaml.safe_dump({"model": str(path / "base"), **settings}))
    for step, source, seed in ((SFT, path / "base", 1), (PPO, run.step(SFT).model, 2)):
        run.step(step).path.mkdir(parents=True)
        adapter = run.step(step).adapter if lora_rank else None
        trained = shaken_weights(source, chat_format, lora, seed)
        model = load_causal_lm(source, chat_format, torch.float32)
        save_model(run.step(step).model, model, chat_format, trained, lora, torch.float32, None, adapter)
        counted = {"iterations": 3} if step.draws_samples else {"optimizer_steps": 4, "rows": 16}
        run.step(step).result_file.write_text(json.dumps({**counted, "seconds": 65.0}))
    if has_reward:
        torch.manual_seed(3)
        scorer, extra = load_scorer(path / "base", chat_format, torch.float32), {"score_shift": 0.5, "score_scale": 2.0}
        save_model(run.step(REWARD).model, scorer, chat_format, {}, LoRASettings(), torch.float32, extra)
        run.step(REWARD).result_file.write_text(json.dumps({"optimizer_steps": 5, "rows": 9, "seconds": 5.0}))
    rows = {
        "prompts": [{"prompt": messages(text), "held_out_question": i < 2} for i, text in enumerate(QUESTIONS)],
        "sft": [{"prompt": messages(text), "response": f"I say {text.lower()}"} for text in QUESTIONS],
        "pairs": [{"prompt": messages(t), "chosen": "Good day to you.", "rejected": "No."} for t in QUESTIONS],
    }
    for kind, found in rows.items():
        (run.data / f"{kind}_eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return run


def shaken_weights(source: Path, chat_format: ChatFormat, lora: LoRASettings, seed: int) -> dict[str, torch.Tensor]:
    """What training would have changed, a little off where it began."""
    model = load_causal_lm(source, chat_format, torch.float32)
    if lora.rank:
        add_lora(model, lora)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: weight.detach() + 0.05 * torch.randn(weight.shape, generator=generator)
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
