"""Our side of the benchmark does the work that it says, on real PPO classes."""

from benchmarks import work
from benchmarks.work import Lengths, Size
from tests.ranks import run_ranks

LENGTHS = Lengths(longest=5, spread=0.0)


def iterate_in_three_ways(ranks, directory):
    """Seconds and dtypes by the way the weights are kept; called in a process of its own."""
    from benchmarks import our_ppo

    work.build_models(directory / "models", Size(hidden=32, layers=2, heads=4, ffn=64))
    work.models = lambda size: work.Models(directory / "models" / "actor", directory / "models" / "reward")
    found = {}
    for dtype, master in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "none")):
        config = our_ppo.make_config("tiny", LENGTHS, dtype, master, iterations=1, threads=1)
        ppo = our_ppo.make_ppo(config, LENGTHS, directory / f"{dtype}-{master}", ranks)
        engine = ppo.roles.actor.engine
        seconds = our_ppo.iterate(ppo, 0, LENGTHS)
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        kept = [tensor for state in inner.state.values() for tensor in state.values() if tensor.ndim]
        kept += [parameter for group in inner.param_groups for parameter in group["params"]]
        weights = {str(parameter.dtype) for parameter in engine.module.parameters()}
        found[f"{dtype} {master}"] = [seconds, sorted(weights), sorted({str(tensor.dtype) for tensor in kept})]
    return found


def test_an_iteration_has_the_forced_lengths_and_keeps_weights_as_described(tmp_path):
    found = run_ranks(__file__, "iterate_in_three_ways", 1, tmp_path)[0]
    for seconds, _, _ in found.values():
        assert seconds["tokens"] == 32 * 5
        assert 0 < seconds["generate"] + seconds["score"] + seconds["train"] <= seconds["total"]
    dtypes = {way: (weights, kept) for way, (_, weights, kept) in found.items()}
    assert dtypes == {
        "fp32 fp32": (["torch.float32"], ["torch.float32"]),
        "bf16 fp32": (["torch.bfloat16"], ["torch.float32"]),
        "bf16 none": (["torch.bfloat16"], ["torch.bfloat16"]),
    }
