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
from dataclasses import dataclass
from pathlib import Path

from training.evaluation.guard_rails import KL, LENGTH, MOST_FREQUENT, PERPLEXITY, VARIETY
from training.run_directory import RunDirectory
from training.steps import METHODS, PPO, REWARD
from training.versions import versions


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
    "reward accuracy": Target("reward accuracy, held-out pairs", "{:.3f}", lowest=0.80),
    "win rate": Target("win rate of PPO by true score", "{:.3f}", lowest=0.70),
    "interval": Target("its 95 % interval, lower end", "{:.3f}"),
    "true score SFT": Target("true score of SFT", "{:.3f}"),
    "true score": Target("true score of PPO", "{:.3f}"),
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


def measures(run: RunDirectory) -> dict[str, float]:
    """One run's figures by the keys of TARGETS."""
    evaluation = json.loads(run.comparison_of(PPO)[0].read_text())
    sft, rlhf, win = evaluation["sft"], evaluation["rlhf"], evaluation["win_rate"]
    return {
        "reward accuracy": run.step(REWARD).read_result()["eval/accuracy"],
        "win rate": win["rate"],
        "interval": win["low"],
        "true score SFT": sft["true_score"],
        "true score": rlhf["true_score"],
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


def table(found: dict[int, dict[str, float]]) -> str:
    """Markdown: a row a measure, a column a seed."""
    lines = ["| | target | " + " | ".join(f"seed {seed}" for seed in found) + " |", "|---|---|" + "---|" * len(found)]
    for key, target in TARGETS.items():
        values = " | ".join(target.text(measured[key]) for measured in found.values())
        lines.append(f"| {target.label} | {target.bound} | {values} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--directory", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    found = {}
    for seed in arguments.seeds:
        run = RunDirectory((arguments.directory / f"demo-seed-{seed}").resolve())
        if not run.comparison_of(PPO)[0].exists():
            program = [sys.executable, "-P", "-m", "rlhf_chat", "run", "--name", str(run.path)]
            subprocess.run([*program, "--model", arguments.model, "--seed", str(seed)], check=True)
        found[seed] = measures(run)
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"\n{table(found)}\n\n{os.cpu_count()} cores ({platform.machine()}), {used}")
    missed = [key for one in found.values() for key, target in TARGETS.items() if "missed" in target.text(one[key])]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
