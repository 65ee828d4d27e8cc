"""Runs from Python: the command trains in a process of its own, and asks a callable of this one for rewards."""

import base64
import hmac
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from applications.settings import settings_named
from inference.errors import EXIT_USER_ERROR, UserError
from inference.streams import printable
from rlhf_chat import HOME
from training.changes import differences
from training.config import RunConfig as Settings
from training.config_files import validate_config
from training.launchers import PARENT_VARIABLE
from training.merging import merge
from training.metrics import Journal, read_line
from training.reward_sources import checked, way_to_call
from training.run_directory import RunDirectory, StepDirectory
from training.steps import STEPS
from training.termination import StageFailed
from training.trust import require_reading

if TYPE_CHECKING:
    from pandas import DataFrame

Reward = Callable[..., Iterable[float]]
TOKEN_VARIABLE = "RLHF_CHAT_REWARD_TOKEN"
"""It holds the secret that the address of a callable names."""
NOT_FOR_PIPES = ("FORCE_COLOR", "CLICOLOR_FORCE")
"""Variables with which a notebook asks for a terminal's colours and bars."""
SECONDS_TO_ANSWER = 1e6
"""A callable has this long: it is waited for, as a function in a file is."""
POLL_SECONDS = 0.2


def load_settings(source: str | Path, overrides: Mapping[str, Any] | None = None, *, trust: bool = False) -> Settings:
    """The settings of a model as `--model` takes it, of a YAML file, or of a run directory, with `overrides` over them:
    dotted keys (`{"rlhf.kl.coefficient": 0.1}`) or groups (`{"rlhf": {"kl": ...}}`).

    Raises UserError. `trust` says yes to the files that a run of somebody else leads to.
    """
    require_reading(Path(source).expanduser(), trust)
    return settings_named(str(source), overrides)


class Run:
    """A run directory. Raises UserError where one of somebody else leads out of itself, and `trust` is not given."""

    def __init__(self, path: str | Path, *, trust: bool = False):
        self.path = Path(path).expanduser().absolute()
        require_reading(self.path, trust)
        self._directory = RunDirectory(self.path)

    @property
    def settings(self) -> Settings:
        """Raises UserError where there are none."""
        return self._directory.read_config()

    def metrics(self, step: str = "") -> "DataFrame":
        """A row for each iteration or optimiser step of a step (`sft`, `reward`, `rlhf`, `dpo`; default: the last one).

        Its index is their number; columns are metrics (docs/step3_rlhf.md), those of evaluations with their number.
        """
        from pandas import DataFrame

        rows = Journal(self._step(step).metrics_file).read()
        return DataFrame(rows or {"number": []}).groupby("number").last()

    def rollouts(self, step: str = "") -> "DataFrame":
        """A row for each sample that was written down. Raises UserError where none was."""
        from pandas import DataFrame

        rows = Journal(self._step(step).rollouts_file).read()
        if not rows:
            raise UserError(f"{self.path} has no rollouts: train with the setting rlhf.rollouts_every=1.")
        return DataFrame(rows)

    def comparison(self) -> dict[str, Any] | None:
        """The figures of the comparison with the SFT model; None while there are none."""
        return self._directory.read_comparison(self._step().step)

    def _step(self, command: str = "") -> StepDirectory:
        known = {step.command: step for step in STEPS}
        if command not in ("", *known):
            raise UserError(f"There is no step {command!r}: the steps are {', '.join(known)}.")
        return self._directory.step(known[command] if command else self.settings.steps[-1])


class Training(Run):
    """A run that is trained now, in a process of its own, which ends with this one."""

    def __init__(
        self,
        path: Path,
        settings: Settings,
        given: Mapping[str, Any],
        options: Sequence[str],
        reward: "Served | None",
        quiet: bool,
        trust: bool,
    ):
        """Start the command with `options` and the settings `given`, which make `settings`."""
        super().__init__(path, trust=trust)
        self._settings, self._reward, self._quiet = settings, reward, quiet
        self._scratch = tempfile.TemporaryDirectory(prefix="rlhf-chat-python-")
        config, self._errors = (Path(self._scratch.name) / name for name in ("settings.yaml", "errors.txt"))
        config.write_text(json.dumps(given), encoding="utf-8")  # JSON is YAML
        command = [sys.executable, str(HOME / "rlhf_chat" / "__main__.py"), "run", "--name", str(self.path)]
        environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_PIPES}
        environment |= {PARENT_VARIABLE: str(os.getpid()), "PYTHONSAFEPATH": "1"}
        environment |= {TOKEN_VARIABLE: reward.token} if reward else {}
        read_end, write_end = os.pipe()
        with open(write_end, "wb") as output, open(self._errors, "wb") as errors:
            self._process = subprocess.Popen(
                [*command, "--config", str(config), *options],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,  # Ctrl+C reaches this process alone, which then asks for a checkpoint
            )
        self._shower = threading.Thread(target=self._show, args=(read_end,), daemon=True)
        self._shower.start()

    @property
    def settings(self) -> Settings:
        return self._settings

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def iterations(self, step: str = "") -> Iterator[dict[str, Any]]:
        """The metrics of each iteration or optimiser step of a step (default: the last one) as they come, with their
        `number`, until the run is done; those that a stopped run has lost come again.

        Raises as `wait` does. Leaving the loop leaves the training alone.
        """
        file, ended = self._step(step).metrics_file, False
        before: list[bytes] = []
        try:
            while not ended:
                ended = not self.is_running
                lines = [line for line in read_lines(file) if line.endswith(b"\n")]
                pairs = enumerate(zip(before, lines, strict=False))
                known = next((at for at, (old, new) in pairs if old != new), min(len(before), len(lines)))
                before = lines
                rows = (read_line(line) for line in lines[known:])
                yield from (row for row in rows if row is not None and not is_evaluation(row))
                if not ended:
                    time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            self.stop()
            raise
        self._require_success()

    def wait(self) -> "Training":
        """Return this when the run is done.

        Raises what the callable raised; UserError with the sentence of what can be put right; StageFailed with that of
        what went wrong otherwise. Ctrl+C stops the training as `stop` does.
        """
        for _ in self.iterations():
            pass
        return self

    def stop(self) -> None:
        """End the training, with a checkpoint where one is reached in time; `train` goes on from there."""
        self._process.terminate()
        try:
            self._process.wait()
        except KeyboardInterrupt:
            self._process.kill()
            raise

    def _show(self, read_end: int) -> None:
        """Print what the command says, to its end; then let go of what it needed."""
        with open(read_end, encoding="utf-8", errors="replace") as output:
            for line in output:
                if not self._quiet:
                    print(printable(line), end="", flush=True)
        self._process.wait()
        if self._reward is not None:
            self._reward.shutdown()
            self._reward.server_close()

    def _require_success(self) -> None:
        self._shower.join()
        if self._reward is not None and self._reward.error is not None:
            raise self._reward.error
        if self._process.returncode:
            said = self._errors.read_text(encoding="utf-8", errors="replace").strip()
            sentence = said.rpartition("rlhf-chat: ")[2] or f"The training ended with code {self._process.returncode}."
            raise (UserError if self._process.returncode == EXIT_USER_ERROR else StageFailed)(sentence)


def train(
    path: str | Path,
    settings: Settings | str | Path | None = None,
    *,
    parent: str | Path | None = None,
    reward: Reward | None = None,
    reward_model: bool = False,
    steps: Sequence[str] = (),
    quiet: bool = False,
    trust: bool = False,
) -> Training:
    """Begin to train in the run directory `path`, or go on where it stopped, and return at once.

    `settings` are such as `load_settings` gives, or what it takes; default: those of the run, else of `parent`. With a
    `parent` the run is a fork of it: only the steps are trained that read something else (docs/runs.md).
    `reward(prompts, responses)` or `reward(prompts, responses, rows)`, with lists of messages, texts and the other keys
    of the data, returns a number for each response. It is asked in a thread of this process, once at a time; with
    `reward_model` it is added to the reward model's score, else it is the only reward. `steps` are names, as
    `("sft", "rlhf")`; default: all.

    Raises UserError for settings and arguments that cannot be; all else is raised by what waits.
    """
    directory = Path(path).expanduser().absolute()
    if settings is None:
        begun = parent is None or RunDirectory(directory).config_file.exists()
        settings = Run(directory if begun else str(parent), trust=trust).settings
    elif not isinstance(settings, Settings):
        settings = load_settings(settings, trust=trust)
    served = None
    if reward is not None:
        if settings.method == "dpo" or not settings.rlhf.reward_weights.url:
            why = "method=dpo takes no rewards" if settings.method == "dpo" else "rlhf.reward_weights.url is 0"
            raise UserError(f"The callable would never be asked, as {why}: leave it out, or set another value.")
        served = Served(reward)
        rlhf: dict[str, Any] = {"reward_url": served.address, "reward_timeout": SECONDS_TO_ANSWER, "reward_retries": 0}
        weights = {} if reward_model else {"reward_weights": {"model": 0.0}}
        settings = validate_config(merge(settings.model_dump(mode="json"), {"rlhf": rlhf | weights}))
    elif TOKEN_VARIABLE in settings.rlhf.reward_url:
        raise UserError(f"The rewards of {path} come from a callable: give it as reward.")
    else:
        settings = validate_config(settings.model_dump(mode="json"))  # groups that were assigned to fit together
    options = [f"--steps={','.join(steps)}"] * bool(steps) + ["--trust"] * trust
    given = settings.model_dump(mode="json")
    if parent is not None:
        options += ["--from", str(Path(parent).expanduser()), "--fork"]
        before = Run(parent, trust=trust).settings.model_dump(mode="json")
        given = {key: new for key, (_, new) in differences(before, given).items() if key != "fork_of"}
    return Training(directory, settings, given, options, served, quiet, trust)


class Served(ThreadingHTTPServer):
    """Answers on the loopback interface, to who knows the token, with what a callable here returns."""

    daemon_threads = True

    def __init__(self, function: Reward):
        self.function, self.way = function, way_to_call(function, "The reward")
        self.token = secrets.token_urlsafe(32)
        self.credentials = b"Basic " + base64.b64encode(f"python:{self.token}".encode())
        self.turn = threading.Lock()
        self.error: BaseException | None = None
        """What the callable raised first."""
        super().__init__(("127.0.0.1", 0), Question)
        self.address = f"http://python:${{{TOKEN_VARIABLE}}}@127.0.0.1:{self.server_address[1]}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def scores(self, prompts: list, responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        """Raises what the callable does, and RewardFailed for what is no number for each response."""
        with self.turn:
            if self.error is not None:
                raise self.error
            try:
                scores = self.way(self.function, prompts, responses, rows)
                return checked(list(scores) if isinstance(scores, Iterator) else scores, len(responses), "The reward")
            except BaseException as error:
                self.error = error
                raise


class Question(BaseHTTPRequestHandler):
    server: Served

    def do_POST(self) -> None:
        if not hmac.compare_digest(self.headers.get("Authorization", "").encode(), self.server.credentials):
            self.send_error(401)
            return
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            answer = json.dumps({"scores": self.server.scores(**asked)}).encode()
        except BaseException:  # stored, and raised where the run is waited for
            self.send_error(400, "the reward raised an error")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def read_lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True) if file.exists() else []


def is_evaluation(row: Mapping[str, Any]) -> bool:
    return all(key == "number" or key.startswith(("eval/", "time/")) for key in row)
