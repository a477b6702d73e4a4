"""Adam's moments in 24 bits: the format, the kernel and its twins, and saved states."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.local.engine.training_data import FORMATS, make_run, random_datum
from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.native.adam import AdamFactors, AdamKernel
from tinker_cookbook.local.engine.native.build import load_kernels_for
from tinker_cookbook.local.engine.native.instructions import available_sets
from tinker_cookbook.local.engine.training.moments import (
    FullMoments,
    ShortMoments,
    lengthen,
    moments_of,
    shorten_into,
)
from tinker_cookbook.local.engine.training.optimizer import AdamState
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.engine.types import AdamSpec, LoraSpec, LossSpec
from tinker_cookbook.local.errors import UserError

FACTORS = AdamFactors(0.1, 0.999, 0.001, 1.7, 1e-8, 0.999, -1e-3)
SIZES = [1, 16, 37, 100_003]
"""Less than a vector, whole vectors, a vector and a rest, several blocks of the kernel."""


def shortened(values: torch.Tensor) -> torch.Tensor:
    """Return float32 numbers rounded to 24 bits."""
    upper = torch.empty(len(values), dtype=torch.int16)
    lower = torch.empty(len(values), dtype=torch.uint8)
    shorten_into(upper, lower, values)
    return lengthen(upper, lower)


def random_bits(count: int, seed: int) -> torch.Tensor:
    """Return finite float32 numbers of all sizes, with denormals and zeros of both signs."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, count, dtype=np.uint32)
    bits[: count // 8] &= 0x807FFFFF  # denormals
    bits[:2] = 0, 0x80000000
    # The largest numbers would be rounded to infinity, as in other formats.
    bits[(bits & 0x7F800000) == 0x7F800000] &= 0xBFFFFFFF
    return torch.from_numpy(bits.view(np.float32))


def expected_rounding(values: torch.Tensor) -> torch.Tensor:
    """Round with exact arithmetic: to a multiple of the value of bit 8 in float64, ties to even."""
    exact = values.double().numpy()
    exponent = np.maximum(np.frexp(exact)[1], -125)  # denormals have the unit of 2^-126
    unit = np.ldexp(1.0, exponent - 16)
    return torch.from_numpy((np.round(exact / unit) * unit).astype(np.float32))


def kernel(number: int) -> AdamKernel:
    library = load_kernels_for(available_sets()[number], ("adam.c",))
    if library is None:
        pytest.skip("no C compiler here")
    return AdamKernel(library)


@functools.cache
def operands(size: int) -> tuple[torch.Tensor, torch.Tensor, ShortMoments]:
    """Return parameters, a gradient of numbers of very different sizes, and moments."""
    generator = torch.Generator().manual_seed(size)

    def draw() -> torch.Tensor:
        sizes = torch.logspace(-22, 8, size)[torch.randperm(size, generator=generator)]
        return torch.randn(size, generator=generator) * sizes

    values = torch.randn(size, generator=generator)
    moments = ShortMoments.zeros_like(values)
    moments.assign("exp_avg", draw())
    moments.assign("exp_avg_sq", draw().square().clamp(max=1e30))
    return values, draw(), moments


def step(size: int, by: AdamKernel | None) -> list[torch.Tensor]:
    """Return parameters and moments after one step; without a kernel by torch."""
    values, gradient, moments = operands(size)
    parts = [part.clone() for part in vars(moments).values()]
    values = values.clone()
    if by is None:
        ShortMoments(*parts).update_by_torch(values, gradient, FACTORS)
    else:
        mean, square = (parts[0], parts[1]), (parts[2], parts[3])
        by.step(values, gradient, mean, square, FACTORS)
    return [values, *parts]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_rounded_to_nearest(seed: int) -> None:
    values = random_bits(20_000, seed)
    rounded = shortened(values)
    np.testing.assert_array_equal(rounded.numpy(), expected_rounding(values).numpy())
    assert torch.equal(rounded.signbit(), values.signbit())
    normal = values.abs() >= 2.0**-126
    error = (rounded.double() / values.double() - 1).abs()[normal]
    assert error.max() <= 2.0**-16


def test_numbers_of_24_bits_come_back_unchanged() -> None:
    values = (random_bits(20_000, 9).view(torch.int32) & ~0xFF).view(torch.float32)
    assert torch.equal(shortened(values).view(torch.int32), values.view(torch.int32))


def test_ties_go_to_the_even_neighbour() -> None:
    even = torch.tensor([0x3F800000, 0x40490E00, 0x00000200], dtype=torch.int32)
    neighbours = torch.cat([even, even + 0x100])
    ties = (neighbours + 0x80).view(torch.float32)
    nearest = torch.cat([even, even + 0x200]).view(torch.float32)
    for sign in (1, -1):
        assert torch.equal(shortened(sign * ties), sign * nearest)
        above = (neighbours + 0x81).view(torch.float32)
        assert torch.equal(shortened(sign * above), sign * (neighbours + 0x100).view(torch.float32))


@pytest.mark.parametrize("size", SIZES)
def test_instruction_sets_give_the_same_bits(size: int) -> None:
    twin, *others = (step(size, kernel(number)) for number in range(len(available_sets())))
    for results in others:
        assert all(torch.equal(a, b) for a, b in zip(results, twin, strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_computes_what_torch_does(size: int) -> None:
    values, *parts = step(size, kernel(-1))
    wanted, *wanted_parts = step(size, None)
    assert all(torch.equal(a, b) for a, b in zip(parts, wanted_parts, strict=True))
    # Torch's square root may differ in the last bit.
    torch.testing.assert_close(values, wanted, rtol=3e-7, atol=1e-6)


def test_threads_do_not_change_the_bits(two_threads: None) -> None:
    together = step(100_003, kernel(-1))
    torch.set_num_threads(1)
    alone = step(100_003, kernel(-1))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    "spec",
    [
        AdamSpec(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-12),
        AdamSpec(learning_rate=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1),
        AdamSpec(learning_rate=1e-2, beta1=0.8, beta2=0.999, eps=1e-8, grad_clip_norm=5.0),
    ],
    ids=["default", "weight decay", "clipping"],
)
def test_fifty_steps_follow_torch(spec: AdamSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(1000, generator=generator)
    reference = torch.nn.Parameter(ours.clone())
    optimizer = torch.optim.AdamW(
        [reference],
        lr=spec.learning_rate,
        betas=(spec.beta1, spec.beta2),
        eps=spec.eps,
        weight_decay=spec.weight_decay,
    )
    state, start = AdamState(ours, short=True), ours.clone()
    direction = torch.randn(1000, generator=generator)
    for _ in range(50):
        gradient = direction + torch.randn(1000, generator=generator)
        reference.grad = gradient.clone()
        if spec.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_([reference], spec.grad_clip_norm)
        optimizer.step()
        state.step(ours, gradient, spec)
    moved = reference.detach() - start
    assert (ours - reference.detach()).norm() < 1e-4 * moved.norm()
    saved = optimizer.state[reference]
    for name, moment in state.moments.float32().items():
        assert (moment - saved[name]).norm() < 1e-4 * saved[name].norm(), name


def test_a_slow_average_reaches_its_target() -> None:
    """With beta2=0.999 a step changes the average by little more than rounding does."""
    values, gradient = torch.zeros(100), torch.linspace(0.5, 2, 100)
    state = AdamState(values, short=True)
    for _ in range(10_000):
        state.step(values, gradient, AdamSpec(learning_rate=0.0, beta2=0.999))
    found = state.moments.float32()["exp_avg_sq"]
    assert ((found / gradient.square()) - 1).abs().max() < 0.02


@pytest.mark.parametrize("kind", [FullMoments, ShortMoments])
def test_moments_are_made_again_of_their_tensors(
    kind: type[FullMoments] | type[ShortMoments],
) -> None:
    moments = kind.zeros_like(torch.zeros(5))
    moments.assign("exp_avg_sq", torch.arange(5.0))
    found = moments_of({"parameters": torch.zeros(5), **vars(moments)})
    assert isinstance(found, kind)
    assert found.float32()["exp_avg_sq"].tolist() == [0, 1, 2, 3, 4]
    assert moments_of({"parameters": torch.zeros(5)}) is None


def trained(dtype: torch.dtype) -> TrainingRun:
    """Return a run after two steps."""
    run = make_run(tiny_model("llama"), LoraSpec(rank=4, seed=1), dtype=dtype)
    for seed in range(2):
        _train(run, seed)
    return run


def _train(run: TrainingRun, seed: int) -> float:
    data = [random_datum(np.random.default_rng(seed), 20, run.model.vocab_size)]
    loss = run.forward_backward(data, LossSpec("cross_entropy")).metrics["loss:sum"]
    run.optim_step(AdamSpec(learning_rate=1e-2))
    return loss


@pytest.mark.parametrize("saved_in", FORMATS, ids=str)
@pytest.mark.parametrize("loaded_in", FORMATS, ids=str)
def test_a_checkpoint_of_either_format_loads_in_both(
    tmp_path: Path, saved_in: torch.dtype, loaded_in: torch.dtype
) -> None:
    run = trained(saved_in)
    run.save(tmp_path, base_model_name="tiny", with_optimizer=True)
    file = load_file(tmp_path / "optimizer.safetensors")
    assert all(moment.dtype == torch.float32 for name, moment in file.items() if "exp" in name)
    other = make_run(tiny_model("llama"), LoraSpec(rank=4, seed=2), dtype=loaded_in)
    other.load(tmp_path, with_optimizer=True)
    assert run.adam_state is not None
    assert other.adam_state is not None
    assert other.adam_state.num_steps == 2
    for name, moment in other.adam_state.moments.float32().items():
        saved = run.adam_state.moments.float32()[name]
        assert torch.equal(moment, saved if loaded_in == torch.float32 else shortened(saved))
    assert math.isfinite(_train(other, 5))


def test_a_checkpoint_without_a_moment_is_refused(tmp_path: Path) -> None:
    run = trained(torch.bfloat16)
    run.save(tmp_path, base_model_name="tiny", with_optimizer=True)
    file = tmp_path / "optimizer.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("exp_avg_sq."))
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"optimizer state lacks {name}"):
        run.load(tmp_path, with_optimizer=True)
