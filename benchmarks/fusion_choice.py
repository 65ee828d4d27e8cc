"""How long the first rank takes to choose the threshold of inter-stage fusion, by the number of instances.

    python -m benchmarks.fusion_choice --instances 8 64

Lengths and costs are those of the published setting (`benchmarks.fusion_simulation`), 16 samples an instance.
"""

import argparse
import time

from benchmarks.fusion_simulation import (
    MICRO_BATCH_TOKENS,
    MODELS,
    PROMPT_TOKENS,
    SLOTS,
    UNIT_TOKENS,
    Case,
    instance_costs,
)
from training.fusion.choice import FusionChoice, Setting
from training.fusion.costs import LengthStatistics

SAMPLES = 16
"""Of an instance."""
LONGEST = 1024


def a_choice(instances: int) -> FusionChoice:
    """What a run knows after a rollout."""
    setting = Setting(
        mode="auto",
        instances=instances,
        tensor=1,
        slots=SLOTS,
        samples=SAMPLES * instances,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        unit_tokens=UNIT_TOKENS,
    )
    lengths = LengthStatistics(LONGEST)
    lengths.add(
        {0: [job.response for seed in (0, 1) for jobs in Case("13B", "33B", LONGEST).rollout(seed) for job in jobs]}
    )
    prompts = [PROMPT_TOKENS] * setting.samples
    return FusionChoice(setting, lengths, instance_costs(MODELS["13B"], MODELS["33B"]), prompts=prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, nargs="+", default=[8, 32, 64])
    for instances in parser.parse_args().instances:
        fusion = a_choice(instances)
        begun, spent = time.perf_counter(), time.process_time()
        choice = fusion.choose(1)
        wall, cpu = time.perf_counter() - begun, time.process_time() - spent
        print(f"{instances:4} instances: {wall:6.2f} s ({cpu:.2f} s of CPU); {choice}", flush=True)


if __name__ == "__main__":
    main()
