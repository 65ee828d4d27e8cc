"""What is refused before anything trains."""

import json

import pytest
from transformers import AutoConfig, BloomConfig, CodeGenConfig, GPT2Config, LlamaConfig, OPTConfig

from inference.errors import UserError
from inference.families import longest_text
from training.checks import require_actor_learns, require_adapters, require_layouts, require_plan, require_positions
from training.config_files import load_config
from training.rlhf_settings import RLHFSettings

SMALL = {"vocab_size": 96, "num_attention_heads": 4}
OPT = OPTConfig(**SMALL, hidden_size=32, num_hidden_layers=2, ffn_dim=64, word_embed_proj_dim=32)
CODEGEN = CodeGenConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
GPT2 = GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=512)
LLAMA = LlamaConfig(**SMALL, hidden_size=32, num_hidden_layers=1, intermediate_size=64, max_position_embeddings=512)


def check(directory, model, processes: int, tensor: int, setting: str = "generation_tensor_parallel") -> None:
    model.save_pretrained(directory)
    settings = ["model=any", f"rlhf.{setting}={tensor}"]
    require_layouts(load_config([], settings), processes, directory, directory)


def test_degrees_that_fit_pass(tmp_path):
    for processes, tensor in ((1, 1), (2, 2), (4, 2), (4, 4)):
        check(tmp_path, OPT, processes, tensor)


@pytest.mark.parametrize(
    ("model", "processes", "tensor", "expected"),
    [
        (OPT, 3, 2, "degree of 2 does not divide 3 processes: take a degree of 1 or 3, or --processes 4"),
        (OPT, 1, 2, "degree of 2 does not divide 1 process: take a degree of 1, or --processes 2"),
        (OPT, 3, 3, "cannot be cut into 3"),
        (CODEGEN, 2, 2, "Models of type 'codegen' cannot be cut over ranks"),
    ],
)
def test_degrees_that_do_not_are_a_sentence(tmp_path, model, processes, tensor, expected):
    with pytest.raises(UserError, match=expected):
        check(tmp_path, model, processes, tensor)


@pytest.mark.parametrize("role", ["reference", "reward", "critic"])
def test_degrees_of_scoring_are_checked_too(tmp_path, role):
    check(tmp_path, OPT, 2, 2, f"scoring_tensor_parallel.{role}")
    setting = rf"^rlhf\.scoring_tensor_parallel\.{role}=3: "
    with pytest.raises(UserError, match=f"{setting}.*cannot be cut into 3"):
        check(tmp_path, OPT, 3, 3, f"scoring_tensor_parallel.{role}")
    with pytest.raises(UserError, match=f"{setting}.*does not divide 2 processes"):
        check(tmp_path, OPT, 2, 3, f"scoring_tensor_parallel.{role}")
    with pytest.raises(UserError, match=f"{setting[:-3]}2: .*'codegen' cannot be cut"):
        check(tmp_path, CODEGEN, 2, 2, f"scoring_tensor_parallel.{role}")


def test_a_warm_up_of_the_critic_leaves_the_actor_some_iterations():
    settings = RLHFSettings(iterations=5, critic_warmup=4)
    require_actor_learns(settings)
    for warmup in (5, 6):
        with pytest.raises(UserError, match=rf"critic_warmup={warmup} leaves none of rlhf.iterations=5"):
            require_actor_learns(settings.model_copy(update={"critic_warmup": warmup}))


@pytest.mark.parametrize("model", [OPTConfig(**SMALL, hidden_size=32, max_position_embeddings=512), GPT2, LLAMA])
def test_prompt_and_response_must_have_room_in_the_positions(tmp_path, model):
    model.save_pretrained(tmp_path)
    config = load_config([], ["model=any", "data.max_prompt_tokens=256", "data.max_response_tokens=256"])
    require_positions("mine", tmp_path, config.data)
    config.data.max_response_tokens = 257
    sentence = "are 513 tokens together, and mine has 512 positions: lower them, for example to 256 and 256"
    with pytest.raises(UserError, match=sentence):
        require_positions("mine", tmp_path, config.data)


def test_positions_without_a_bound_and_stretched_ones(tmp_path):
    assert longest_text(BloomConfig(vocab_size=96, hidden_size=32, n_head=4)) == 0
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
    assert longest_text(LlamaConfig(max_position_embeddings=512, rope_parameters=rope)) == 2048
    assert longest_text(LlamaConfig(max_position_embeddings=2048, rope_parameters=rope)) == 2048
    assert longest_text(AutoConfig.for_model("llama4", text_config={"attention_chunk_size": 96})) == 96  # nested
    assert longest_text(AutoConfig.for_model("doge", keep_window_size=64)) == 64


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "sft.optimizer.lora.targets=[q_proj, key]",
            r"sft\.optimizer\.lora\.targets=.* has no layer key: choose from ",
        ),
        ("rlhf.actor.lora.targets=q_prj", "fc1, fc2, k_proj, out_proj, q_proj, v_proj, or all-linear"),
        ("rlhf.actor.lora.targets='*.q_proj'", "is no regular expression .*; give a list of module names"),
        ("reward.optimizer.lora.targets=[q_proj]", r"reward\.optimizer\.lora\.targets=.*: choose from c_attn, c_fc, "),
        ("rlhf.critic.lora.targets=[q_proj]", r"rlhf\.critic\.lora\.targets=.* c_proj, or all-linear"),
    ],
)
def test_lora_targets_must_each_name_a_layer_of_their_role(tmp_path, override, expected):
    OPT.save_pretrained(tmp_path / "actor")
    GPT2.save_pretrained(tmp_path / "scorer")
    role = override.partition(".lora")[0]
    with pytest.raises(UserError, match=expected):
        require_adapters(adapted(role, override), tmp_path / "actor", tmp_path / "scorer")


def test_lora_targets_that_fit(tmp_path):
    OPT.save_pretrained(tmp_path)
    for targets in ("all-linear", "[q_proj, fc1]", "[layers.0.self_attn.q_proj]", r"'.*\.(q|v)_proj'"):
        require_adapters(adapted("sft.optimizer", f"sft.optimizer.lora.targets={targets}"), tmp_path, tmp_path)
    dpo = ["method=dpo", "rlhf.actor.lora.targets=[nothing]"]  # of a step that this method has not
    require_adapters(adapted("rlhf.actor", *dpo), tmp_path, None)


CALLS = ("actor_generate", "reference_score", "reward_score", "critic_score", "actor_train", "critic_train")


def planned(*overrides: str, **calls: dict):
    """On two ranks; calls that are not given run on the first one."""
    plan = {name: {"mesh": 0} for name in CALLS} | calls
    return load_config([], ["model=any", "dtype=fp32", f"rlhf.plan={json.dumps(plan)}", *overrides])


def test_both_doors_judge_a_plan_by_the_layers_that_a_scorer_keeps(tmp_path):
    """Its base checkpoint has six, of which two stay."""
    from applications.fit import Outlook
    from training.steps import PPO

    OPTConfig(**OPT.to_diff_dict() | {"num_hidden_layers": 6}).save_pretrained(tmp_path)

    def judge(layers: list[int]) -> None:
        cut = {"mesh": "0-1", "pipeline": 2, "layers": layers}
        config = planned(f"model={tmp_path}", "reward.layers=2", "processes=2", reward_score=cut, critic_train=cut)
        for door in (lambda: require_plan(config, 2, tmp_path, tmp_path), lambda: Outlook.of(config, [PPO])):
            try:
                door()
                found.append("")
            except UserError as error:
                found.append(str(error))

    found: list[str] = []
    judge([1, 1])
    assert found == ["", ""]
    judge([3, 3])
    assert found[2] == found[3] and "[3, 3] layers, 6 together, of a model of 2" in found[2]


@pytest.mark.parametrize(
    ("role", "targets", "idle"),
    [("actor", "[layers.0.fc1]", 2), ("actor", "[layers.1.fc1]", 1), ("actor", "[fc1]", 0), ("critic", "[0.fc1]", 0)],
)
def test_adapters_must_leave_no_stage_without_any(tmp_path, role, targets, idle):
    """The last stage of a critic has its head, which is trained too."""
    OPT.save_pretrained(tmp_path)
    lora = [f"rlhf.{role}.lora.rank=2", f"rlhf.{role}.lora.targets={targets}"]
    config = planned(*lora, **{f"{role}_train": {"mesh": "0-1", "pipeline": 2}})
    if not idle:
        require_plan(config, 2, tmp_path, tmp_path)
        return
    with pytest.raises(UserError, match=rf"rlhf\.{role}\.lora\.targets=.* names no layer of stage {idle} of the 2"):
        require_plan(config, 2, tmp_path, tmp_path)


def adapted(role: str, *overrides: str):
    return load_config([], ["model=any", f"{role}.lora.rank=4", *overrides])


def test_every_preset_has_room_for_its_lengths():
    from applications.preset_store import load_preset, preset_names

    for name in preset_names():
        preset = load_preset(name)
        config = load_config([], [], preset)
        for values in config.architecture.values():
            has = values.get("max_position_embeddings") or values.get("n_positions") or 10**9
            assert config.data.max_prompt_tokens + config.data.max_response_tokens <= has, json.dumps(values)
