"""The private surfaces of DeepSpeed, torch and Python that `training` relies on are as they were read."""

import atexit
import inspect
import math
from datetime import timedelta
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from inference.private_surfaces import is_divided, whole_shape
from tests.training.hybrid_engine.test_moving_average import make_engine, train
from training import private_surfaces
from training.data.batching import TokenBatch
from training.private_surfaces import OWN_WEIGHTS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from inference.families import build_tiny_model

    directory = tmp_path_factory.mktemp("tiny")
    build_tiny_model(directory)
    return directory


@pytest.mark.parametrize(("stage", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (3, torch.float32)])
def test_an_optimiser_keeps_its_weights_where_we_read_and_write_them(stage, dtype, tiny, one_rank):
    engine = make_engine(one_rank, tiny, stage, dtype=dtype)
    name = OWN_WEIGHTS[stage < 3]
    assert hasattr(engine.engine.optimizer, name), f"DeepSpeed's optimiser of ZeRO stage {stage} has no {name} any more"
    own = private_surfaces.own_weights(engine.engine.optimizer)
    count = sum(torch.Size(whole_shape(p)).numel() for p in engine.module.parameters())
    assert {t.dtype for t in own} == {torch.float32} and count <= sum(t.numel() for t in own) <= 1.1 * count
    if stage == 3:
        parameter = max(engine.module.parameters(), key=lambda p: torch.Size(whole_shape(p)).numel())
        assert is_divided(parameter), "ZeRO 3 no longer keeps a parameter's shape in ds_shape"
        assert not parameter.numel(), "ZeRO 3 no longer empties a parameter between uses"
        assert private_surfaces.own_part(parameter).numel() == torch.Size(whole_shape(parameter)).numel()
    for weight in own:
        weight.data.fill_(3.0)
    private_surfaces.refresh_weights(engine.engine.optimizer)
    read = [p.ds_tensor.view(-1)[: math.prod(p.ds_shape)] if stage == 3 else p for p in engine.module.parameters()]
    assert all((values == 3).all() for values in read), "DeepSpeed no longer takes over what was written"
    runs = [private_surfaces.own_run(engine.engine.optimizer, p) for p in engine.module.parameters()]
    sizes = [math.prod(whole_shape(p)) for p in engine.module.parameters()]
    assert [run[:2] for run in runs] == [(0, size) for size in sizes], "one rank no longer has all of each parameter"
    assert not private_surfaces.is_on_disk(engine.engine.optimizer)
    if stage == 3:
        assert any(p.numel() for p in engine.module.parameters()), "small parameters are no longer made whole"
        for parameter in engine.module.parameters():
            private_surfaces.forget_whole(parameter)
        assert all(not p.numel() for p in engine.module.parameters()), "partition no longer lets go of a whole one"


def test_bf16_with_sums_in_fp32_keeps_its_weights_by_the_third_name():
    from training.hybrid_engine.deepspeed_setup import deepspeed

    source = inspect.getsource(deepspeed.runtime.bf16_optimizer.BF16_Optimizer)
    assert f"self.{OWN_WEIGHTS[2]} = " in source


@pytest.mark.parametrize(("stage", "dtype"), [(0, torch.float32), (1, torch.float32), (1, torch.bfloat16)])
def test_an_optimiser_keeps_its_gradients_where_we_read_and_write_them(stage, dtype, tiny, one_rank):
    engine = make_engine(one_rank, tiny, stage, dtype=dtype)
    parameter = next(engine.module.parameters())
    start = {name: weight.clone() for name, weight in engine.trained_weights().items()}
    engine.engine.set_gradient_accumulation_boundary(False)
    for _ in range(2):
        batch = TokenBatch.of([(torch.tensor([5]), torch.tensor([6]))], one_rank.device)
        engine.engine.backward(engine(batch)[0].sum())
    summed = private_surfaces.summed_gradient(engine.engine, parameter)
    assert summed.numel() == parameter.numel() and summed.dtype == torch.float32
    summed.zero_().view(-1)[0] = 1000.0
    engine.engine.set_gradient_accumulation_boundary(True)
    engine.engine.allreduce_gradients()
    reduced, divided = private_surfaces.reduced_gradients(engine.engine)
    assert divided == (stage == 1 and dtype == torch.float32)
    count = sum(each.numel() for each in engine.module.parameters())
    assert count <= sum(each.numel() for each in reduced) <= 1.1 * count
    assert max(float(each.max()) for each in reduced) == 1000.0, "what is summed is not what is reduced"
    for gradient in reduced:
        gradient.zero_()
    engine.step()
    weights = engine.trained_weights()
    assert all(torch.equal(weights[name], start[name]) for name in start), "what is reduced is not what is stepped with"


def test_gradients_are_reduced_through_the_method_that_we_replace(tiny, one_rank, monkeypatch):
    from training.hybrid_engine.deepspeed_setup import deepspeed

    called = []
    engine = make_engine(one_rank, tiny, 0)
    assert callable(deepspeed.DeepSpeedEngine.buffered_allreduce_fallback)
    monkeypatch.setattr(engine.engine, "buffered_allreduce_fallback", lambda *_, **__: called.append(True))
    train(one_rank, engine, 1)
    assert called, "DeepSpeed no longer reduces gradients of stage 0 with buffered_allreduce_fallback"
    assert private_surfaces.reduce_nothing(engine.engine) is None
    assert engine.engine.buffered_allreduce_fallback(grads=None, elements_per_buffer=1) is None


def test_fp16_optimisers_look_for_an_overflow_where_we_answer():
    """By their source: fp16 does not run on a CPU."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for kind in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        source = inspect.getsource(kind)
        assert "def has_overflow(self, partition_gradients=True)" in source, kind
        assert "self._update_scale(self.overflow)" in source, kind
        assert "self.overflow = self.has_overflow(partition_gradients)" in source, kind


def test_a_loss_scale_is_what_deepspeed_counts():
    """With its scaler alone: fp16 does not run on a CPU."""
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

    def scaled(dynamic: bool):
        arguments = {"init_scale": 1024, "scale_window": 2, "delayed_shift": 2, "min_scale": 1}
        arguments["consecutive_hysteresis"] = False
        return SimpleNamespace(loss_scaler=CreateLossScaler(torch.float16, 8.0, dynamic, arguments))

    first, again = scaled(True), scaled(True)
    first.loss_scaler.cur_hysteresis = 1  # as after an overflow
    for _ in range(3):
        first.loss_scaler.update_scale(False)
    private_surfaces.restore_loss_scale(again, private_surfaces.loss_scale(first))
    assert vars(again.loss_scaler) == vars(first.loss_scaler) != vars(scaled(True).loss_scaler)
    fixed = scaled(False)
    assert private_surfaces.loss_scale(fixed) == {}
    private_surfaces.restore_loss_scale(fixed, private_surfaces.loss_scale(first))
    assert fixed.loss_scaler.cur_scale == 8.0


def test_deepspeed_is_kept_from_compiling(monkeypatch):
    from training.hybrid_engine.deepspeed_setup import deepspeed

    compatible = deepspeed.ops.__compatible_ops__
    assert compatible["deepspeed_shm_comm"] is False
    monkeypatch.setitem(compatible, "deepspeed_shm_comm", True)
    private_surfaces.without_shared_memory(deepspeed)
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    backend = import_module("deepspeed.comm.torch")
    assert backend.build_shm_op() is None, "DeepSpeed no longer asks __compatible_ops__ before it compiles"


def test_checkpoints_hold_classes_that_there_are():
    from training.hybrid_engine.deepspeed_setup import deepspeed

    names = [kind.__name__ for kind in private_surfaces.classes_in_checkpoints(deepspeed)]
    assert names == ["LossScaler", "DynamicLossScaler", "ZeroStageEnum", "fragment_address"]


def test_groups_made_without_a_time_out_take_what_we_set(one_rank):
    before = dist.distributed_c10d.default_pg_timeout
    patience = timedelta(hours=7)
    private_surfaces.wait_at_most(patience)
    try:
        group = dist.new_group([0])
        assert group._get_backend(torch.device("cpu")).options._timeout == patience, "torch no longer reads it there"
    finally:
        private_surfaces.wait_at_most(before)


def test_the_process_group_has_a_store(one_rank):
    store = dist.PrefixStore("of a test", private_surfaces.default_store())
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_torch_says_what_the_processor_multiplies(monkeypatch):
    assert private_surfaces.multiplies_bf16() in (True, False)
    for answers in ((True, False), (False, True), (False, False)):
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        for name, answer in zip(names, answers, strict=True):
            assert callable(getattr(torch.cpu, name, None)), f"torch.cpu.{name} is gone"
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer)
        assert private_surfaces.multiplies_bf16() == any(answers)


def test_exit_functions_run_when_asked(monkeypatch):
    called = SimpleNamespace(count=0)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: setattr(called, "count", called.count + 1))
    private_surfaces.run_exit_functions()
    assert called.count == 1


def test_a_part_of_the_ranks_stands_for_all_of_them(one_rank):
    from deepspeed.utils import groups

    whole, part = dist.group.WORLD, dist.new_group([0])
    with private_surfaces.default_group(part):
        assert dist.group.WORLD is part, "torch keeps its default group elsewhere"
        assert groups._clone_world_group() is part, "DeepSpeed keeps its copy of the default group elsewhere"
    assert dist.group.WORLD is whole


def test_zero_3_counts_parameters_and_modules_where_we_set_it(tiny, one_rank):
    private_surfaces.count_zero_3_from(5000, 7000)
    engine = make_engine(one_rank, tiny, 3)
    parameters = {parameter.ds_id for parameter in engine.module.parameters()}
    modules = {module.ds_id for module in engine.module.modules() if hasattr(module, "ds_id")}
    assert min(parameters) == 5000 and min(modules) == 7000, "DeepSpeed counts elsewhere"
    assert private_surfaces.numbers_of_zero_3() == (max(parameters) + 1, max(modules))
