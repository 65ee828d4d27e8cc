"""Launchers that are not torch's, and what a sentence advises under each."""

import re
from pathlib import Path

import pytest
import torch

from applications.commands import require_one_command
from inference.errors import UserError
from training import launchers
from training.checkpoints import Checkpoints
from training.config_files import load_config
from training.distributed import Ranks
from training.launchers import OF_TORCH, PARENT_VARIABLE, adopt, processes_option, started_by
from training.opening import open_run
from training.run_directory import RunDirectory

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
STEP = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"}


@pytest.fixture
def environment(monkeypatch) -> dict[str, str]:
    """Of this process, as of one that nobody has started."""
    found: dict[str, str] = {}
    monkeypatch.setattr(launchers.os, "environ", found)
    return found


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        (OPEN_MPI, ("3", "4", "1", "2")),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, ("1", "2", "1", "2")),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ("1", "2", "1", "2")),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4,3"}, ("5", "7", "1", "3")),
        ({**STEP, "SLURM_TASKS_PER_NODE": "3(x2),1"}, ("5", "7", "1", "3")),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}, ("1", "2", "1", "2")),
        (BATCH, None),  # one process, whatever it may start
        ({**BATCH, **STEP, "SLURM_TASKS_PER_NODE": "4,3"}, ("5", "7", "1", "3")),  # srun in a batch script
    ],
)
def test_rank_and_size_in_the_words_of_each(environment, variables, expected):
    environment.update(variables)
    found = started_by()
    assert (found and found[1]) == (expected and dict(zip(OF_TORCH, expected, strict=True)))


def test_they_meet_on_one_machine_and_jobs_do_not_collide(environment):
    ports = []
    for job in ("7", "8"):
        environment.clear()
        environment.update({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0"})
        adopt()
        assert (environment["RANK"], environment["MASTER_ADDR"]) == ("1", "127.0.0.1")
        ports.append(int(environment["MASTER_PORT"]))
    assert ports == [20070, 20080]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1,n2", "n1"), ("gpu[07-09,12],big1", "gpu07"), ("r1n[3,5]s[1-2]", "r1n3s1"), ("big1,gpu[1-2]", "big1")],
)
def test_tasks_on_several_nodes_meet_at_the_first_one(environment, monkeypatch, nodes, first):
    asked = []
    monkeypatch.setattr(launchers.socket, "getaddrinfo", lambda machine, port: asked.append(machine))
    environment.update({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "7"})
    adopt()
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"], *asked) == (first, "20070", first)


def test_mpirun_in_a_job_meets_at_its_first_node_and_not_at_that_of_its_own_step(environment, monkeypatch):
    monkeypatch.setattr(launchers.socket, "getaddrinfo", lambda machine, port: None)
    environment.update({**OPEN_MPI, "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_STEP_NODELIST": "n[2-3]"})
    adopt()
    assert environment["MASTER_ADDR"] == "n1"


def test_a_node_that_has_no_address_is_named(environment):
    environment.update({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST": "no.such.node.invalid"})
    with pytest.raises(UserError, match=r"cannot find no\.such\.node\.invalid, .*: set MASTER_ADDR to a name"):
        adopt()


def test_several_machines_are_asked_where_they_meet(environment):
    environment.update(OPEN_MPI)
    with pytest.raises(UserError, match=r"^mpirun \(Open MPI\) started 4 .* set MASTER_ADDR to the first machine "):
        adopt()
    environment.clear()
    environment.update({**OPEN_MPI, "MASTER_ADDR": "node-1", "MASTER_PORT": "4711"})
    adopt()
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"], environment["RANK"]) == ("node-1", "4711", "3")


@pytest.mark.parametrize("variables", [{"RANK": "0", "WORLD_SIZE": "1"}, {PARENT_VARIABLE: "1"}])
def test_torch_and_the_command_know_better(environment, variables):
    environment.update({**OPEN_MPI, **variables})
    adopt()
    assert variables.items() <= environment.items() and not {"MASTER_ADDR", "LOCAL_RANK"} & environment.keys()


def test_the_command_under_mpirun_is_one_sentence_and_under_srun_a_matter_of_the_lock(environment):
    environment.update(OPEN_MPI)
    with pytest.raises(UserError, match=r"started 4 of this command, .* once with --processes 4, or start the stage"):
        require_one_command()
    environment.clear()
    environment.update(STEP)
    require_one_command()


def test_the_advised_number_of_processes_is_taken(tmp_path: Path, environment):
    """Typed in as the sentence says: the settings take it, and the checkpoint goes on."""
    run, settings = RunDirectory(tmp_path), ["model=tiny", "sft.batch_size=4", "processes=1"]
    open_run(run, load_config([], settings))

    def old(directory):
        (directory / "0.pt").touch()

    Checkpoints(tmp_path / "c", 1, Ranks(0, 1, torch.device("cpu"))).save(1, old, {})

    class Two(Ranks):
        def tell(self, value, phase):
            return value

        def see(self, *paths):
            pass

    two = Checkpoints(tmp_path / "c", 1, Two(0, 2, torch.device("cpu")))
    open_run(run, load_config([], [*settings[:2], "processes=2"]))
    assert run.read_config().processes == 2
    with pytest.raises(UserError) as refused:
        two.newest()
    advised = re.search(r"cannot go on with 2; use --processes (\d), or delete", str(refused.value))
    assert advised is not None
    open_run(run, load_config([], [*settings[:2], f"processes={advised[1]}"]))
    found = Checkpoints(tmp_path / "c", 1, Ranks(0, run.read_config().processes, torch.device("cpu"))).newest()
    assert found is not None and found[1]["number"] == 1
    environment["RANK"] = "0"
    assert processes_option(2) == "torchrun --nproc-per-node 2"
    environment[PARENT_VARIABLE] = "1"
    assert processes_option(2) == "--processes 2"
