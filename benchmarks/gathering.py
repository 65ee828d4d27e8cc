"""What it costs two ranks to have all experience of an iteration: seconds, CPU seconds and peak memory of each.

    python -m benchmarks.gathering

Prompts are views of one tensor with the tokens of the whole data set, as `TokenCache` gives them. An iteration gathers
twice: the samples after generation, the numbers after scoring.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPEATS = 5


@dataclass(frozen=True)
class Case:
    name: str
    samples: int
    prompt: int
    """Tokens of each prompt."""
    response: int
    data_tokens: int
    """Of all prompts of the data set."""


CASES = (
    Case("small data", 32, 200, 128, 6_400),
    Case("2 million prompt tokens", 32, 200, 128, 2_000_000),
    Case("many samples", 1024, 200, 512, 204_800),
)


def measure(case: Case) -> dict[str, float]:
    """Called on each rank: medians of a gathering, and the most memory that this process had."""
    import torch

    from training.distributed import start_ranks, stop_ranks
    from training.step3_rlhf.experience import Experience
    from training.step3_rlhf.gathering import gather_experience, gather_scores

    ranks = start_ranks(threads=1)
    all_prompts = torch.arange(case.data_tokens).split(case.prompt)
    prompts = all_prompts[: case.samples]
    drawn = torch.rand(case.response)

    def made(index: int) -> Experience:
        response = torch.arange(case.response)
        return Experience(index, prompts[index], response, drawn, True, drawn, drawn, drawn, 0.5)

    ours = [made(index) for index in range(ranks.rank, case.samples, ranks.size)]
    wall, cpu = [], []
    for _ in range(REPEATS):
        ranks.barrier()
        begun, spent = time.perf_counter(), time.process_time()
        experience = gather_experience(ranks, ours, prompts, ["generation_logprobs"])
        gather_scores(ranks, ours, experience, ["reference_logprobs", "values"])
        wall.append(time.perf_counter() - begun)
        cpu.append((time.process_time() - spent) / 2)
    assert [e.index for e in experience] == list(range(case.samples))
    stop_ranks()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": statistics.median(wall), "cpu": statistics.median(cpu), "memory": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        found = measure(CASES[arguments.case])
        with open(arguments.result, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        return
    print(f"{'':24} seconds an iteration   CPU seconds a gathering and rank   peak memory of a rank")
    for number, case in enumerate(CASES):
        with tempfile.TemporaryDirectory() as scratch:
            result = Path(scratch) / "result.jsonl"
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.processes)]
            ours = ["-m", "benchmarks.gathering", "--case", str(number), "--result", str(result)]
            subprocess.run([sys.executable, *launcher, *ours], check=True)
            of_ranks = [json.loads(line) for line in result.read_text().splitlines()]
        seconds, cpu, memory = (max(found[key] for found in of_ranks) for key in ("seconds", "cpu", "memory"))
        print(f"{case.name:24} {seconds:20.3f} {cpu:34.3f} {memory / 2**20:19.0f} MiB")


if __name__ == "__main__":
    main()
