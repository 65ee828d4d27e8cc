"""`rlhf-chat plan` and `--plan auto`: where each call of an iteration runs best, how long that takes, what it costs."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from applications import plan_report
from applications.dry_run import rough_duration
from applications.export import write_text
from applications.fit import Machine
from applications.plan_request import PlanOutcome, Request
from applications.profile import measure_to
from inference.errors import UserError
from inference.streams import show_json
from training.calls import Call
from training.config import RunConfig
from training.plan import Assignment, read_plan, to_blocks, to_yaml
from training.plan_checks import problems
from training.planner.hardware import Cluster, cluster_here, profile_file
from training.planner.options import EVERYTHING, Space, turned
from training.planner.search import PlanResult, Progress, deepspeed_chat_plan, megatron_plan, search
from training.planner.table import PlanTable
from training.run_directory import RunDirectory

ShowProgress = Callable[[Progress], bool] | None
SHORTER = 0.3  # effort of a search whose plan is only compared
FULL_EFFORT_RANKS = 8  # `--plan auto` searches for fewer ranks, which have fewer plans, with less effort


def plan_command(
    request: Request,
    seed: int,
    effort: float,
    json_output: bool,
    out: Path | None,
    check: Path | None,
    svg: Path | None,
    everything: bool,
) -> None:
    """`rlhf-chat plan`. Raises UserError for what cannot be planned and for a plan file that is not valid."""
    progress = None if json_output else plan_report.progress
    if check is not None:
        outcomes = [checked(request, check)]
    else:
        first, *others = fastest(request, seed, effort, progress)
        outcomes = [first, *compared(request, seed, effort), *others]
        if everything:
            outcomes.append(searched(request, seed, effort, progress, "not yet runnable", EVERYTHING, False))
    if json_output:
        show_json(plan_report.as_data(request, outcomes))
    else:
        print(plan_report.as_text(request, outcomes))
    best = outcomes[0].estimate
    assert best is not None
    for file, text in ((out, to_yaml(best.plan)), (svg, plan_report.as_svg(outcomes) if svg else "")):
        if file is not None:
            write_text(file, text)
            print(f"Written to {file}", file=sys.stderr)


def searched(
    request: Request,
    seed: int = 0,
    effort: float = 1.0,
    progress: ShowProgress = None,
    name: str = "searched",
    space: Space | None = None,
    must_run: bool = True,
) -> PlanOutcome:
    """The best plan of a space, by default of what this runtime can run. Where training can equal generation to the
    bit, one by which it does, if any fits. Raises UserError where none fits or runs."""
    space = space or Space(runs=request.runs)
    results: list[PlanResult] = []
    if request.expects_exactness(degree=1):
        runs = space.runs

        def is_alone(call: Call, assignment: Assignment) -> bool:
            together = call.kind == "generate" and assignment.layout.tensor > 1
            return not together and (runs is None or runs(call, assignment))

        with suppress(UserError):
            results = search(PlanTable(request.exact_graphs, replace(space, runs=is_alone)), seed, effort, progress)
    results = results or search(PlanTable(request.graphs, space), seed, effort, progress)
    plans = [turned(request.completed(result.plan), request.graphs.graph) for result in results]
    outcomes = [request.outcome(name, plan) for plan in plans]
    runnable = [outcome for outcome in outcomes if outcome.runs or not must_run]
    if not runnable:
        why = " ".join(outcomes[0].refused) or outcomes[0].why_not
        raise UserError(f"None of the best plans runs. {why}")
    return min(runnable, key=lambda outcome: outcome.seconds)


def fastest(request: Request, seed: int = 0, effort: float = 1.0, progress: ShowProgress = None) -> list[PlanOutcome]:
    """The best plan that runs; behind it, on several ranks, the best of those whose training is all in pipeline stages,
    and of those without stages, where it is not one of them. Raises UserError where none fits."""
    spaces: dict[str, Callable[[Call, Assignment], bool]] = {
        "searched": lambda call, assignment: True,
        "in stages": lambda call, assignment: call.kind != "train" or assignment.layout.pipeline > 1,
        "no stages": lambda call, assignment: assignment.layout.pipeline == 1,
    }
    outcomes: list[PlanOutcome] = []
    why: UserError | None = None
    for name, belongs in spaces.items():
        if outcomes and (request.cluster.size == 1 or name in [outcome.stages for outcome in outcomes]):
            continue
        space = Space(runs=lambda call, one, belongs=belongs: belongs(call, one) and request.runs(call, one))  # type: ignore
        search_options = (effort, progress) if not outcomes else (SHORTER * effort, None)
        try:
            outcomes.append(searched(request, seed, *search_options, name, space))
        except UserError as error:
            why = why or error
    if why is not None and not outcomes:
        raise why
    best = min(outcomes, key=lambda outcome: outcome.seconds)
    others = [replace(other, name=other.stages) for other in outcomes if other is not best and other.stages]
    return [replace(best, name="searched"), *others]


def compared(request: Request, seed: int, effort: float) -> list[PlanOutcome]:
    """What settings can say without a plan, and what people use without a search."""
    graph, cluster = request.graphs.graph, request.cluster
    all_ranks = tuple(range(cluster.size))
    one_mesh = Space(
        runs=lambda call, assignment: assignment.layout.mesh == all_ranks and request.runs(call, assignment)
    )
    return [
        outcome_or_why("as set", lambda: request.outcome("as set", request.as_set)),
        outcome_or_why("one mesh", lambda: searched(request, seed, effort, None, "one mesh", one_mesh, False)),
        outcome_or_why(
            "DeepSpeed-Chat",
            lambda: request.outcome("DeepSpeed-Chat", deepspeed_chat_plan(graph, request.workload, cluster)),
        ),
        outcome_or_why("Megatron-style", lambda: request.outcome("Megatron-style", megatron_plan(graph, cluster))),
    ]


def outcome_or_why(name: str, make: Callable[[], PlanOutcome]) -> PlanOutcome:
    try:
        return make()
    except UserError as error:
        return PlanOutcome(name, None, str(error))


def checked(request: Request, file: Path) -> PlanOutcome:
    """A plan from a file. Raises UserError with all that is wrong with it, but for what only this runtime refuses."""
    plan = read_plan(file)
    if wrong := problems(plan, request.graphs.graph, request.workload, request.cluster.size):
        raise UserError(" ".join(wrong))
    outcome = request.outcome(file.name, plan)
    if outcome.why_not:
        raise UserError(outcome.why_not)
    return outcome


# --plan auto


def with_auto_plan(config: RunConfig, run: RunDirectory, measures: bool) -> RunConfig:
    """The settings of a run with the plan that it has for so many processes, or else with the fastest one that runs on
    this machine, which is printed beside what the settings say without one.

    Where no rates of this machine are known it is profiled, if `measures`. Raises UserError where no plan fits.
    """
    stored = run.read_config() if run.config_file.exists() else config
    blocks = stored.rlhf.plan if stored.processes == config.processes else {}
    if not blocks:
        machine, ranks = Machine.here(), config.processes
        cluster, source = rates_here(machine, ranks, measures)
        request = Request.of(config, replace(cluster, host_memory=float(machine.memory)), machine=machine)
        best, *others = fastest(request, effort=min(1.0, ranks / FULL_EFFORT_RANKS))
        assert best.estimate is not None
        as_set = outcome_or_why("without a plan", lambda: request.outcome("without a plan", request.as_set))
        table, summary = plan_report.plan_table(request, best), plan_report.summary(request, [best, as_set])
        print("\n".join([*table, "", *summary, ""]))
        if sentence := plan_report.verdict([best, *others]):
            print(sentence)
        print(
            f"Step 3 is expected to take {rough_duration(best.seconds)} an iteration, "
            f"{rough_duration(best.seconds * config.rlhf.iterations)} in all, every response as long as it may be; "
            f"rates: {source}.",
            flush=True,
        )
        blocks = to_blocks(best.estimate.plan)
    return config.model_copy(update={"rlhf": config.rlhf.model_copy(update={"plan": blocks})})


def rates_here(machine: Machine, ranks: int, measures: bool) -> tuple[Cluster, str]:
    """This machine, and where its rates come from. Raises UserError where they are not known and not measured now."""
    if (known := cluster_here(ranks, 1, machine.gpus[:1])) is not None:
        return known
    if not measures:
        raise UserError(
            f"No rates of this machine are known, and a dry run starts nothing: measure it with rlhf-chat profile "
            f"--processes {ranks} first."
        )
    machine.require_room(ranks)
    profile = measure_to([profile_file(ranks), profile_file()], ranks)
    return profile.cluster, "measured by `rlhf-chat profile`"
