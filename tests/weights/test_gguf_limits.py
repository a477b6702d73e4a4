"""Models that llama.cpp computes in another way are refused or reported before the export."""

import json
import logging
from pathlib import Path

import pytest

from tests.foreign_models import foreign_model
from tinker_cookbook.exceptions import WeightsMergeError
from tinker_cookbook.weights import build_gguf, build_gguf_adapter
from tinker_cookbook.weights.gguf_limits import check_llama_cpp_computes

FOLDER = Path("models/mine")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "qwen3_moe"}, "norm_topk_prob=false.*always scales"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, "norm_topk_prob=false.*--as merged"),
        ({"model_type": "olmoe", "norm_topk_prob": True}, "norm_topk_prob=true.*never scales"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act=gelu.*always uses silu"),
    ],
)
def test_a_silent_difference_is_refused(config: dict, problem: str):
    with pytest.raises(WeightsMergeError, match=rf"mine/config.json: {problem}"):
        check_llama_cpp_computes(FOLDER, config)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3_moe", "norm_topk_prob": True},
        {"model_type": "qwen2_moe"},
        {"model_type": "mixtral", "sliding_window": None},
        {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False},
        {"model_type": "gemma3_text", "hidden_act": "gelu", "sliding_window": 8},
    ],
)
def test_other_models_pass_without_a_word(config: dict, caplog: pytest.LogCaptureFixture):
    check_llama_cpp_computes(FOLDER, config)
    assert not caplog.records


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sliding_window": 8}, "sliding_window=8 is not applied by llama.cpp for mistral"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type=dynamic is not applied"),
    ],
)
def test_what_changes_only_long_sequences_is_reported(
    fields: dict, words: str, caplog: pytest.LogCaptureFixture
):
    config = {"model_type": "mistral", "max_position_embeddings": 64, **fields}
    with caplog.at_level(logging.WARNING):
        check_llama_cpp_computes(FOLDER, config)
    assert words in caplog.text


@pytest.mark.parametrize("export", [build_gguf, build_gguf_adapter])
def test_the_export_asks_first_and_writes_nothing(export, tmp_path: Path):
    folder = foreign_model("qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    assert not config.get("norm_topk_prob"), "the default of the architecture"
    with pytest.raises(WeightsMergeError, match="norm_topk_prob=false"):
        export(
            base_model=str(folder),
            adapter_path=str(tmp_path / "adapter"),
            output_path=str(tmp_path / "out"),
            quantisation="f32",
        )
    assert not (tmp_path / "out").exists()
