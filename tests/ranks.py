"""Runs a function of a test module in a group of processes, as torchrun would start them."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

from tests.warm import fork_all


def run_ranks(module_file: str, function: str, size: int, directory: Path, timeout: int = 900) -> list:
    """Call `function(ranks, directory)` of a test file in `size` processes; what each returns (JSON), by rank."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they meet
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": store.host, "MASTER_PORT": store.port}
    common["TORCHELASTIC_USE_AGENT_STORE"] = True
    environments = [
        {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(size)
    ]
    rank = Rank(module_file, function, str(directory))
    for done in fork_all([rank] * size, environments, directory, "", timeout):
        assert done.code == 0, done.out[-3000:] + done.err[-6000:]
    return [json.loads((directory / f"{function}.{rank}.json").read_text()) for rank in range(size)]


@dataclass(frozen=True)
class Rank:
    module_file: str
    function: str
    directory: str

    def __call__(self) -> None:
        import importlib.util
        import logging

        from training.distributed import start_ranks, stop_ranks

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        spec = importlib.util.spec_from_file_location("module_under_ranks", self.module_file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        ranks = start_ranks(threads=1)
        result = getattr(module, self.function)(ranks, Path(self.directory))
        (Path(self.directory) / f"{self.function}.{ranks.rank}.json").write_text(json.dumps(result))
        ranks.barrier()
        stop_ranks()
