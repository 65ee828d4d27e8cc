"""`rlhf-chat plan`: where each call of an iteration runs best, how long that takes, what it costs. Starts nothing."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from applications import plan_report
from applications.export import write_text
from applications.plan_request import Outcome, Request, make_request
from inference.errors import UserError
from inference.streams import show_json
from training.calls import Call
from training.plan import Assignment, read_plan, to_yaml
from training.plan_checks import problems
from training.planner.options import EVERYTHING, Space, turned
from training.planner.search import Found, Progress, deepspeed_chat_plan, megatron_plan, search
from training.planner.table import PlanTable

SHORTER = 0.3
"""Effort of a search whose plan is only compared."""


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
    everything: bool,
) -> None:
    """`rlhf-chat plan`. Raises UserError for what cannot be planned and for a plan file that is not valid."""
    request = make_request(model, reward_model, nodes, gpus_per_node, gpu, network, price, config, overrides)
    told = None if json_output else plan_report.progress
    if check is not None:
        outcomes = [checked(request, check)]
    else:
        first, *others = fastest(request, seed, effort, told)
        outcomes = [first, *compared(request, seed, effort), *others]
        if everything:
            outcomes.append(searched(request, seed, effort, told, "not yet runnable", EVERYTHING, False))
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


def searched(
    request: Request,
    seed: int = 0,
    effort: float = 1.0,
    progress: Callable[[Progress], bool] | None = None,
    name: str = "searched",
    space: Space | None = None,
    must_run: bool = True,
) -> Outcome:
    """The best plan of a space, by default of what this runtime can run. Raises UserError where none fits or runs."""
    found = best_plans(request, space or request.runnable, seed, effort, progress)
    plans = [turned(request.completed(one.plan), request.graphs.graph) for one in found]
    outcomes = [request.outcome(name, plan) for plan in plans]
    runs = [outcome for outcome in outcomes if outcome.runs or not must_run]
    if not runs:
        why = " ".join(outcomes[0].refused) or outcomes[0].why_not
        raise UserError(f"None of the best plans runs. {why}")
    return min(runs, key=lambda outcome: outcome.seconds)


def fastest(
    request: Request, seed: int = 0, effort: float = 1.0, progress: Callable[[Progress], bool] | None = None
) -> list[Outcome]:
    """The best plan that runs; behind it, on several ranks, the best of those whose training is all in pipeline stages,
    and of those without stages, where it is not one of them. Raises UserError where none fits."""
    spaces: dict[str, Callable[[Call, Assignment], bool]] = {
        "searched": lambda call, one: True,
        "in stages": lambda call, one: call.kind != "train" or one.layout.pipeline > 1,
        "no stages": lambda call, one: one.layout.pipeline == 1,
    }
    outcomes: list[Outcome] = []
    why: UserError | None = None
    for name, belongs in spaces.items():
        if outcomes and (request.cluster.size == 1 or name in [outcome.stages for outcome in outcomes]):
            continue
        space = Space(runs=lambda call, one, belongs=belongs: belongs(call, one) and request.runs(call, one))  # type: ignore
        first = (effort, progress) if not outcomes else (SHORTER * effort, None)
        try:
            outcomes.append(searched(request, seed, *first, name, space))
        except UserError as error:
            why = why or error
    if why is not None and not outcomes:
        raise why
    best = min(outcomes, key=lambda outcome: outcome.seconds)
    others = [replace(other, name=other.stages) for other in outcomes if other is not best and other.stages]
    return [replace(best, name="searched"), *others]


def best_plans(
    request: Request, space: Space, seed: int, effort: float, progress: Callable[[Progress], bool] | None
) -> list[Found]:
    """Where training can equal generation to the bit, those by which it does, if any fits."""

    def is_alone(call: Call, assignment: Assignment) -> bool:
        together = call.kind == "generate" and assignment.layout.tensor > 1
        return not together and (space.runs is None or space.runs(call, assignment))

    if request.expects_exactness(degree=1):
        with suppress(UserError):
            return search(PlanTable(request.exact_graphs, replace(space, runs=is_alone)), seed, effort, progress)
    return search(PlanTable(request.graphs, space), seed, effort, progress)


def compared(request: Request, seed: int, effort: float) -> list[Outcome]:
    """What settings can say without a plan, and what people use without a search."""
    graph, cluster = request.graphs.graph, request.cluster
    one_mesh = Space(
        runs=lambda call, assignment: assignment.layout.mesh == all_ranks and request.runs(call, assignment)
    )
    all_ranks = tuple(range(cluster.size))
    makers: dict[str, Callable[[], Outcome]] = {
        "as set": lambda: request.outcome("as set", request.as_set),
        "one mesh": lambda: searched(request, seed, effort, None, "one mesh", one_mesh, False),
        "DeepSpeed-Chat": lambda: request.outcome(
            "DeepSpeed-Chat", deepspeed_chat_plan(graph, request.workload, cluster)
        ),
        "Megatron-style": lambda: request.outcome("Megatron-style", megatron_plan(graph, cluster)),
    }
    outcomes = []
    for name, make in makers.items():
        try:
            outcomes.append(make())
        except UserError as error:
            outcomes.append(Outcome(name, None, str(error)))
    return outcomes


def checked(request: Request, file: Path) -> Outcome:
    """A plan from a file. Raises UserError with all that is wrong with it, but for what only this runtime refuses."""
    plan = read_plan(file)
    found = problems(plan, request.graphs.graph, request.workload, request.cluster.size)
    if found:
        raise UserError(" ".join(found))
    outcome = request.outcome(file.name, plan)
    if outcome.why_not:
        raise UserError(outcome.why_not)
    return outcome
