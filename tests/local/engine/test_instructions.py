"""The choice of an instruction set for the compiled kernels."""

from __future__ import annotations

import pytest

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.local.engine.native import instructions
from tinker_cookbook.local.engine.native.instructions import (
    available_sets,
    choose_set,
    compared_sets,
    twin_of,
)

_OLD = frozenset({"avx2", "fma"})
_NEW = _OLD | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}
_ARM = frozenset({"fp", "asimd", "atomics"})
_ARM_BF16 = _ARM | {"bf16"}


@pytest.fixture(params=[_OLD, _NEW], ids=["old", "new"])
def features(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> frozenset[str]:
    _pretend(monkeypatch, "x86_64", request.param)
    return request.param


def _pretend(monkeypatch: pytest.MonkeyPatch, machine: str, features: frozenset[str]) -> None:
    monkeypatch.setattr(instructions, "_processor_features", lambda: features)
    monkeypatch.setattr(instructions.platform, "machine", lambda: machine)
    monkeypatch.delenv("TINKER_COOKBOOK_ISA", raising=False)


def test_the_best_set_of_the_processor_is_chosen(features: frozenset[str]) -> None:
    names = [entry.name for entry in available_sets()]
    assert names == ["generic", "avx2", "avx512", "avx512_bf16"][: 2 if features == _OLD else 4]
    chosen, is_forced = choose_set()
    assert (chosen.name, is_forced) == (names[-1], False)


@pytest.mark.parametrize("allowed", [True, False])
def test_amx_is_chosen_where_the_system_allows_it(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, "x86_64", _NEW | {"amx_tile", "amx_bf16"})
    monkeypatch.setattr(instructions, "_may_use_tiles", lambda: allowed)
    chosen, _ = choose_set()
    assert chosen.name == ("amx" if allowed else "avx512_bf16")
    assert ("-DBLOCKS" in chosen.whole_processor_flags) == allowed


def test_sets_with_the_same_order_of_sums_have_one_twin() -> None:
    names = {entry.name: twin_of(entry).name for entry in compared_sets()}
    assert names["generic"] == "generic"
    assert names["generic_blocks"] == "generic_blocks"
    for name, twin in names.items():
        assert (twin == "generic_blocks") == (name in ("amx", "avx512_blocks", "generic_blocks"))


@pytest.mark.parametrize(
    ("features", "expected"),
    [(_ARM, ["generic", "neon"]), (_ARM_BF16, ["generic", "neon", "neon_bf16"])],
    ids=["old", "new"],
)
def test_the_best_set_of_an_arm_processor_is_chosen(
    features: frozenset[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, "aarch64", features)
    assert [entry.name for entry in available_sets()] == expected
    assert choose_set()[0].name == expected[-1]
    for name in expected:
        monkeypatch.setenv("TINKER_COOKBOOK_ISA", name)
        chosen, is_forced = choose_set()
        assert (chosen.name, is_forced) == (name, True)


def test_a_lower_set_can_be_forced(
    features: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("generic", "avx2", "generic_blocks"):
        monkeypatch.setenv("TINKER_COOKBOOK_ISA", name)
        chosen, is_forced = choose_set()
        assert (chosen.name, is_forced) == (name, True)


@pytest.mark.parametrize("features", [_OLD], indirect=True, ids=["old"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "sse9",
            "ISA='sse9' is unknown; this processor has: generic, avx2, generic_blocks",
        ),
        ("avx512", "TINKER_COOKBOOK_ISA='avx512' needs instructions that this processor lacks"),
        ("neon", "TINKER_COOKBOOK_ISA='neon' needs instructions that this processor lacks"),
        ("neon_bf16", "TINKER_COOKBOOK_ISA='neon_bf16' needs instructions that this processor"),
    ],
)
@pytest.mark.usefixtures("features")
def test_other_sets_are_refused_by_name(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_COOKBOOK_ISA", name)
    with pytest.raises(ConfigurationError, match=message):
        choose_set()
