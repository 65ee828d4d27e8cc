"""`--plan auto`: the best plan for the machine that the run is on, searched before it starts."""

from dataclasses import replace

from applications.dry_run import duration
from applications.fit import Machine
from applications.plan import searched
from applications.plan_report import plan_table, summary
from applications.plan_request import Outcome, Request, request_of
from applications.profile import measure_to
from inference.errors import UserError
from training.config import RunConfig
from training.models.loading import resolve_dtype
from training.plan import Plan
from training.planner.footprint import DTYPES
from training.planner.machine import cluster_here, profile_file


def auto_plan(config: RunConfig) -> Plan:
    """The best plan that this machine runs with the settings of a run; prints it beside what they say without one.

    Profiles the machine first where no rates of it are known. Raises UserError where no plan fits.
    """
    machine, ranks = Machine.here(), config.processes
    known = cluster_here(ranks, 1, machine.gpus[:1])
    if known is None:
        machine.require_room(ranks)
        measure_to([profile_file(ranks), profile_file()], ranks)
        known = cluster_here(ranks, 1, ())
    assert known is not None
    cluster, source = known
    dtype = resolve_dtype(config.dtype, machine.device)
    precision = next(name for name, each in DTYPES.items() if each == dtype)
    request = request_of(
        config.model_copy(update={"dtype": precision}), replace(cluster, host_memory=float(machine.memory))
    )
    best = searched(request)
    assert best.found is not None
    print("\n".join([*plan_table(request, best), "", *summary(request, [best, as_set(request)]), ""]))
    print(
        f"Step 3 is expected to take {duration(best.found.iteration_seconds)} an iteration, "
        f"{duration(request.hours(best.found) * 3600)} in all, every response as long as it may be; rates: {source}.",
        flush=True,
    )
    return best.found.plan


def as_set(request: Request) -> Outcome:
    """What the run does without a plan."""
    try:
        return request.outcome("without a plan", request.as_set)
    except UserError as error:
        return Outcome("without a plan", None, str(error))
