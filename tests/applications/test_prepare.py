"""`prepare`: a run that it made opens no address, and reads no cache, where it is trained."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from inference.errors import UserError
from inference.families import build_tiny_model
from tests.conftest import rlhf_chat
from tests.warm import ROOT, Command, Done, fork_all
from training.config_files import load_config
from training.inputs import local_model, models_of, stored_model
from training.run_directory import RunDirectory
from training.trust import of_models

HUB_ID = "org/tiny"
PTX = "org/demonstrations"
OPENS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
HERE = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class OnLogin(Command):
    """A command where the hub answers with a directory."""

    hub: Path = Path()

    def __call__(self) -> None:
        import huggingface_hub

        def snapshot(repository: str, **_: object) -> str:
            assert repository in (HUB_ID, PTX)
            return str(self.hub / repository)

        huggingface_hub.snapshot_download = snapshot
        super().__call__()


@dataclass(frozen=True)
class OnNode(Command):
    """A command on a machine without a network: what it would open, or ask pip for, is written down and fails."""

    opened: Path = Path()

    def __call__(self) -> None:
        def watch(event: str, arguments: tuple) -> None:
            if event == "subprocess.Popen" and "pip" in map(str, arguments[1]):
                refuse(event, "pip")
            if event in OPENS:
                address = arguments[0] if isinstance(arguments[0], str | bytes | None) else arguments[1]
                host = address[0] if isinstance(address, tuple) else address
                if isinstance(host, str) and host not in HERE and not host.startswith("/"):
                    refuse(event, host)

        def refuse(event: str, what: str) -> None:
            with open(self.opened, "a", encoding="utf-8") as file:
                file.write(f"{event} {what}\n")
            raise OSError(f"{event}: there is no network here")

        sys.addaudithook(watch)
        super().__call__()


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("hub")
    (directory / HUB_ID).mkdir(parents=True)
    build_tiny_model(directory / HUB_ID)
    (directory / HUB_ID / "model.onnx").write_text("another form of the weights")
    (directory / PTX).mkdir(parents=True)
    rows = [{"prompt": f"What is {number}?", "response": f"It is {number}."} for number in range(40)]
    (directory / PTX / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_a_prepared_run_opens_no_address_and_no_cache(hub, tmp_path):
    settings = (ROOT / "applications/presets/tiny.yaml").read_text().replace("model: tiny", f"model: {HUB_ID}")
    (tmp_path / "tiny.yaml").write_text(settings.partition("architecture:")[0])
    options = ("--config", tmp_path / "tiny.yaml", "--data", ROOT / "tests/data/pairs.jsonl", "--name", "away")
    sets = (
        "rlhf.iterations=1",
        "sft.max_steps=2",
        "reward.max_steps=2",
        f"rlhf.ptx.source={PTX}",
        "evaluation.prompts=2",
    )
    options += tuple(word for each in (*sets, "rlhf.ptx.coefficient=1") for word in ("--set", each))
    empty = {"RLHF_CHAT_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
    prepared = run_as(OnLogin(("prepare", *map(str, options), "--json"), hub=hub), tmp_path, empty)
    assert prepared.code == 0, prepared.err
    said = json.loads(prepared.out)
    run = tmp_path / "runs" / "away"
    assert {HUB_ID: str(run / "models" / "org--tiny")} == {each["source"]: each["path"] for each in said["models"]}
    assert said["models"][0]["bytes"] > 100_000 and not (run / "models/org--tiny/model.onnx").exists()
    assert str(run) in said["needs"] and not said["changed"]
    assert not list(tmp_path.glob("runs/away/step*"))

    shutil.move(hub, hub.with_name("gone"))
    node = empty | {"RLHF_CHAT_CACHE": str(tmp_path / "none"), "XDG_STATE_HOME": str(tmp_path / "state")}
    done = run_as(OnNode(("run", "--name", "away"), opened=tmp_path / "opened"), tmp_path, node)
    shutil.move(hub.with_name("gone"), hub)
    assert not (tmp_path / "opened").exists(), (tmp_path / "opened").read_text()
    assert done.code == 0, done.out + done.err
    assert (run / "step3_rlhf/result.json").exists() and (run / "evaluation.json").exists()
    assert not (tmp_path / "none").exists()


def run_as(command: Command, cwd: Path, environment: dict[str, str]) -> Done:
    return fork_all([command], [environment], cwd, stdin="", timeout=300)[0]


def test_what_the_hub_does_not_give_leaves_the_name_free(tmp_path):
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    done = rlhf_chat("prepare", "--model", HUB_ID, "--name", "away", cwd=tmp_path, **unreachable)
    assert done.code == 2 and "Traceback" not in done.err
    assert f"There is no directory '{HUB_ID}', and the hub cannot be reached for it" in done.err
    assert not (tmp_path / "runs").exists()


def test_models_are_kept_whole_once_and_are_no_longer_fetched(hub, tmp_path, monkeypatch):
    from training import inputs

    run, config = RunDirectory(tmp_path / "run"), load_config([], [f"model={HUB_ID}", "method=dpo"])
    monkeypatch.setattr(inputs, "resolve_model", lambda source, report: hub / source)
    assert {use.what for use in of_models(run, config)} == {f"fetch the model {HUB_ID} from the hub"}

    def break_off(file: Path, place: Path) -> None:
        raise UserError("gone")

    with monkeypatch.context() as half, pytest.raises(UserError):
        half.setattr(inputs, "link_or_copy", break_off)
        inputs.store_models(run, config, print)
    assert not stored_model(run, HUB_ID).exists()

    inputs.store_models(run, config, print)
    weights = stored_model(run, HUB_ID) / "model.safetensors"
    assert weights.samefile(hub / HUB_ID / "model.safetensors")  # no room twice on one disk
    assert local_model(run, HUB_ID) == weights.parent and not list(of_models(run, config))
    assert models_of(load_config([], ["model=a/b", "reward_model=c/d"])) == ["a/b", "c/d"]
    assert models_of(load_config([], ["model=a/b", "reward_model=c/d", "method=dpo"])) == ["a/b"]
