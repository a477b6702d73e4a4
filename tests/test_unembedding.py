"""What a run adapts on models whose output embedding is the input embedding."""

from __future__ import annotations

import logging

import pytest

from tests.tiny_models import tiny_model
from tinker_cookbook.hyperparam_utils import get_lora_param_count
from tinker_cookbook.unembedding import choose_train_unembed, has_tied_embeddings


def test_the_output_embedding_is_left_out_where_it_is_the_input_embedding() -> None:
    assert has_tied_embeddings("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert has_tied_embeddings("Qwen/Qwen3-8B") is False
    assert has_tied_embeddings(str(tiny_model("llama", tied=True)))
    assert has_tied_embeddings(str(tiny_model("llama", tied=False))) is False
    assert [choose_train_unembed(str(tiny_model(tied=tied))) for tied in (True, False)] == [
        False,
        True,
    ]


def test_an_unknown_model_is_trained_as_services_do_unasked(tmp_path) -> None:
    assert has_tied_embeddings(str(tmp_path)) is None
    assert choose_train_unembed(str(tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_who_asks_for_it_gets_it_and_is_warned(
    tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    name = str(tiny_model(tied=tied))
    with caplog.at_level(logging.WARNING, logger="tinker_cookbook.unembedding"):
        assert choose_train_unembed(name, True)
        assert not choose_train_unembed(name, False)
    assert ["input embedding" in message for message in caplog.messages] == [True] * tied


def test_parameter_count_follows_the_choice() -> None:
    name = str(tiny_model(tied=True))
    whole, chosen = (
        get_lora_param_count(name, 4, train_unembed=flag)
        for flag in (True, choose_train_unembed(name))
    )
    from tinker_cookbook.local.engine.model.base_model import load_base_model
    from tinker_cookbook.local.engine.types import LoraSpec

    base = load_base_model(tiny_model(tied=True))
    for count, unembed in ((whole, True), (chosen, False)):
        targets = base.lora_targets(LoraSpec(rank=4, train_unembed=unembed))
        assert count == 4 * sum(t.in_features + t.out_features for t in targets)
