"""docs/adding_a_loss.md: its code runs against the local service, and its three losses are one."""

# pyright: reportArgumentType=false

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ServiceProcess
from tests.local.engine.training_data import make_run
from tests.number_format import TRAINED_SHARE, by_format
from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.training import losses
from tinker_cookbook.local.engine.types import LoraSpec, LossSpec, TrainDatum
from tinker_cookbook.local.errors import UserError

PAGE = (Path(__file__).parents[2] / "docs/adding_a_loss.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run_block(number: int, names: dict[str, Any]) -> None:
    exec(compile(BLOCKS[number], f"docs/adding_a_loss.md, block {number}", "exec"), names)


@pytest.fixture
def in_engine() -> Iterator[dict[str, Any]]:
    """The names of the page's last block, whose loss is in the engine meanwhile."""
    names: dict[str, Any] = {}
    run_block(3, names)
    yield names
    del losses.LOSSES["unlikelihood"]


def test_both_losses_of_a_program_agree(local_service: ServiceProcess) -> None:
    service_client = local_service.connect()
    training_client = service_client.create_lora_training_client(
        base_model=local_service.model, rank=4, seed=0
    ).result()
    names = {"training_client": training_client, "service_client": service_client}
    for number in range(3):
        run_block(number, names)
    own, uploaded = names["result"], names["uploaded"]
    share = by_format(float32=1e-5, bfloat16=TRAINED_SHARE)
    assert uploaded.metrics["loss:sum"] == pytest.approx(own.metrics["unlikelihood:sum"], rel=share)
    assert uploaded.metrics["custom/unlikelihood:sum"] == pytest.approx(
        uploaded.metrics["loss:sum"]
    )
    service_client.close("success").result()


def _datum(wanted: list[int]) -> TrainDatum:
    tokens = np.arange(30, 31 + len(wanted))
    inputs = {
        "target_tokens": tokens[1:].astype(np.int64),
        "weights": np.linspace(0.0, 1.0, len(wanted), dtype=np.float32),
        "wanted": np.array(wanted, np.int64),
    }
    return TrainDatum(tokens[:-1].astype(np.int32), dict(inputs))


def test_the_engine_computes_the_loss_of_the_program(in_engine: dict[str, Any]) -> None:
    client: dict[str, Any] = {}
    run_block(0, client)
    run = make_run(tiny_model("llama"), LoraSpec(rank=4, seed=1))
    data = [_datum([1, 0, 1, 1, 0]), _datum([0, 1])]
    result = run.forward_backward(data, LossSpec("unlikelihood"))
    expected = 0.0
    for datum, logprobs in zip(data, result.logprobs, strict=True):
        arrays = (logprobs, datum.loss_inputs["weights"], datum.loss_inputs["wanted"])
        expected += float(client["token_losses"](*map(torch.tensor, arrays)).sum())
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    assert run.gradient is not None
    assert float(run.gradient.norm()) > 0


def test_the_record_alone_makes_the_checks(in_engine: dict[str, Any]) -> None:
    run = make_run(tiny_model("llama"), LoraSpec(rank=4, seed=1))
    good = _datum([1, 0])
    without = TrainDatum(good.tokens, {k: v for k, v in good.loss_inputs.items() if k != "wanted"})
    floats = TrainDatum(good.tokens, {**good.loss_inputs, "wanted": np.ones(2, np.float32)})
    for datum, config, message in (
        (without, {}, "lacks 'wanted'; unlikelihood needs target_tokens, weights, wanted"),
        (floats, {}, "wanted has dtype float32; int64 is expected"),
        (good, {"margin": 0.9}, "margin=0.9 is not usable; it must be a number from 1e-06 to 0.5"),
    ):
        with pytest.raises(UserError, match=message):
            run.forward_backward([datum], LossSpec("unlikelihood", config))
