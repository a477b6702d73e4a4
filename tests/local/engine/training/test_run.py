"""Optimizer semantics, saved folders and exact resume of a training run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.local.engine.training_data import (
    FORMATS,
    make_run,
    random_datum,
    reference_logprobs,
    set_random_b,
)
from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.model.base_model import load_base_model
from tinker_cookbook.local.engine.training.optimizer import AdamState
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.engine.types import AdamSpec, LoraSpec, LossSpec, TrainDatum
from tinker_cookbook.local.errors import UserError

CROSS_ENTROPY = LossSpec("cross_entropy")
ADAM = AdamSpec(learning_rate=1e-2)


def _batch(run: TrainingRun, seed: int, lengths: tuple[int, ...] = (30, 12)) -> list[TrainDatum]:
    rng = np.random.default_rng(seed)
    return [random_datum(rng, n, run.model.vocab_size) for n in lengths]


def _train(run: TrainingRun, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        losses.append(run.forward_backward(_batch(run, seed), CROSS_ENTROPY).metrics["loss:sum"])
        run.optim_step(ADAM)
    return losses


def test_adam_follows_torch_over_several_steps() -> None:
    torch.manual_seed(0)
    ours, reference = torch.randn(50), torch.nn.Parameter(torch.empty(50))
    reference.data.copy_(ours)
    spec = AdamSpec(learning_rate=0.03, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
    optimizer = torch.optim.AdamW(
        [reference], lr=0.03, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2
    )
    state = AdamState(ours)
    for _ in range(5):
        gradient = torch.randn(50)
        reference.grad = gradient.clone()
        optimizer.step()
        state.step(ours, gradient, spec)
        torch.testing.assert_close(ours, reference.data, rtol=1e-5, atol=1e-6)


def test_first_step_is_lr_times_sign_for_any_betas() -> None:
    for beta1, beta2 in ((0.0, 0.0), (0.9, 0.999), (0.5, 0.1)):
        parameters = torch.zeros(4)
        spec = AdamSpec(learning_rate=0.1, beta1=beta1, beta2=beta2, eps=0.0)
        AdamState(parameters).step(parameters, torch.tensor([3.0, -1e-4, 0.0, 7e3]), spec)
        torch.testing.assert_close(parameters, torch.tensor([-0.1, 0.1, 0.0, -0.1]))


def test_gradients_add_up_over_calls_and_a_step_clears_them() -> None:
    run = make_run(tiny_model("llama"))
    first, second = _batch(run, 0), _batch(run, 1)
    run.forward_backward(first, CROSS_ENTROPY)
    run.forward_backward(second, CROSS_ENTROPY)
    added, run.gradient = run.gradient, None
    run.forward_backward(first + second, CROSS_ENTROPY)
    assert added is not None
    assert run.gradient is not None
    assert (added - run.gradient).norm() / added.norm() < 1e-5
    run.optim_step(ADAM)
    assert run.gradient is None


def test_step_without_gradient_and_with_zero_rate_changes_nothing() -> None:
    run = make_run(tiny_model("llama"))
    before = run.adapter.parameters.clone()
    metrics = run.optim_step(ADAM)
    assert metrics["grad_norm"] == 0.0
    assert torch.equal(before, run.adapter.parameters)
    run.forward_backward(_batch(run, 0), CROSS_ENTROPY)
    run.optim_step(AdamSpec(learning_rate=0.0))
    assert torch.equal(before, run.adapter.parameters)


def test_weight_decay_is_decoupled() -> None:
    run = make_run(tiny_model("llama"))
    run.optim_step(AdamSpec(learning_rate=0.5, weight_decay=2.0))
    assert not run.adapter.parameters.any()


def test_training_lowers_the_loss() -> None:
    run = make_run(tiny_model("llama"), LoraSpec(rank=8, seed=0), random_b=False)
    datum = random_datum(np.random.default_rng(0), 40, run.model.vocab_size)
    datum.loss_inputs["weights"] = np.ones(40, np.float32)
    losses = []
    for _ in range(15):
        losses.append(run.forward_backward([datum], CROSS_ENTROPY).metrics["loss:sum"])
        run.optim_step(ADAM)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_resume_with_optimizer_is_bit_identical(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_model("llama")
    whole = make_run(folder, dtype=dtype, random_b=False)
    whole_losses = _train(whole, range(6))
    half = make_run(folder, dtype=dtype, random_b=False)
    losses = _train(half, range(3))
    half.save(tmp_path, base_model_name="tiny", with_optimizer=True)
    base = load_base_model(folder, dtype=dtype)
    resumed = TrainingRun.from_folder(base, tmp_path, with_optimizer=True)
    losses += _train(resumed, range(3, 6))
    assert losses == whole_losses
    assert torch.equal(resumed.adapter.parameters, whole.adapter.parameters)
    assert resumed.adam_state is not None
    assert whole.adam_state is not None
    held, wanted = vars(resumed.adam_state.moments), vars(whole.adam_state.moments)
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[name], wanted[name]) for name in held)
    # Without the optimizer the weights are the same and the next steps are not.
    fresh = TrainingRun.from_folder(base, tmp_path, with_optimizer=False)
    assert _train(fresh, range(3, 6))[0] == whole_losses[3]
    assert not torch.equal(fresh.adapter.parameters, whole.adapter.parameters)


def test_load_into_an_existing_run_drops_its_gradient(tmp_path: Path) -> None:
    folder = tiny_model("llama")
    saved = make_run(folder)
    saved.save(tmp_path, base_model_name="tiny", with_optimizer=True)
    run = make_run(folder, random_b=False)
    run.forward_backward(_batch(run, 0), CROSS_ENTROPY)
    run.load(tmp_path, with_optimizer=False)
    assert run.gradient is None
    assert torch.equal(run.adapter.parameters, saved.adapter.parameters)
    result = run.forward_backward(_batch(run, 0), CROSS_ENTROPY, backward=False)
    wanted = saved.forward_backward(_batch(run, 0), CROSS_ENTROPY, backward=False)
    np.testing.assert_array_equal(result.logprobs[0], wanted.logprobs[0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LoraSpec(rank=8, seed=1), "rank 4 and this run rank 8"),
        (LoraSpec(rank=4, seed=1, train_mlp=False), "trained on other modules"),
    ],
)
def test_load_of_another_shape_is_refused(tmp_path: Path, spec: LoraSpec, message: str) -> None:
    folder = tiny_model("llama")
    make_run(folder).save(tmp_path, base_model_name="tiny", with_optimizer=True)
    run = make_run(folder, spec)
    before = run.adapter.parameters.clone()
    with pytest.raises(UserError, match=message):
        run.load(tmp_path, with_optimizer=False)
    assert torch.equal(before, run.adapter.parameters)


def test_sampler_weights_have_no_optimizer_to_load(tmp_path: Path) -> None:
    folder = tiny_model("llama", tied=False)
    make_run(folder).save(tmp_path, base_model_name="tiny", with_optimizer=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    with pytest.raises(UserError, match="no optimizer state"):
        make_run(folder).load(tmp_path, with_optimizer=True)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = tiny_model("llama")
    run = make_run(folder)
    run.save(tmp_path, base_model_name="tiny", with_optimizer=False)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"adapter_model.safetensors of the checkpoint is not read"):
        run.load(tmp_path, with_optimizer=False)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json is not readable"):
        run.load(tmp_path, with_optimizer=False)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("train_unembed", [False, True])
def test_saved_folder_loads_in_peft_and_gives_the_same_logprobs(
    tmp_path: Path, train_unembed: bool
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tiny_model("qwen3", tied=False)
    run = make_run(folder, LoraSpec(rank=4, seed=1, train_unembed=train_unembed))
    _train(run, range(2))
    run.save(tmp_path, base_model_name=str(folder), with_optimizer=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 32.0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    datum = _batch(run, 9)[0]
    result = run.forward_backward([datum], CROSS_ENTROPY, backward=False)
    with torch.no_grad():
        expected = reference_logprobs(model, datum).numpy()
        merged = reference_logprobs(model.merge_and_unload(), datum).numpy()
    np.testing.assert_allclose(result.logprobs[0], expected, atol=5e-5)
    np.testing.assert_allclose(result.logprobs[0], merged, atol=2e-4)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_runs_of_several_ranks_share_one_base(dtype: torch.dtype) -> None:
    """Each run's results are those it has alone, whatever ran on the base in between."""
    folder = tiny_model("llama")
    specs = [LoraSpec(rank=rank, seed=rank) for rank in (2, 40, 8)]
    alone = [_train(make_run(folder, spec, dtype=dtype), range(3)) for spec in specs]
    base = load_base_model(folder, dtype=dtype)
    runs = [TrainingRun(base, spec) for spec in specs]
    for run in runs:
        set_random_b(run.adapter)
    together: list[list[float]] = [[], [], []]
    for seed in range(3):
        for run, losses in zip(runs, together, strict=True):
            losses += _train(run, range(seed, seed + 1))
    assert together == alone


def test_snapshot_is_not_touched_by_training() -> None:
    run = make_run(tiny_model("llama"))
    snapshot = run.adapter.snapshot()
    before = snapshot.parameters.clone()
    _train(run, range(1))
    assert torch.equal(before, snapshot.parameters)
    assert not torch.equal(before, run.adapter.parameters)
