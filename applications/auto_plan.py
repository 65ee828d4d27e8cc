"""`--plan auto`: the best plan for the machine that the run is on, searched before it starts."""

from dataclasses import replace

from applications.dry_run import duration
from applications.fit import Machine
from applications.plan import fastest
from applications.plan_report import plan_table, summary, verdict
from applications.plan_request import Outcome, Request, request_of
from applications.profile import measure_to
from inference.errors import UserError
from training.config import RunConfig
from training.plan import Plan, to_blocks
from training.planner.hardware import Cluster, cluster_here, profile_file
from training.run_directory import RunDirectory

LARGE = 8
"""Ranks from which on the search takes all its steps; fewer have fewer plans."""


def with_auto_plan(config: RunConfig, run: RunDirectory, measures: bool) -> RunConfig:
    """The settings of a run with the plan that it has for so many processes, or else with the best one for this
    machine, which is printed.

    Where no rates of this machine are known it is profiled, if `measures`. Raises UserError where no plan fits.
    """
    stored = run.read_config() if run.config_file.exists() else config
    blocks = stored.rlhf.plan if stored.processes == config.processes else {}
    blocks = blocks or to_blocks(best_plan(config, measures))
    return config.model_copy(update={"rlhf": config.rlhf.model_copy(update={"plan": blocks})})


def best_plan(config: RunConfig, measures: bool) -> Plan:
    """The fastest that runs here; prints it beside what the settings say without one."""
    machine, ranks = Machine.here(), config.processes
    cluster, source = rates_here(machine, ranks, measures)
    request = request_of(config, replace(cluster, host_memory=float(machine.memory)), machine=machine)
    best, *others = fastest(request, effort=min(1.0, ranks / LARGE))
    assert best.found is not None
    print("\n".join([*plan_table(request, best), "", *summary(request, [best, as_set(request)]), ""]))
    if sentence := verdict([best, *others]):
        print(sentence)
    print(
        f"Step 3 is expected to take {duration(best.seconds)} an iteration, "
        f"{duration(best.seconds * config.rlhf.iterations)} in all, every response as long as it may be; "
        f"rates: {source}.",
        flush=True,
    )
    return best.found.plan


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


def as_set(request: Request) -> Outcome:
    """What the run does without a plan."""
    try:
        return request.outcome("without a plan", request.as_set)
    except UserError as error:
        return Outcome("without a plan", None, str(error))
