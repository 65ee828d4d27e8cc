"""Who started this process, and as which of how many: torchrun and deepspeed say it in torch's words, others do not.

A script does not outlive what started it, and does not end with the terminal that shows it.
"""

import os
import re
import signal
import socket
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path

from inference.errors import UserError
from inference.streams import guard_output

PARENT_VARIABLE = "RLHF_CHAT_PARENT"


def begin_script(poll_seconds: float = 0.5) -> None:
    """Guard the output, and end this process soon after the launcher or the command that started it is gone.

    Called before any heavy import. A thread, not a signal: kill -9 leaves no handler to run, and polling works on
    every Unix. `os._exit` because a rank may be blocked in a collective that will never finish. A script started by
    hand goes on without its shell.
    """
    outlive_terminal()
    parent = os.getppid()
    command = int(os.environ.get(PARENT_VARIABLE, 0))
    if not command and "LOCAL_RANK" not in os.environ and started_by() is None:
        return

    def watch() -> None:
        while True:
            if os.getppid() != parent or (command and not is_alive(command)):
                os._exit(70)
            time.sleep(poll_seconds)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def outlive_terminal() -> None:
    """Training goes on where the connection of who started it is lost, or the reader of its output gone."""
    guard_output()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


SLURM = "srun"
LAUNCHERS = {
    "mpirun (Open MPI)": [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")],
    "mpirun (MVAPICH)": [f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")],
    "mpirun (PMI)": ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
    SLURM: ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""],
}
"""The variables of a launcher: rank, size, and the same among the processes of this machine."""
OF_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OF_JOBS = ("SLURM_JOB_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
"""What tells the jobs of a machine apart, the same for all processes of one."""


def adopt() -> None:
    """Say in torch's variables what another launcher has said in its own.

    Raises UserError where it has not said on which of several machines they meet.
    """
    known = started_by()
    if known is None or "RANK" in os.environ or PARENT_VARIABLE in os.environ:
        return
    launcher, values = known
    os.environ.update(values)
    if "MASTER_ADDR" not in os.environ:
        size = values["WORLD_SIZE"]
        alone = values["LOCAL_WORLD_SIZE"] == size
        os.environ["MASTER_ADDR"] = "127.0.0.1" if alone else first_machine(launcher, size)
    os.environ.setdefault("MASTER_PORT", str(port_of_job(launcher)))


def first_machine(launcher: str, size: str) -> str:
    """Name the machine of the first process, as Slurm says; mpirun in a job starts at the job's first node.

    Raises UserError where nobody says it, or the name leads nowhere.
    """
    of_step = os.environ.get("SLURM_STEP_NODELIST", "") if launcher == SLURM else ""
    nodes = of_step or os.environ.get("SLURM_JOB_NODELIST", "")  # gpu[07-09,12],big1
    if not nodes:
        raise UserError(
            f"{launcher} started {size} processes on several machines and does not say where they meet: "
            f"set MASTER_ADDR to the first machine and MASTER_PORT to a free port, or use torchrun."
        )
    machine = re.sub(r"\[(\w+)[^]]*]", r"\1", re.split(r",(?![^[]*])", nodes)[0])
    try:
        socket.getaddrinfo(machine, None)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} cannot find {machine}, the first node by Slurm ({error.strerror}): set "
            f"MASTER_ADDR to a name or address of it that all nodes know."
        ) from None
    return machine


def port_of_job(launcher: str) -> int:
    """Choose a port, the same for all processes of a job and another one for each job of a machine."""
    job, step = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if launcher == SLURM and job.isdigit():  # jobs of an array are numbered on: no two of a thousand collide
        return 20000 + (10 * int(job) + int(step or 0) % 10) % 10000
    name = "".join(os.environ.get(name, "") for name in OF_JOBS)
    return 20000 + zlib.crc32(name.encode()) % 10000 if name else 29500


def started_by() -> tuple[str, dict[str, str]] | None:
    """Find a launcher that started several processes and is none of torch's, and what it says in torch's variables."""
    for launcher, names in LAUNCHERS.items():
        rank, size, local_rank, local_size = (os.environ.get(name, "") for name in names)
        if launcher == SLURM:
            size, local_size = slurm_sizes(size)
        if rank and size.isdigit() and int(size) > 1:
            return launcher, dict(zip(OF_TORCH, (rank, size, local_rank or rank, local_size or size), strict=True))
    return None


def slurm_sizes(step: str) -> tuple[str, str]:
    """Count the tasks of the step, and of this machine. A batch script has its job's variables, and is one process."""
    of_job = os.environ.get("SLURM_NTASKS", "") if os.environ.get("ENVIRONMENT") != "BATCH" else ""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", "")  # 4(x2),3
    tasks = [n for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]
    node = int(os.environ.get("SLURM_NODEID", 0))
    return step or of_job, tasks[node] if node < len(tasks) else ""


def processes_option(processes: int) -> str:
    """Return the option that starts so many processes, of the command or of the launcher of a stage script."""
    of_script = "RANK" in os.environ and PARENT_VARIABLE not in os.environ
    return f"torchrun --nproc-per-node {processes}" if of_script else f"--processes {processes}"


PATIENCE = 120.0  # seconds; NFS keeps for up to 60 that a file is not there


def wait_until_seen(path: Path, seconds: float = PATIENCE) -> None:
    """Return once `path` is there. Raises UserError after so many seconds."""
    ends, pause = time.monotonic() + seconds, 0.01
    while not path.exists():
        if time.monotonic() > ends:
            raise UserError(
                f"{socket.gethostname()} does not see {path}, which the first process sees: the run directory must lie "
                f"on a file system that all nodes share."
            )
        with suppress(OSError):
            os.listdir(path.parent)  # makes a client of NFS ask again
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
