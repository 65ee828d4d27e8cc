"""DeepSpeed-Chat's plan in our cost model beside DeepSpeed-Chat's published hours of step 3.

    python -m benchmarks.deepspeed_chat_hours

Published in its repository (applications/DeepSpeed-Chat of DeepSpeedExamples): OPT actors with a 350M critic and reward
model, 135 million tokens, which is about 264,000 samples of 256 + 256 tokens. Its batch is at most 1,024 samples, one
optimiser step each. Nothing here is fitted to these hours: the constants come from ReaLHF's times. The calls of
DeepSpeed-Chat wait for no controller, so that constant is 0.
"""

import statistics

from applications.fit import find_shape
from inference.errors import UserError
from training.calls import DataflowGraph
from training.planner.cost import CallCosts
from training.planner.hardware import Cluster
from training.planner.reallocation_cost import AugmentedGraphs
from training.planner.search import Estimate, deepspeed_chat_plan, estimate
from training.planner.workload import Workload

SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS, BATCH = 264_000, 256, 256, 1024
CRITIC = "opt-350m"
PUBLISHED: dict[tuple[int, int, str], dict[str, float]] = {
    (1, 1, "a100-80g"): {"opt-1.3b": 11.7, "opt-6.7b": 40.8, "opt-13b": 117.6},
    (1, 8, "a100-40g"): {"opt-1.3b": 2.0, "opt-6.7b": 5.7, "opt-13b": 10.8, "opt-30b": 44.4},
    (1, 8, "a100-80g"): {"opt-1.3b": 1.4, "opt-6.7b": 4.1, "opt-13b": 9.0, "opt-30b": 18.0, "opt-66b": 50.4},
    (8, 8, "a100-80g"): {"opt-1.3b": 0.52, "opt-6.7b": 0.85, "opt-13b": 1.25, "opt-30b": 4.0, "opt-66b": 7.5},
}
"""Hours, by nodes, GPUs of each, device, and actor."""


def predict(nodes: int, gpus: int, device: str, actor: str) -> Estimate:
    """One iteration. Raises UserError where no such plan fits."""
    large, small = find_shape(f"facebook/{actor}", None), find_shape(f"facebook/{CRITIC}", None)
    assert large is not None and small is not None
    shapes = {"actor": large, "reference": large, "critic": small, "reward": small}
    workload = Workload.of(shapes, BATCH, PROMPT_TOKENS, RESPONSE_TOKENS, mini_batches=1, precision="fp16")
    cluster = Cluster.named(device, nodes, gpus).without_controller
    graphs = AugmentedGraphs(DataflowGraph.of("ppo"), CallCosts(workload, cluster))
    return estimate(deepspeed_chat_plan(graphs.graph, workload, cluster), graphs)


def main() -> None:
    print("| GPUs | actor | published, h | predicted, h | error | generate, score, train, h | tensor | micro-batches |")
    print("|---|---|---|---|---|---|---|---|")
    errors = []
    for (nodes, gpus, device), hours in PUBLISHED.items():
        for actor, published in hours.items():
            what = f"| {nodes * gpus} x {device} | {actor} | {published:g} |"
            try:
                found = predict(nodes, gpus, device, actor)
            except UserError:
                print(f"{what} no such plan fits without offload or LoRA | | | | |")
                continue
            scale = SAMPLES / BATCH / 3600
            predicted = found.iteration_seconds * scale
            kinds = {kind: 0.0 for kind in ("generate", "score", "train")}
            for node in found.nodes:
                kinds[node.call.kind] += node.seconds * scale
            errors.append(predicted / published - 1)
            training = found.plan["actor_train"]
            print(
                f"{what} {predicted:.2f} | {errors[-1]:+.0%} | {', '.join(f'{h:.2f}' for h in kinds.values())} "
                f"| {found.plan['actor_generate'].layout.tensor} | {training.micro_batches} |"
            )
    print(f"\n{len(errors)} rows: median error {statistics.median(errors):+.0%}, median of its size ", end="")
    print(f"{statistics.median(map(abs, errors)):.0%}")


if __name__ == "__main__":
    main()
