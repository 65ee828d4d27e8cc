"""rollouts.jsonl: what the policy said in an iteration and what came of it, a line a sample."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from inference.chat_format import ChatFormat
from inference.chat_model import pieces_of, whole_text
from training.rewards import Rewarded
from training.rlhf_settings import RLHFSettings
from training.step3_rlhf import ppo_math
from training.step3_rlhf.update import Batch

DECIMALS = 5


def rollout_lines(
    batch: Batch, rewarded: Rewarded, chat_format: ChatFormat, settings: RLHFSettings
) -> Iterator[dict[str, Any]]:
    """Samples in their order. Rewards are those whose means are metrics; lists of numbers have one for each token of
    the response."""
    targets, tokenizer = batch.targets, chat_format.tokenizer
    by_token = {"logprobs": targets.logprobs, "advantages": targets.advantages}
    if settings.has_reference:
        by_token["kl"] = ppo_math.kl_k1(targets.logprobs, targets.reference_logprobs)
    if settings.has_critic:
        by_token["values"] = targets.values
    numbers = {name: rounded(values) for name, values in by_token.items()}
    penalty, total = rounded(targets.kl_penalty), rounded(targets.total_score - targets.kl_penalty)
    for place, sample in enumerate(batch.experience):
        tokens = pieces_of(sample.response.tolist(), tokenizer)
        yield {
            "sample": place,
            "row": batch.seats[place],
            "prompt": whole_text(sample.prompt.tolist(), tokenizer),
            "response": "".join(tokens),
            "truncated": not sample.ended,
            **{f"reward/{source}": scores[place] for source, (scores, _) in rewarded.parts.items()},
            "reward/score": sample.score,
            "reward/missing_end": 0.0 if sample.ended else -settings.missing_end_penalty,
            "reward/kl": -penalty[place],
            "reward/total": total[place],
            "tokens": tokens,
            **{name: values[place][: len(tokens)] for name, values in numbers.items()},
            "prompt_ids": sample.prompt.tolist(),
            "response_ids": sample.response.tolist(),
        }


def rounded(values: Tensor) -> list[Any]:
    """As floats that are short to write."""
    return ((values.double() * 10**DECIMALS).round() / 10**DECIMALS).tolist()
