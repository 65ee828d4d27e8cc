"""What must hold before the first update of every start, checked, printed and kept in first_update.json.

The actor has not changed since it generated, so training must give the log-probabilities that generation gave, the
ratio must be 1 and the KL from old to new 0. A wrong mask, position, temperature or weight shows here at once.
"""

import torch

from training.run_directory import write_json
from training.stage import Diverged, Stage
from training.step3_rlhf import ppo_math
from training.step3_rlhf.experience import Experience, token_batch
from training.step3_rlhf.roles import Roles

# Mean absolute difference of log-probabilities between cached decoding and the training forward that rounding explains.
# Logits near 16 are 1/16 apart in bf16; a wrong mask or position makes differences of several nats.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}


def check_first_update(stage: Stage, roles: Roles, experience: list[Experience]) -> None:
    """Compare on the shortest micro-batches of every rank; raises Diverged with an explanation where it fails."""
    settings, ranks = stage.config.rlhf, stage.ranks
    whole = settings.min_response_tokens == 0  # else generation drew from a distribution without the end token
    place, ours = roles.places.get("actor_train"), None
    if place is not None:
        shortest = sorted(experience, key=lambda e: e.length)[: -(-len(experience) // settings.mini_batches)]
        rows = [shortest[row] for row in place.micro_batches([e.length for e in shortest])[-1].rows]
        for of_rows in roles.logprobs([token_batch(rows, ranks.device)]):
            logprobs = of_rows.cpu()
            generated = torch.cat([e.generation_logprobs for e in rows])
            old = torch.cat([e.logprobs for e in rows])
            difference = float((logprobs - generated).abs().mean()) if whole else 0.0
            error, kl = float(((logprobs - old).exp() - 1).abs().mean()), float(ppo_math.kl_k3(old, logprobs).mean())
            ours = difference, error, kl
    of_ranks = [each for each in ranks.gather(ours) if each is not None]
    worst, ratio_error = (max(each[i] for each in of_ranks) for i in (0, 1))
    tolerance = TOLERANCE[stage.dtype]
    if worst > tolerance or ratio_error > tolerance:
        raise Diverged(
            f"Before the first update, log-probabilities from generation and from training differ by {worst:.2g} on "
            f"average and the policy ratio from 1 by {ratio_error:.2g} (allowed: {tolerance:g}); training on them "
            f"would teach nonsense. Try dtype=fp32, and report the model: this is a bug."
        )
    found = {"ratio_error": ratio_error, "kl_old": of_ranks[0][2]}
    if whole:
        found["generation_logprob_difference"] = worst
    if ranks.is_first:  # beside the metrics, not in them: a resumed run has more starts, and equal metrics
        write_json(stage.directory.path / "first_update.json", found)
    apart = "equal to the bit" if whole and worst == 0 else f"within {worst:.1e} on average"
    stage.display.say(
        f"PPO: first update checked: ratio 1 within {ratio_error:.1e}, log-probabilities of generation and training "
        f"{apart}"
    )
