"""Which number format the engine computes in."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import tiny_model
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.local.engine.model import precision
from tinker_cookbook.local.engine.model.base_model import NativeModel, load_base_model
from tinker_cookbook.local.engine.model.devices import choose_dtype
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.plan import build_plan

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_environment_chooses_where_nobody_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_COOKBOOK_DTYPE", name)
    wanted = getattr(torch, name)
    assert choose_dtype(None, CPU) == wanted
    assert choose_dtype("float32", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    model = load_base_model(tiny_model())
    assert isinstance(model, NativeModel)
    assert model.weights.product_dtype == wanted
    assert build_plan("m", tiny_model(), free_bytes=2**30).dtype == name


@pytest.mark.parametrize("fast", [True, False])
def test_the_processor_chooses_where_the_environment_does_not(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINKER_COOKBOOK_DTYPE")
    monkeypatch.setattr(precision, "_cpu_multiplies_bfloat16", lambda: fast)
    assert choose_dtype(None, CPU) == (torch.bfloat16 if fast else torch.float32)


def test_unknown_formats_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="dtype='half' is unknown; use one of float32, bfloat16"):
        choose_dtype("half", CPU)
    monkeypatch.setenv("TINKER_COOKBOOK_DTYPE", "half")
    with pytest.raises(ConfigurationError, match="TINKER_COOKBOOK_DTYPE='half' is unknown; use"):
        choose_dtype(None, CPU)
