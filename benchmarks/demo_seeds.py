"""The laptop demo with several seeds: what it reached, against what it has to reach.

    python -m benchmarks.demo_seeds --seeds 1 2 3

Runs (or goes on with) runs/demo-seed-N for each seed and prints a Markdown table. Exit code 1 where a target is missed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.rows import read_rows
from training.evaluation.panel import Judged, PairMean, pooled
from training.evaluation.statistics import KL, LENGTH, MOST_FREQUENT, PERPLEXITY, VARIETY
from training.run_directory import RunDirectory, versions
from training.steps import METHODS, PPO, REWARD


@dataclass(frozen=True)
class Target:
    label: str
    form: str
    lowest: float = float("-inf")
    highest: float = float("inf")

    def text(self, value: float) -> str:
        """The value, with a mark where the target is missed."""
        return self.form.format(value) + ("" if self.lowest <= value <= self.highest else " (missed)")

    @property
    def bound(self) -> str:
        low = f">= {self.lowest:g}" if self.lowest > float("-inf") else ""
        high = f"<= {self.highest:g}" if self.highest < float("inf") else ""
        return " and ".join(filter(None, (low, high))) or "-"


TARGETS = {
    "agreement": Target("agreement with the panel, held-out tweets", "{:.3f}", lowest=0.93),
    "agreement low": Target("its 95 % interval, lower end", "{:.3f}"),
    "one person": Target("one person's", "{:.3f}"),
    "lexicon": Target("the lexicon's", "{:.3f}"),
    "reviews": Target("agreement, product reviews", "{:.3f}"),
    "reviews lexicon": Target("the lexicon's", "{:.3f}"),
    "editorials": Target("agreement, editorials", "{:.3f}"),
    "editorials lexicon": Target("the lexicon's", "{:.3f}"),
    "films": Target("agreement, film reviews", "{:.3f}"),
    "films lexicon": Target("the lexicon's", "{:.3f}"),
    "win rate": Target("win rate of PPO by the lexicon", "{:.3f}", lowest=0.66),
    "win rate low": Target("its 95 % interval, lower end", "{:.3f}"),
    "unseen": Target("win rate, questions not trained on", "{:.3f}"),
    "lexicon SFT": Target("upbeat score of SFT", "{:.3f}"),
    "lexicon PPO": Target("upbeat score of PPO", "{:.3f}"),
    "learned reward SFT": Target("learned reward of SFT", "{:.2f}"),
    "learned reward": Target("learned reward of PPO", "{:.2f}"),
    "kl": Target("KL, nats a reply", "{:z.2f}", highest=KL.high),
    "length ratio": Target("length, PPO / SFT", "{:.2f}", LENGTH.low, LENGTH.high),
    "ended": Target("ended fraction of PPO", "{:.3f}"),
    "bigram ratio": Target("distinct bigrams, PPO / SFT", "{:.2f}", lowest=VARIETY.low),
    "most frequent": Target("share of the most frequent reply", "{:.3f}", highest=MOST_FREQUENT.high),
    "perplexity ratio": Target("perplexity under the untouched model, PPO / SFT", "{:.2f}", highest=PERPLEXITY.high),
    "minutes": Target("training, minutes", "{:.1f}", highest=15.0),
}
MEAN_WIN_RATE = Target("win rate, mean over the seeds", "{:.3f}", lowest=0.72)


def measures(run: RunDirectory) -> dict[str, float]:
    """One run's figures by the keys of TARGETS."""
    evaluation = json.loads(run.comparison_of(PPO)[0].read_text())
    sft, rlhf, win, panel = (evaluation[key] for key in ("sft", "rlhf", "win_rate", "panel"))
    tweets = panel["tweets"]
    others = {"reviews": "product reviews", "editorials": "editorials", "films": "film reviews"}
    return {
        "agreement": tweets["learned"]["rate"],
        "agreement low": tweets["learned"]["low"],
        "one person": tweets["person"]["rate"],
        "lexicon": tweets["lexicon"]["rate"],
        **{key: panel[domain]["learned"]["rate"] for key, domain in others.items()},
        **{f"{key} lexicon": panel[domain]["lexicon"]["rate"] for key, domain in others.items()},
        "win rate": win["rate"],
        "win rate low": win["low"],
        "unseen": evaluation["win_rate_unseen_questions"]["rate"],
        "lexicon SFT": sft["true_score"],
        "lexicon PPO": rlhf["true_score"],
        "learned reward SFT": sft["learned_reward"],
        "learned reward": rlhf["learned_reward"],
        "kl": rlhf["kl"],
        "length ratio": rlhf["length"] / sft["length"],
        "ended": rlhf["ended_fraction"],
        "bigram ratio": rlhf["distinct_bigrams"] / sft["distinct_bigrams"],
        "most frequent": rlhf["most_frequent_share"],
        "perplexity ratio": rlhf["perplexity_untouched"] / sft["perplexity_untouched"],
        "minutes": sum(run.step(step).read_result()["seconds"] for step in METHODS["ppo"]) / 60,
    }


def over_lexicon(runs: Sequence[RunDirectory]) -> str:
    """How much more often than the lexicon the reward models agree with the panel on held-out tweets, over all runs."""
    rows = [[row for row in read_rows(run.step(REWARD).panel_file) if row["domain"] == "tweets"] for run in runs]
    texts = [[row["response"] for row in each] for each in rows]
    difference = pooled([over_lexicon_of(each) for each in rows], texts).difference()
    return "{rate:+.4f} (95 % interval {low:+.4f} to {high:+.4f})".format(**difference)


def table(found: dict[int, dict[str, float]]) -> str:
    """Markdown: a row a measure, a column a seed."""
    lines = ["| | target | " + " | ".join(f"seed {seed}" for seed in found) + " |", "|---|---|" + "---|" * len(found)]
    for key, target in TARGETS.items():
        values = " | ".join(target.text(measured[key]) for measured in found.values())
        lines.append(f"| {target.label} | {target.bound} | {values} |")
    return "\n".join(lines)


def over_lexicon_of(lines: Sequence[Any]) -> PairMean:
    """Of lines that `write_scores` wrote."""
    scores, lexicon = ([line[judge] for line in lines] for judge in ("learned", "lexicon"))
    return Judged.of([line | {"ratings": [0]} for line in lines], scores, lexicon).over_lexicon()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--directory", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    found, runs = {}, []
    for seed in arguments.seeds:
        run = RunDirectory((arguments.directory / f"demo-seed-{seed}").resolve())
        if not run.comparison_of(PPO)[0].exists():
            program = [sys.executable, "-P", "-m", "rlhf_chat", "run", "--name", str(run.path)]
            subprocess.run([*program, "--model", arguments.model, "--seed", str(seed)], check=True)
        runs.append(run)
        found[seed] = measures(run)
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    mean = sum(one["win rate"] for one in found.values()) / len(found)
    print(f"\n{table(found)}\n\n{MEAN_WIN_RATE.label} ({MEAN_WIN_RATE.bound}): {MEAN_WIN_RATE.text(mean)}")
    print(f"agreement with the panel, reward model less lexicon, pooled over the seeds: {over_lexicon(runs)}")
    print(f"{os.cpu_count()} cores ({platform.machine()}), {used}")
    missed = [key for one in found.values() for key, target in TARGETS.items() if "missed" in target.text(one[key])]
    return 1 if missed or "missed" in MEAN_WIN_RATE.text(mean) else 0


if __name__ == "__main__":
    sys.exit(main())
