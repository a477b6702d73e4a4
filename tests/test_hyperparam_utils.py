"""Learning rates and parameter counts, against published figures and real tensor shapes."""

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.tiny_models import TINY_ARCHITECTURES, tiny_model
from tinker_cookbook import hyperparam_utils as hp
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.model_info import get_known_model_names


@pytest.mark.parametrize(
    ("model", "expected"),
    [("meta-llama/Llama-3.1-8B-Instruct", 2.86e-4), ("Qwen/Qwen3-8B", 4.73e-4)],
)
def test_learning_rates_are_the_published_ones(model: str, expected: float):
    assert hp.get_lr(model) == pytest.approx(expected, rel=2e-3)
    assert hp.get_lr(model, is_lora=False) == pytest.approx(expected / 10, rel=2e-3)


def test_a_small_model_gets_a_higher_rate():
    expected = 5e-4 * (2000 / 576) ** 0.781
    assert hp.get_lr("HuggingFaceTB/SmolLM2-135M-Instruct") == pytest.approx(expected)
    assert hp.get_lr("Qwen/Qwen3-4B-Instruct-2507") == hp.get_lr("Qwen/Qwen3-4B:variant")


@pytest.mark.parametrize(
    ("model", "hidden", "exponent"),
    [
        ("openai/gpt-oss-20b", 2880, 0.781),
        ("deepseek-ai/DeepSeek-V3.1", 7168, 0.781),
        ("google/gemma-3-1b-it", 1152, 0.0775),  # below 2000 Qwen's fit is the lower one
    ],
)
def test_families_without_a_fit_get_a_start_and_its_reason(
    model: str, hidden: int, exponent: float, caplog: pytest.LogCaptureFixture
):
    rate, reason = hp.get_lr_with_reason(model)
    assert rate == pytest.approx(5e-4 * (2000 / hidden) ** exponent)
    assert f"at hidden size {hidden}" in reason
    assert "no fit is published for" in reason
    assert hp.get_lr(model) == rate
    assert reason in caplog.text


IN_NO_TABLE = ("gemma-4", "DeepSeek-V4", "Nemotron-3-Super", "Nemotron-3-Ultra", "Nemotron-3.5")
"""Models whose dimensions only their own config.json says."""


def test_every_known_model_has_a_rate_and_a_count():
    for name in get_known_model_names():
        if any(part in name for part in IN_NO_TABLE):
            continue
        assert 5e-5 < hp.get_lr(name) < 2e-3, name
        assert hp.get_lora_param_count(name, 1) > 1000, name


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 200,
}
EXPERTS = {"n_routed_experts": 4, "moe_intermediate_size": 24, "n_shared_experts": 1}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
KINDS = {
    "llama": {},
    "smollm3": {"pad_token_id": 0},
    "gemma3_text": {},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR
    | {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "deepseek_v3": LATENT | EXPERTS | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "glm4_moe": EXPERTS | {"first_k_dense_replace": 1},
    "glm4_moe_lite": LATENT | EXPERTS,
    "nemotron_h": EXPERTS
    | {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16}
    | {"moe_shared_expert_intermediate_size": 40},
}
UNTRAINED = ("embed", "wte", "wpe", "norm", "conv1d", "router", "bias", "shared_expert_gate")


def matrices_of(model) -> list[tuple[str, int]]:
    """(part, inputs plus outputs) of every matrix of a model that an adapter trains."""
    found = []
    for name, parameter in model.named_parameters():
        words = name.split(".")
        is_router = "gate" in words
        if parameter.ndim < 2 or is_router or any(word in name for word in UNTRAINED):
            continue
        *stacked, rows, columns = parameter.shape
        # All experts are stacked in one tensor, with gate and up side by side.
        hidden = SMALL["hidden_size"]
        if "gate_up_proj" in name and stacked:
            total = 2 * (hidden + (rows + columns - hidden) // 2)
        else:
            total = rows + columns
        part = "attn" if any("attn" in w or w in ATTENTION for w in words) else "mlp"
        found.append((part, total * math.prod(stacked)))
    return found


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj")


@pytest.mark.parametrize("kind", list(KINDS))
def test_adapters_of_every_kind_are_counted_from_the_shapes(kind: str, tmp_path: Path):
    """Against the parameters of the transformers class, made without memory for them."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](**SMALL | KINDS[kind])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    found = [(part, n) for part, n in matrices_of(model.get_decoder())]
    only = {"train_mlp": False, "train_attn": False, "train_unembed": False}
    for part in ("attn", "mlp"):
        counted = hp.get_lora_param_count(str(tmp_path), 3, **only | {f"train_{part}": True})
        assert counted == 3 * sum(n for kind_of, n in found if kind_of == part), part
    head = hp.get_lora_param_count(str(tmp_path), 3, **only | {"train_unembed": True})
    assert head == 3 * (64 + 200)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft
@pytest.mark.parametrize("kind", ["qwen3_5_text", "gemma3_text", "phi3"])
def test_peft_trains_as_many(kind: str, tmp_path: Path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](**SMALL | KINDS[kind])
    config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        peft = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    trained = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    assert hp.get_lora_param_count(str(tmp_path), 2, train_unembed=False) == trained


# From the published shapes, added up by hand: layers * (q + k + v + o), and so on, with rank 1.
@pytest.mark.parametrize(
    ("model", "attention", "mlp"),
    [
        (
            "Qwen/Qwen3-30B-A3B-Instruct-2507",
            48 * 2 * (2048 + 4096 + 2048 + 512),
            48 * 128 * 3 * (2048 + 768),
        ),
        (
            "Qwen/Qwen3.5-35B-A3B",
            10 * (2048 + 2 * 4096 + 2 * (2048 + 512) + 4096 + 2048)
            + 30 * (2048 + 8192 + 2048 + 4096 + 2 * (2048 + 32) + 4096 + 2048),
            40 * (256 + 1) * 3 * (2048 + 512),
        ),
        (
            "openai/gpt-oss-20b",
            24 * 2 * (2880 + 4096 + 2880 + 512),
            24 * 32 * 3 * (2880 + 2880),
        ),
        (
            "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
            6 * 2 * (2688 + 4096 + 2688 + 256) + 23 * (2688 + 10304 + 4096 + 2688),
            23 * 2 * (128 * (2688 + 1856) + 2688 + 3712),
        ),
        (
            "moonshotai/Kimi-K2.6",
            61 * (7168 + 1536 + 1536 + 12288 + 7168 + 576 + 512 + 16384 + 8192 + 7168),
            3 * (7168 + 18432) + 60 * 385 * 3 * (7168 + 2048),
        ),
    ],
)
def test_adapters_of_known_models(model: str, attention: int, mlp: int):
    count = hp.get_lora_param_count
    assert count(model, 1, train_mlp=False, train_unembed=False) == attention
    assert count(model, 8, train_attn=False, train_unembed=False) == 8 * mlp


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_config_without_a_key_is_told_which(kind: str, tmp_path: Path):
    config = SMALL | KINDS[kind] | {"model_type": kind}
    del config["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    for count in (hp.get_lora_param_count, hp.get_full_finetune_param_count):
        with pytest.raises(ConfigurationError, match=r"num_attention_heads|of type 'qwen3_moe'"):
            count(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"config.json has no num_attention_heads"):
        hp.get_lora_param_count(str(tmp_path))
    assert hp.get_lr(str(tmp_path)) > 0  # needs the hidden size only


def test_an_unknown_model_is_refused(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match="Correct model_name, or set learning_rate"):
        hp.get_lr("someone/Unknown-7B")


def test_a_folder_of_another_architecture_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"of type 'bert'; its matrices are known for"):
        hp.get_lora_param_count(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigurationError, match="none of hidden_size, n_embd"):
        hp.get_lr(str(tmp_path))


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_a_model_folder_are_counted_as_they_are(architecture: str, tied: bool):
    folder = tiny_model(architecture, tied=tied)
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    total = sum(math.prod(shape) for shape in shapes.values())
    assert hp.get_full_finetune_param_count(str(folder)) == total
    assert hp.get_full_finetune_lr_multiplier(str(folder)) == pytest.approx(total**-0.5)
    assert hp.get_lora_lr_multiplier(str(folder)) == pytest.approx(10 * total**-0.5)

    def adapter(*names: str) -> int:
        return sum(sum(shape) for name, shape in shapes.items() if any(n in name for n in names))

    attention = adapter("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
    mlp = adapter("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    head = sum(shapes["model.embed_tokens.weight"])
    only = {"train_mlp": False, "train_attn": False, "train_unembed": False}
    count = hp.get_lora_param_count
    assert count(str(folder), 3) == 3 * (attention + mlp + head)
    assert count(str(folder), 3, **only | {"train_attn": True}) == 3 * attention
    assert count(str(folder), 3, **only | {"train_mlp": True}) == 3 * mlp
    assert count(str(folder), 3, **only | {"train_unembed": True}) == 3 * head
    with pytest.raises(ConfigurationError, match="train at least one"):
        count(str(folder), 3, **only)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-8B", 8_190_735_360),
    ],
)
def test_parameters_of_known_models(model: str, parameters: int):
    """Counts as the models' safetensors headers on the hub give them."""
    assert hp.get_full_finetune_param_count(model) == parameters


def test_the_ratio_is_known_for_alpha_32_only():
    assert hp.get_lora_lr_over_full_finetune_lr("any/model") == 10.0
    with pytest.raises(ConfigurationError, match="lora_alpha=16"):
        hp.get_lora_lr_over_full_finetune_lr("any/model", lora_alpha=16)
