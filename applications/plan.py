"""`rlhf-chat plan`: where each call of an iteration runs best, how long that takes, what it costs. Starts nothing."""

import sys
from collections.abc import Callable
from pathlib import Path

from applications import plan_report
from applications.files import write_text
from applications.plan_request import Outcome, Request, make_request
from inference.errors import UserError
from inference.streams import show_json
from training.plan import Plan
from training.plan_checks import problems
from training.plan_file import read_plan, to_yaml
from training.planner.estimate import estimate
from training.planner.heuristics import deepspeed_chat_plan, megatron_plan
from training.planner.search import Progress, search
from training.planner.table import PlanTable


def plan_command(
    model: str,
    reward_model: str | None,
    nodes: int,
    gpus_per_node: int | None,
    gpu: str,
    network: float,
    price: float | None,
    config: list[Path] | None,
    overrides: list[str] | None,
    seed: int,
    effort: float,
    json_output: bool,
    out: Path | None,
    check: Path | None,
    svg: Path | None,
) -> None:
    """`rlhf-chat plan`. Raises UserError for what cannot be planned and for a plan file that is not valid."""
    request = make_request(model, reward_model, nodes, gpus_per_node, gpu, network, price, config, overrides)
    if check is not None:
        outcomes = [checked(request, check)]
    else:
        outcomes = [searched(request, seed, effort, None if json_output else plan_report.progress), *compared(request)]
    if json_output:
        show_json(plan_report.as_data(request, outcomes))
    else:
        print(plan_report.as_text(request, outcomes))
    best = outcomes[0].found
    assert best is not None
    for file, text in ((out, to_yaml(best.plan)), (svg, plan_report.as_svg(outcomes) if svg else "")):
        if file is not None:
            write_text(file, text)
            print(f"Written to {file}", file=sys.stderr)


def searched(request: Request, seed: int, effort: float, progress: Callable[[Progress], bool] | None) -> Outcome:
    found = search(PlanTable(request.graphs), seed, effort, progress)
    return Outcome("searched", estimate(found[0].plan, request.graphs))


def compared(request: Request) -> list[Outcome]:
    """What people use without a search."""
    makers: dict[str, Callable[[], Plan]] = {
        "DeepSpeed-Chat": lambda: deepspeed_chat_plan(request.graphs.graph, request.workload, request.cluster),
        "Megatron-style": lambda: megatron_plan(request.graphs.graph, request.cluster),
    }
    outcomes = []
    for name, make in makers.items():
        try:
            found = estimate(make(), request.graphs)
            outcomes.append(Outcome(name, found, request.overfull(found)))
        except UserError as error:
            outcomes.append(Outcome(name, None, str(error)))
    return outcomes


def checked(request: Request, file: Path) -> Outcome:
    """A plan from a file. Raises UserError with all that is wrong with it."""
    plan = read_plan(file)
    found = problems(plan, request.graphs.graph, request.workload, request.cluster.size)
    if found:
        raise UserError(" ".join(found))
    costed = estimate(plan, request.graphs)
    if why := request.overfull(costed):
        raise UserError(why)
    return Outcome(file.name, costed)
