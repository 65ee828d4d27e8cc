"""Engines of stages train as one engine of the whole model does."""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, OPTConfig, OPTForCausalLM

from inference.errors import UserError
from tests.ranks import run_ranks
from tests.training.hybrid_engine.test_zero_engine import make_rows
from training.data.batching import TokenBatch, plan_micro_batches
from training.distributed import Ranks
from training.hybrid_engine.layout import Layout, StageCut
from training.hybrid_engine.stored_weights import MovingAverage, WeightsBackup
from training.hybrid_engine.zero_engine import ZeroEngine
from training.models.policy import Policy, Scorer
from training.pipelines.executor import connect, execute
from training.pipelines.orders import Pipelines, fused, one_forward_one_backward, serial
from training.pipelines.stage_engine import Pass, ScoringWork, StageEngine
from training.pipelines.stage_model import keep_stage, tied_table
from training.planner.schedules.best import find_schedule
from training.planner.schedules.problem import FORWARD, Pipeline, SchedulingProblem
from training.role_settings import LoRASettings, OptimizerSettings

LAYERS = (2, 1)
UPDATES, TIED_UPDATES = 3, 100


@dataclass(frozen=True)
class Case:
    model: str = "llama"
    """`llama`, `tied` (a Llama whose head is its table of embeddings), `opt` (tied too), or `scorer` (a Llama)."""
    zero_stage: int = 0
    dtype: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict)
    lora: int = 0
    clipping: float = 0.0
    backwards: bool = False
    """The last rank has the first stage."""
    tolerance: float = 0.0
    """Largest difference, relative to the largest weight, with one data rank."""


CLIPPED, CLOSE = 0.3, 1e-6
OVERLAPPING = {"deepspeed": {"zero_optimization": {"overlap_comm": True}}}
CASES = {
    "plain": Case(),
    "recomputed": Case(zero_stage=1, settings={"gradient_checkpointing": True}),
    "clipped": Case(zero_stage=1, settings=OVERLAPPING, clipping=CLIPPED, tolerance=CLOSE),
    "tied": Case("tied", clipping=CLIPPED, tolerance=CLOSE),
    "tied zero 1": Case("tied", 1, clipping=CLIPPED, backwards=True, tolerance=CLOSE),
    "opt": Case("opt", clipping=CLIPPED, tolerance=CLOSE),
    "bf16": Case(dtype="bfloat16"),
    "tied bf16": Case("tied", 1, "bfloat16", clipping=CLIPPED, tolerance=5e-3),
    "bf16 alone": Case(dtype="bfloat16", settings={"master_weights": False}),
    "bf16 alone zero 1": Case("llama", 1, "bfloat16", {"master_weights": False}),
    "offload": Case("tied", 1, settings={"offload": "optimizer"}, clipping=CLIPPED, tolerance=CLOSE),
    "lora": Case("tied", lora=4),
    "scorer": Case("scorer", 1, lora=4, clipping=CLIPPED, tolerance=CLOSE),
}
OF_TWO_DATA_RANKS = ("plain", "clipped", "tied zero 1", "tied bf16", "offload", "scorer")
KEPT = {"tied": 2, "tied zero 1": 4, "tied bf16": 4, "lora": 2}
"""Those that are saved and go on, and on how many ranks."""
STEPS = 100
"""Of the one whose copies of a table are looked at after so many."""


def make_model(case: Case) -> Any:
    """With adapters where the case has them; the same weights each time."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": sum(LAYERS), "num_attention_heads": 4}
    lora = LoRASettings(rank=case.lora, learning_rate=3e-3)
    if case.model == "opt":
        config = OPTConfig(**sizes, word_embed_proj_dim=32, ffn_dim=48, dropout=0.0, max_position_embeddings=64)
        return Policy(OPTForCausalLM(config), lora)
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=case.model == "tied",
        pad_token_id=0,
        num_labels=1,
    )
    if case.model == "scorer":
        return Scorer(LlamaForSequenceClassification(config), lora)
    return Policy(LlamaForCausalLM(config), lora)


def settings_of(case: Case) -> Any:
    lora = LoRASettings(rank=case.lora, learning_rate=3e-3)
    own = {"zero_stage": case.zero_stage, "gradient_clipping": case.clipping, "lora": lora} | case.settings
    return OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, warmup=0, epsilon=1e-3, **own)


ROWS = make_rows(11)  # odd: two data ranks get unequal numbers, and one of them a micro-batch of weight 0
LENGTHS = [len(prompt) + len(response) for prompt, response in ROWS]


def batch_of(micro_batch: Any) -> Any:
    return TokenBatch.of([ROWS[i] for i in micro_batch.rows], torch.device("cpu"))


def loss_of(said: Any, batch: TokenBatch | None = None) -> torch.Tensor:
    """Of a policy, or of a scorer."""
    return (-said[0].sum() if isinstance(said, tuple) else 3 * said.square().sum()) / sum(LENGTHS)


def micro_batches_of(data_rank: int, data: int, update: int) -> list:
    """Of unequal sizes, others in each update; of some rows alone where `update` is negative."""
    return plan_micro_batches(LENGTHS[: update if update < 0 else None], 60 + 20 * max(update, 0), data)[data_rank]


def train_whole(ranks, directory):
    """All ranks have the whole model; the first one leaves the weights of each case in a file."""
    found = {}
    for name, case in CASES.items():
        if ranks.size == 2 and name not in OF_TWO_DATA_RANKS:
            continue
        engine = ZeroEngine(make_model(case), settings_of(case), getattr(torch, case.dtype), 10, ranks)
        steps, weights = trained(engine, ranks)
        found[name] = {"steps": steps}
        if ranks.is_first:
            torch.save(weights, directory / f"{name} {ranks.size}.pt")
    return found


def trained(engine, ranks) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The updates of a whole model, and the weights then."""
    steps = []
    for update in range(UPDATES):
        micro_batches = micro_batches_of(ranks.rank, ranks.size, update)
        steps.append(engine.update(micro_batches, lambda each: loss_of(engine(batch_of(each)))))
    return steps, engine.trained_weights()


class Stage:
    """This rank's of a case, on two stages."""

    def __init__(self, ranks, name: str):
        case, self.ranks = CASES[name], ranks
        mesh = tuple(range(ranks.size))[:: -1 if case.backwards else 1]
        layout = Layout(mesh, data=ranks.size // 2, pipeline=2, layers=LAYERS)
        cut, self.data, self.data_rank = layout.stage_cut(ranks.rank, 3), layout.data, layout.data_rank(ranks.rank)
        self.pipelines = Pipelines.of(layout, 1)
        parts = [ranks.part(group) for group in (*layout.stage_meshes, *self.pipelines.ranks)]
        mine, pipeline = [part for part in parts if part is not None]
        self.links = connect(ranks, self.pipelines)
        model = make_model(case)
        keep_stage(model.model, cut)
        self.engine = StageEngine(model, settings_of(case), getattr(torch, case.dtype), 10, mine, pipeline, cut)

    def work(self, update: int) -> Any:
        passes = [
            Pass(partial(batch_of, each), loss_of, each.weight)
            for each in micro_batches_of(self.data_rank, self.data, update)
        ]
        return self.engine.work(passes)

    def update(self, update: int) -> dict[str, float]:
        compute({"role": (self, self.work(update))}, one_forward_one_backward)
        self.was_training = self.engine.module.training
        return self.engine.step()

    def table(self) -> bytes:
        return tied_table(self.engine.language_model).detach().float().numpy().tobytes()

    def shared(self) -> bool:
        """Whether all copies of the table are equal to the bit."""
        return len(set(self.ranks.gather(self.table()))) == 1

    def broken_norm(self) -> float:
        """Of a gradient that is infinite on the first stage."""
        if self.engine.cut.is_first:
            parameter = [each for each in self.engine.module.parameters() if each.requires_grad][-1]
            parameter.register_hook(lambda gradient: gradient * math.inf)
        return self.update(-8)["grad_norm"]

    def scores(self) -> list:
        """What the model says of some batches; on the last stage."""
        said: dict[int, Any] = {}
        batches = [batch_of(each) for each in micro_batches_of(0, 1, 0)]
        work = ScoringWork(self.engine, self.engine.language_model, self.engine.cut, batches, said.__setitem__)
        compute({"role": (self, work)}, serial, kinds=(FORWARD,))
        return [said[place][0].tolist() for place in sorted(said)]


def compute(works, order, **more) -> None:
    """The works of stages, by role: (stage, work)."""
    roles = {role: replace(each.pipelines, micro_batches=work.count, **more) for role, (each, work) in works.items()}
    [ranks] = {each.ranks for each, _ in works.values()}
    links = {role: each.links for role, (each, _) in works.items()}
    execute(order(roles), ranks.rank, {role: work for role, (_, work) in works.items()}, links)


def fused_orders(roles):
    a, b = (Pipeline(each.stages, each.micro_batches, 1, 2, 1) for each in roles.values())
    return fused(roles, find_schedule(SchedulingProblem(a, b), effort=2_000).schedule)


def trained_together(ranks, order) -> list:
    """Steps and weights of two roles, the second against the first, with unlike numbers of micro-batches."""
    stages = {"actor": Stage(ranks, "plain"), "critic": Stage(ranks, "tied zero 1")}
    steps = []
    for _ in range(UPDATES):
        compute({role: (stage, stage.work(-8 if role == "critic" else 0)) for role, stage in stages.items()}, order)
        steps += [stage.engine.step() for stage in stages.values()]
    return [steps, *(weight.tolist() for s in stages.values() for weight in s.engine.trained_weights().values())]


def train_stages(ranks, directory):
    """Two stages, of as many data ranks as there are: {case: what came of it}."""
    found = {}
    for name, case in CASES.items():
        if ranks.size == 4 and name not in OF_TWO_DATA_RANKS:
            continue
        stage = Stage(ranks, name)
        steps = [stage.update(number) for number in range(UPDATES)]
        weights = stage.engine.trained_weights()
        own = sum(part.numel() for part in stage.engine.own_weights())
        modes = [stage.was_training, stage.engine.module.training]
        found[name] = {"steps": steps, "names": sorted(weights), "own": own, "modes": modes}
        if case.model in ("tied", "opt"):
            found[name]["shared"] = stage.shared()
        if ranks.is_first:
            whole = torch.load(directory / f"{name} {ranks.size // 2}.pt")
            assert {key: weight.shape for key, weight in weights.items()} == {key: w.shape for key, w in whole.items()}
            largest = max(float(weight.abs().max()) for weight in whole.values())
            differences = [float((weights[key] - weight).abs().max()) for key, weight in whole.items()]
            found[name]["whole"] = sum(weight.numel() for weight in whole.values())
            found[name]["error"] = max(differences) / largest
        if KEPT.get(name) == ranks.size:
            found[name] |= go_on(stage, directory / f"{name} {ranks.size}")
        if name == "tied":
            before = stage.table()
            for _ in range(STEPS):
                stage.update(-8)
            found[name]["shared later"] = stage.shared() and before != stage.table()
        found[name]["broken"] = stage.broken_norm()
    if ranks.size == 2:
        found["together"] = trained_together(ranks, fused_orders) == trained_together(ranks, serial)
    return found


def go_on(stage, directory) -> dict[str, bool]:
    """Save, train, and go back in two ways."""
    engine, average = stage.engine, MovingAverage(stage.engine, 0.5)
    stage.update(0)
    average.update()
    if stage.ranks.is_first:
        directory.mkdir()
    stage.ranks.barrier()
    engine.save(directory / "role")
    average.save(directory / "average")
    backup = WeightsBackup(engine, average)
    backup.store()

    def look() -> list:
        weights = [*engine.module.parameters(), *engine.trained_weights().values(), *average.weights().values()]
        return [stage.scores(), *(weight.tolist() for weight in weights)]

    before = look()
    stage.update(1)
    average.update()
    after = look()
    backup.put_back()
    back = look()
    backup.save(directory / "kept")
    stage.update(0)  # away from there, before it is loaded
    from_files = WeightsBackup(engine, average)
    from_files.load(directory / "kept")
    from_files.put_back()
    best = look()
    stage.update(0)
    engine.load(directory / "role")
    average.load(directory / "average")
    loaded = look()
    stage.update(1)
    average.update()
    return {
        "moved": before != after,
        "back": before == back,
        "best": before == best,
        "loaded": before == loaded,
        "resumed": after == look(),
        "files": sorted(str(file.relative_to(directory)) for file in directory.rglob("*.safetensors")),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By (number of data ranks, whole or stages): what each rank found."""
    directory = tmp_path_factory.mktemp("stages")
    runs = {}
    for data in (1, 2):
        runs[data, "whole"] = run_ranks(__file__, "train_whole", data, directory)
        runs[data, "stages"] = run_ranks(__file__, "train_stages", 2 * data, directory)
    return runs


def cases_of(found, data: int):
    """(case, what the first rank found, what all of them did, the steps of the whole model)."""
    of_ranks, whole = found[data, "stages"], found[data, "whole"][0]
    for name in whole:
        yield name, of_ranks[0][name], [each[name] for each in of_ranks], whole[name]["steps"]


@pytest.mark.parametrize("data", [1, 2])
def test_weights_are_those_of_the_whole_model(found, data):
    """With one data rank to the bit, but where a table is tied or gradients are clipped."""
    for name, first, _, _ in cases_of(found, data):
        assert first["error"] <= max(CASES[name].tolerance, CLOSE if data > 1 else 0.0), name


@pytest.mark.parametrize("data", [1, 2])
def test_steps_say_the_same_on_all_stages_and_of_the_whole_model(found, data):
    for name, first, of_ranks, whole in cases_of(found, data):
        assert all(each["steps"] == first["steps"] for each in of_ranks), name
        tolerance = 1e-5 if CASES[name].dtype == "float32" else 1e-2
        for ours, theirs in zip(first["steps"], whole, strict=True):
            assert ours == pytest.approx(theirs, rel=tolerance), name
        assert not CASES[name].clipping or whole[0]["grad_norm"] > 1.1 * CLIPPED, name


def test_the_first_rank_alone_gets_weights(found):
    for data in (1, 2):
        for name, first, of_ranks, _ in cases_of(found, data):
            assert first["names"] and not any(each["names"] for each in of_ranks[1:]), name


def test_a_weight_has_one_optimiser_state_also_where_two_stages_hold_it(found):
    for name, first, of_ranks, _ in cases_of(found, 1):
        assert first["whole"] <= sum(each["own"] for each in of_ranks) < first["whole"] + 50, name  # padding


def test_a_stage_is_in_training_mode_where_activations_are_recomputed_and_until_the_step(found):
    for name, first, _, _ in cases_of(found, 1):
        assert first["modes"] == [name == "recomputed", False], name


def test_copies_of_a_tied_table_are_equal_to_the_bit(found):
    for data in (1, 2):
        shared = [first["shared"] for _, first, _, _ in cases_of(found, data) if "shared" in first]
        assert len(shared) > 2 and all(shared)
    assert found[1, "stages"][0]["tied"]["shared later"]


@pytest.mark.parametrize("data", [1, 2])
def test_a_gradient_that_is_no_number_on_one_stage_is_seen_on_all(found, data):
    for name, _, of_ranks, _ in cases_of(found, data):
        assert not any(math.isfinite(each["broken"]) for each in of_ranks), name


def test_what_is_saved_and_kept_goes_on_to_the_bit(found):
    for name, size in KEPT.items():
        for rank in found[size // 2, "stages"]:
            assert [rank[name][way] for way in ("moved", "back", "best", "loaded", "resumed")] == [True] * 5, (
                name,
                size,
            )
            files = rank[name]["files"]
            assert sum("average" in file for file in files) == size, files


def test_two_roles_against_each_other_train_the_same_in_a_fused_order(found):
    assert all(rank["together"] for rank in found[1, "stages"])


class Crossing(Ranks):
    """Of two stages, whose ranks have other places among those of their stages."""

    def gather(self, value: Any, phase: str = "") -> list[Any]:
        return [value, (1 - value[0], 1 - value[1])]


def test_a_mesh_out_of_order_is_refused_in_a_sentence():
    alone, crossing = Ranks(0, 1, torch.device("cpu")), Crossing(0, 2, torch.device("cpu"), mesh=(0, 3))
    arguments = make_model(CASES["plain"]), settings_of(CASES["plain"]), torch.float32, 10, alone
    with pytest.raises(UserError, match="list the ranks of each stage of the mesh in ascending order"):
        StageEngine(*arguments, crossing, StageCut(1, LAYERS))
