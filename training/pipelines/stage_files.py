"""Reading one stage's weights from a model's files: no others are read."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from inference.weights import read_weights
from training.pipelines.cut import StageCut
from training.pipelines.stage_model import held_modules, holders, leave_out, parts_of, require_cut
from training.pipelines.stage_trial import Parts, parts_outside


def read_stage(
    whole: PreTrainedModel,
    directory: Path,
    cut: StageCut,
    may_miss: Collection[str] = (),
    may_have: Callable[[str], bool] = lambda key: False,
    **options: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """`whole` with this stage's weights in place of its own, and which of the weights `may_miss` were made up.

    `whole` may be on the meta device; its buffers are not. The rest as in `read_weights`. A head of scores is read, or
    made up, on every stage: so all of them draw the same random numbers.
    """
    require_cut(whole, cut.layers)
    parts = parts_of(whole)
    prefix = f"{whole.base_model_prefix}."
    names = {name for key in whole.state_dict() for name in (key, key.removeprefix(prefix))}
    stage, made_up = read_weights(
        stage_class(whole, parts, cut),
        directory,
        may_miss=may_miss,
        may_have=lambda key: key in names or may_have(key),
        config=whole.config,
        **options,
    )
    for name, value in (*stage.named_parameters(remove_duplicate=False), *stage.named_buffers(remove_duplicate=False)):
        module, _, leaf = name.rpartition(".")
        setattr(whole.get_submodule(module), leaf, value)
    return whole, made_up


def stage_class(whole: PreTrainedModel, parts: Parts, cut: StageCut) -> type[PreTrainedModel]:
    """The family's class, whose models have one stage's parameters from the start, so that no others are looked for."""
    family: Any = type(whole)
    always = {"score"}
    if cut.is_first or cut.is_last:  # both modules of a tied table, whichever the files know
        of_stages = holders(whole, parts, cut.layers)
        shared = {whole.get_parameter(name) for name, stages in of_stages.items() if len(stages) > 1}
        always |= {name for name, m in parts_outside(whole, parts.stack) if not shared.isdisjoint(m.parameters())}

    def __init__(self: Any, config: Any, *values: Any, **named: Any) -> None:
        family.__init__(self, config, *values, **named)
        kept = {*held_modules(self, parts, cut)}
        kept |= {module for name, module in parts_outside(self, parts.stack) if name in always}
        leave_out(self, parts, kept)
        held = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        tied = self.all_tied_weights_keys.items()
        self.all_tied_weights_keys = {name: other for name, other in tied if {name, other} <= held}

    return type(family.__name__, (family,), {"__init__": __init__, "__module__": family.__module__})
