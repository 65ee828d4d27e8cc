"""Runs a function of a test module in a group of processes, as torchrun would start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve()


def run_ranks(module_file: str, function: str, size: int, directory: Path, timeout: int = 900) -> list:
    """Call `function(ranks, directory)` of a test file in `size` processes; what each returns (JSON), by rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent), "PYTHONSAFEPATH": "1"}
    launcher = [sys.executable, "-W", "ignore"]
    if size > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [*launcher, str(HERE), module_file, function, str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads((directory / f"{function}.{rank}.json").read_text()) for rank in range(size)]


def main() -> None:
    module_file, function, directory = sys.argv[1:]
    import importlib.util
    import logging

    from training.distributed import start_ranks, stop_ranks

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    spec = importlib.util.spec_from_file_location("module_under_ranks", module_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ranks = start_ranks(threads=1)
    result = getattr(module, function)(ranks, Path(directory))
    (Path(directory) / f"{function}.{ranks.rank}.json").write_text(json.dumps(result))
    ranks.barrier()
    stop_ranks()


if __name__ == "__main__":
    main()
