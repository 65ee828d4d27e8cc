"""Before PPO: does the reward model rank held-out pairs better than a coin? Whoever trained it."""

import torch

from inference.chat_format import ChatFormat
from training.calls import REWARD_SCORE
from training.data.batching import MicroBatch, TokenBatch, plan_micro_batches
from training.data.rows import read_rows
from training.data.token_cache import TokenPair, rows_of
from training.evaluation.statistics import DOUBTFUL_ACCURACY
from training.run_directory import read_json, write_json
from training.stage import Stage
from training.step3_rlhf.places import CallPlace
from training.step3_rlhf.roles import Roles
from training.steps import REWARD


def look_at_reward_model(stage: Stage, roles: Roles, chat_format: ChatFormat) -> None:
    """Say the accuracy: as step 2 found it, else measured, and kept for later starts in reward_accuracy.json.

    All ranks call it.
    """
    if not stage.config.rlhf.has_reward_model:
        return
    if of_step_2 := stage.ranks.tell(accuracy_of_step_2(stage), "a look at step 2's accuracy"):
        stage.display.say(sentence(*of_step_2))
        return
    file = stage.directory.reward_accuracy_file
    known = stage.ranks.tell(file.exists(), "a look at the reward model's accuracy")
    stage.ranks.see(file)
    found = read_json(file, f"delete {file}") if known else measure(stage, roles, chat_format)
    if not known and stage.ranks.is_first:
        write_json(file, found)
    stage.display.say(sentence(found["accuracy"], found["pairs"]))


def accuracy_of_step_2(stage: Stage) -> tuple[float, int] | None:
    """Of the reward model that this run trained, on how many pairs; None of another's, and of an early version."""
    step = stage.run.step(REWARD)
    if stage.config.given_model(REWARD) or not (stage.ranks.is_first and step.is_finished):
        return None
    found = step.read_result().get("reward_accuracy", {}).get("all")
    return (found["rate"], found["pairs"]) if found else None


def measure(stage: Stage, roles: Roles, chat_format: ChatFormat) -> dict[str, float]:
    """Accuracy on the run's held-out pairs, and how many they are."""
    file = stage.run.data / "pairs_eval.jsonl"
    stage.ranks.see(file)
    rows = read_rows(file) if file.exists() else []
    pairs = stage.token_pairs(rows[: stage.config.reward.eval_rows], chat_format) if rows else []
    place, right = roles.places.get(REWARD_SCORE.name), 0.0
    with roles.scoring(), roles.present([REWARD_SCORE]):
        shares = shared(pairs, place, stage.config.rlhf.micro_batch_tokens) if pairs and place else []
        texts = (rows_of([pairs[row] for row in share.rows]) for share in shares)
        scores = roles.score("reward", [TokenBatch.of(each, stage.ranks.device) for each in texts]) if shares else []
        for share, found in zip(shares, scores, strict=bool(scores)):
            chosen, rejected = found.chunk(2)
            right += float((chosen > rejected).sum()) * share.weight
    speaks = place is not None and place.speaks
    right = float(stage.ranks.sum(torch.tensor([right if speaks else 0.0]))[0])
    return {"accuracy": right / max(1, len(pairs)), "pairs": len(pairs)}


def shared(pairs: list[TokenPair], place: CallPlace, tokens: int) -> list[MicroBatch]:
    """This rank's part of the pairs, in micro-batches of so many tokens."""
    data = place.assignment.layout.data
    return plan_micro_batches([pair.tokens for pair in pairs], tokens, data)[place.data_rank]


def sentence(accuracy: float, pairs: float) -> str:
    if not pairs:
        return (
            "Warning: the data hold out no pairs of a chosen and a rejected answer, so it is not known how well the "
            "reward model ranks answers; PPO follows it unseen."
        )
    if accuracy >= DOUBTFUL_ACCURACY:
        return f"Reward model: {accuracy:.1%} of {pairs} held-out pairs ranked right"
    return (
        f"Warning: the reward model ranks only {accuracy:.1%} of {pairs} held-out pairs right, a coin 50%. PPO will "
        f"follow noise. Stop here (Ctrl-C) and give a better one (rlhf-chat rlhf RUN --reward-model MODEL, with a "
        f"new RUN), or train step 2 anew in a new run: more pairs, more reward.epochs or reward.max_steps, a "
        f"higher reward.optimizer.learning_rate, or a larger --reward-model; and read twenty "
        f"pairs: can you tell which is chosen? (docs/step2_reward.md)"
    )
