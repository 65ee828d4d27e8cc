"""What is to be known of a GPU, in order of worth: sections bounded in time, 8 minutes at most for all.

    python -m benchmarks.gpu_day --out gpu_day.json
    python -m benchmarks.gpu_day bench generate

Each section is a process of its own and runs alone; what it finds is written at once. First come the packages that this
machine lacks. Weights are random and on the GPU from the start: nothing is fetched, no weights are read from a disk.
Without CUDA the same sections run in miniature on the CPU, so that on the day nothing is new but the device.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from packaging.requirements import Requirement
from torch import Tensor

from applications.preset_store import load_preset
from benchmarks import our_ppo, work
from inference.families import config_of
from training.config import RunConfig
from training.memory import estimate_step_memory, slots_in
from training.run_directory import versions, write_json
from training.shape import Shape
from training.steps import PPO, REWARD, Step

if TYPE_CHECKING:
    from training.distributed import Ranks

ROOT = Path(__file__).parents[1]
CUDA_TESTS = (
    "tests/inference/generation/test_graphs.py",
    "tests/inference/generation/test_packed_kernel.py",
    "tests/training/hybrid_engine/test_waiting_weights.py",
)
"""Files with tests that want CUDA."""
RULER_TOKENS = 133_966
"""Response tokens of the ruler that vLLM and nano-vLLM are compared by: 256 prompts drawn with seed 0."""

Found = Callable[..., None]
"""Tells what a section has found: a name, and figures by name."""


@dataclass(frozen=True)
class Rollouts:
    """An iteration of PPO with forced lengths."""

    samples: int
    prompt: int
    response: int
    lora: int = 0
    iterations: int = 2
    """The first warms up."""


@dataclass(frozen=True)
class Day:
    """Where the sections run, and how much each does."""

    device: torch.device
    dtype: str
    shapes: Mapping[str, Mapping[str, Any]]
    """Configurations of models, by the names of presets."""
    tests: tuple[str, ...]
    ruler: tuple[int, int, int]
    """Prompts, their shortest and their longest in tokens; responses are like them."""
    call: tuple[int, int, int]
    """Samples, prompt and response tokens."""
    iteration: Rollouts
    large: Rollouts

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]


MODELS = ("opt-1.3b", "opt-350m", "opt-13b", "qwen2.5-0.5b")
NARROW = {
    "opt": {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "qwen2": {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2},
}


def full_day() -> Day:
    shapes = {name: load_preset(name)["architecture"]["model"] for name in MODELS}
    iteration, large = Rollouts(64, 256, 256), Rollouts(8, 256, 256, lora=128)
    return Day(torch.device("cuda"), "bf16", shapes, CUDA_TESTS, (256, 100, 1024), (8, 256, 128), iteration, large)


def miniature() -> Day:
    common = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": work.VOCABULARY_SIZE}
    shapes = {}
    for name in MODELS:
        values = load_preset(name)["architecture"]["model"]
        shapes[name] = values | common | NARROW[values["model_type"]]
    iteration, large = Rollouts(4, 6, 5), Rollouts(4, 6, 5, lora=2)
    return Day(torch.device("cpu"), "fp32", shapes, CUDA_TESTS[1:2], (6, 4, 20), (2, 6, 4), iteration, large)


def random_model(day: Day, name: str, scorer: bool = False) -> Any:
    """A model of a preset's shape on the device: no disk has its weights."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.initialization import no_init_weights

    config = config_of(dict(day.shapes[name]))
    config.num_labels, config.pad_token_id = 1, work.PAD_ID
    family: Any = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    with torch.device(day.device), no_init_weights():
        model = family.from_config(config, dtype=day.torch_dtype)
    generator = torch.Generator(day.device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.02, generator=generator)
            else:
                weight.zero_()
        for module in model.modules():
            if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
                module.weight.fill_(1.0)
    return model.eval()


def synchronised(day: Day) -> float:
    """The time when the device has done all that it was asked for."""
    if day.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def tests(day: Day, found: Found) -> None:
    """Those that want CUDA: captured graphs, torch's attention over packed rows, weights that wait."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--tb=line", *day.tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found("pytest", passed=done.returncode == 0, said=done.stdout.splitlines()[-8:])


def equality(day: Day, found: Found) -> None:
    """The doctor's check: generation beside plain transformers, and beside training."""
    from applications.doctor import training_forward
    from inference.generation.equality import Tolerance, Work, compare, generate

    for name in ("opt-1.3b", "qwen2.5-0.5b"):
        model = random_model(day, name)
        asked = Work.of(model.config.vocab_size, work.PAD_ID, model.config.max_position_embeddings)
        findings = compare(generate(model, asked), model, asked, Tolerance.of(day.torch_dtype), training_forward(model))
        gaps = {each.name: [each.mean, each.largest] for each in findings.deviations}
        found(name, equal=findings.is_equal, verdict=findings.verdict, nats=gaps)


def ruler(day: Day) -> tuple[list[Tensor], list[int]]:
    """Prompts and the lengths of their responses; at full size the same as nano-vLLM's bench.py draws."""
    count, shortest, longest = day.ruler
    drawn = random.Random(0)
    prompts = [[drawn.randint(0, 10_000) for _ in range(drawn.randint(shortest, longest))] for _ in range(count)]
    lengths = [drawn.randint(shortest, longest) for _ in range(count)]
    vocabulary = day.shapes["qwen2.5-0.5b"]["vocab_size"]
    return [torch.tensor(prompt) % vocabulary for prompt in prompts], lengths


def generated(day: Day, model: Any, prompts: list[Tensor], lengths: list[int], **options: Any) -> Callable[[], int]:
    """Draws forced responses each time it is called; the engine stays. Returns how many tokens."""
    from inference.generation.engine import GenerationEngine
    from inference.generation.sampler import SamplingKey, SamplingSettings

    longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
    free_bytes = torch.cuda.mem_get_info()[0] if day.device.type == "cuda" else 2**30
    slots = min(len(prompts), slots_in(free_bytes, Shape.of(model.config), longest, day.torch_dtype))
    engine = GenerationEngine(model, (), work.PAD_ID, slots, room=(slots, longest), **options)

    def run(count: int = len(prompts), most: int = longest) -> int:
        chosen, wanted = prompts[:count], [min(length, most) for length in lengths[:count]]
        samples = engine.generate(chosen, SamplingSettings(max(wanted)), SamplingKey(0), lengths=wanted)
        return sum(len(sample.response_ids) for sample in samples)

    return run


def bench(day: Day, found: Found) -> None:
    """Throughput on the common ruler."""
    prompts, lengths = ruler(day)
    run = generated(day, random_model(day, "qwen2.5-0.5b"), prompts, lengths)
    run(4, 8)
    begun = synchronised(day)
    tokens = run()
    seconds = synchronised(day) - begun
    assert tokens == sum(lengths) and (day.device.type == "cpu" or tokens == RULER_TOKENS)
    found("ruler", tokens=tokens, seconds=seconds, tokens_per_second=tokens / seconds)


def generate(day: Day, found: Found) -> None:
    """The latency of one call, step by step and with steps that follow each other without the host."""
    samples, prompt, response = day.call
    model = random_model(day, "opt-1.3b")
    prompts = list(torch.randint(work.FIRST_PLAIN_ID, model.config.vocab_size, (samples, prompt)))
    for name, graphs in (("eager", False), ("graphs", True)):
        run = generated(day, model, prompts, [response] * samples, graphs=graphs)
        run()
        times = []
        for _ in range(3):
            begun = synchronised(day)
            run()
            times.append(synchronised(day) - begun)
        found(name, milliseconds=1000 * statistics.median(times))


def iteration(day: Day, found: Found, ranks: "Ranks | None" = None) -> None:
    """PPO of all weights."""
    rollouts(day, found, day.iteration, "opt-1.3b", ranks)


def large(day: Day, found: Found, ranks: "Ranks | None" = None) -> None:
    """PPO of adapters; the memory of the GPU beside what `--dry-run` says."""
    rollouts(day, found, day.large, "opt-13b", ranks)


def rollouts(day: Day, found: Found, size: Rollouts, actor: str, ranks: "Ranks | None") -> None:
    """Iterations of a real run, whose models are made here."""
    from training.distributed import start_ranks

    ranks = ranks or start_ranks(0)
    with tempfile.TemporaryDirectory() as directory:
        config = config_of_run(day, size, described(day, actor, directory), described(day, "opt-350m", directory))
        shape = size.samples * size.iterations, size.prompt
        prompts = list(torch.randint(work.FIRST_PLAIN_ID, work.VOCABULARY_SIZE, shape))
        with models_made_here(day, actor):
            ppo = our_ppo.trainer(config, prompts, Path(directory) / "run", ranks)
        ppo.rollouts.forced_lengths = lambda number: [size.response] * size.samples
        shapes = [Shape.of(config_of(dict(day.shapes[name]))) for name in (actor, "opt-350m")]
        config = config.model_copy(update={"rlhf": ppo.roles.settings})  # with the slots that there is room for
        memory = estimate_step_memory(PPO, config, *shapes, day.torch_dtype, 1, calls=ppo.roles.calls)
        for number in range(1, size.iterations + 1):
            begun = synchronised(day)
            metrics = ppo.iterate(number, check=False).metrics
            seconds = synchronised(day) - begun
            phases = {name: value for name, value in metrics.items() if name.startswith("time/")}
            used = torch.cuda.max_memory_allocated() if day.device.type == "cuda" else 0
            found(
                f"iteration {number}",
                seconds=seconds,
                sequences_per_second=size.samples / seconds,
                slots=min(size.samples, ppo.roles.plan["actor_generate"].together(size.samples)),
                gib_used=used / 2**30,
                gib_estimated=memory.peak("device") / 2**30,
                **phases,
            )


def described(day: Day, name: str, directory: str) -> Path:
    """A model directory without weights: what runs ask of it before they load."""
    path = Path(directory) / name
    config_of(dict(day.shapes[name])).save_pretrained(path)
    work.make_tokenizer().save_pretrained(path)
    return path


def config_of_run(day: Day, size: Rollouts, actor: Path, reward: Path) -> RunConfig:
    trained = {"learning_rate": 1e-6, "gradient_checkpointing": bool(size.lora)}
    return RunConfig.model_validate(
        {
            "model": str(actor),
            "sft_model": str(actor),
            "trained_reward_model": str(reward),
            "dtype": day.dtype,
            "data": {"max_prompt_tokens": size.prompt, "max_response_tokens": size.response},
            "rlhf": {
                "iterations": size.iterations,
                "prompts_per_iteration": size.samples,
                "mini_batches": 2,
                "exact": False,
                "actor": trained | {"lora": {"rank": size.lora}},
                "critic": trained,
            },
        }
    )


@contextmanager
def models_made_here(day: Day, actor: str):
    """Inside, what step 3 loads are random models of these shapes."""
    from training.models.loading import fit_vocabulary
    from training.stage import Stage
    from training.step3_rlhf import roles

    def made(name: str, scorer: bool) -> Callable[..., Any]:
        def load(source: Path, chat_format: Any, dtype: torch.dtype, *_: Any, **__: Any) -> Any:
            model = random_model(day, name, scorer).to(dtype)
            fit_vocabulary(model, chat_format)
            return model

        return load

    def directory(stage: Stage, step: Step) -> Path:
        return Path(stage.config.trained_reward_model if step is REWARD else stage.config.sft_model)

    with (
        patch.object(roles, "load_causal_lm", made(actor, False)),
        patch.object(roles, "load_scorer", made("opt-350m", True)),
        patch.object(Stage, "earlier_model", directory),
    ):
        yield


@dataclass(frozen=True)
class Section:
    run: Callable[..., None]
    limit: int
    """Seconds."""
    beside: str
    """What others reach."""


SECTIONS = {
    "tests": Section(tests, 70, "pass"),
    "equality": Section(equality, 50, "equal"),
    "bench": Section(bench, 80, "vLLM on A800 17,711 tokens a second, nano-vllm-triton 24,121"),
    "generate": Section(generate, 40, "DeepSpeed's hybrid engine on H100 676.7 ms eager, 360.8 with graphs"),
    "iteration": Section(iteration, 110, "DeepSpeed-Chat on one A100-80G 6.3 sequences a second"),
    "large": Section(large, 130, "DeepSpeed-Chat 0.62 sequences a second; the memory that is estimated"),
}


def missing_packages() -> list[str]:
    """Requirements of the project that this machine does not meet."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    missing = []
    for requirement in map(Requirement, project["dependencies"]):
        try:
            here = version(requirement.name)
        except PackageNotFoundError:
            here = ""
        if not here or not requirement.specifier.contains(here, prereleases=True):
            missing.append(f"{requirement} (here: {here or 'none'})")
    return missing


def run_inside(name: str) -> None:
    """A section in this process; a line of JSON for each thing found."""
    day = full_day() if torch.cuda.is_available() else miniature()

    def found(what: str, **figures: Any) -> None:
        print(json.dumps({what: figures}), flush=True)

    SECTIONS[name].run(day, found)


def outcome(name: str, limit: float) -> dict[str, Any]:
    """What a section found in a process of its own, also where it failed or its time was over."""
    command, begun = [sys.executable, "-m", "benchmarks.gpu_day", "--inside", name], time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=limit)
        out, error = done.stdout, "" if done.returncode == 0 else done.stderr.decode()[-2000:]
    except subprocess.TimeoutExpired as late:
        out, error = late.stdout or b"", f"stopped after {limit:.0f} seconds"
    found = {}
    for line in out.decode().splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    failed = {"error": error} if error else {}
    return {"seconds": round(time.perf_counter() - begun, 1), "beside": SECTIONS[name].beside, **found, **failed}


def main(given: Sequence[str] | None = None, run: Callable[[str, float], dict[str, Any]] = outcome) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="all, in this order, where none is named")
    parser.add_argument("--out", type=Path, help="JSON file for all that was found so far")
    parser.add_argument("--seconds", type=float, default=480, help="for all sections together")
    parser.add_argument("--inside", choices=SECTIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.inside:
        return run_inside(arguments.inside)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, in miniature"
    report: dict[str, Any] = {"device": where, "versions": versions(), "missing": missing_packages(), "sections": {}}
    print(json.dumps(report), flush=True)
    end = time.monotonic() + arguments.seconds
    for name in arguments.sections or SECTIONS:
        limit = min(SECTIONS[name].limit, end - time.monotonic())
        report["sections"][name] = run(name, limit) if limit > 5 else {"error": "no time is left"}
        print(json.dumps({name: report["sections"][name]}, indent=1), flush=True)
        if arguments.out:
            write_json(arguments.out, report)


if __name__ == "__main__":
    main()
