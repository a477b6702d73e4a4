"""What optim_step does with the gradients that calls left (OPT)."""

# pyright: reportArgumentType=false

import numpy as np
import pytest
import tinker

from tests.e2e.sdk import batch, datum, forward, tensor, text, tokens, train_step
from tests.number_format import by_format


def adam(**options: float) -> tinker.AdamParams:
    return tinker.AdamParams(**({"learning_rate": 1e-3} | options))


def after(run: tinker.TrainingClient) -> np.ndarray:
    """A fingerprint of the weights."""
    return np.concatenate(forward(run, batch(3, seed=7)))


def scaled(data: list[tinker.Datum], factor: float) -> list[tinker.Datum]:
    return [
        tinker.Datum(
            model_input=item.model_input,
            loss_fn_inputs=item.loss_fn_inputs
            | {"weights": tensor(item.loss_fn_inputs["weights"].to_numpy() * factor, np.float32)},
        )
        for item in data
    ]


def test_opt_01_loss_falls(new_run) -> None:
    run = new_run()
    losses = [
        train_step(run, batch(), adam(learning_rate=1e-2)).metrics["loss:sum"] for _ in range(8)
    ]
    assert losses[-1] < 0.7 * losses[0]


def test_opt_02_two_calls_add_up_to_one(new_run) -> None:
    data = batch(4)
    one, two = new_run(), new_run()
    one.forward_backward(data, "cross_entropy").result()
    two.forward_backward(data[:2], "cross_entropy").result()
    two.forward_backward(data[2:], "cross_entropy").result()
    for run in (one, two):
        run.optim_step(adam()).result()
    np.testing.assert_allclose(after(one), after(two), atol=by_format(float32=2e-4, bfloat16=0.03))


def first_step(new_run, data: list[tinker.Datum], params: tinker.AdamParams) -> np.ndarray:
    """Change of the fingerprint in one step; the first Adam step hides the gradient's scale."""
    run = new_run()
    before = after(run)
    run.forward_backward(data, "cross_entropy").result()
    run.optim_step(params).result()
    return after(run) - before


def test_opt_03_gradients_are_sums_not_means(new_run) -> None:
    # A large eps makes the step proportional to the gradient.
    params = adam(eps=1e6, learning_rate=3.0)
    item = batch(1)
    once = first_step(new_run, item, params)
    thrice = first_step(new_run, item * 3, params)
    np.testing.assert_allclose(
        thrice, 3 * once, atol=by_format(float32=0.03, bfloat16=0.15) * np.abs(thrice).max()
    )


def test_opt_04_a_step_clears_the_gradients(new_run) -> None:
    run = new_run()
    train_step(run, batch(), adam(beta1=0.0, beta2=0.0))
    once = after(run)
    run.optim_step(adam(beta1=0.0, beta2=0.0)).result()
    np.testing.assert_array_equal(after(run), once)


def test_opt_05_forward_leaves_no_gradient(new_run) -> None:
    run = new_run()
    before = after(run)
    run.forward(batch(), "cross_entropy").result()
    run.optim_step(adam()).result()
    np.testing.assert_array_equal(after(run), before)


def test_opt_06_and_07_weights_scale_and_turn_gradients(new_run) -> None:
    params = adam(eps=1e6, learning_rate=3.0)
    plain = first_step(new_run, batch(2), params)
    limit = by_format(float32=0.03, bfloat16=0.15) * np.abs(plain).max()
    doubled = first_step(new_run, scaled(batch(2), 2.0), params)
    np.testing.assert_allclose(doubled, 2 * plain, atol=2 * limit)
    turned = first_step(new_run, scaled(batch(2), -1.0), params)
    np.testing.assert_allclose(turned, -plain, atol=limit)


def test_opt_08_learning_rate_0_changes_nothing(new_run) -> None:
    run = new_run()
    before = after(run)
    train_step(run, batch(), adam(learning_rate=0.0))
    np.testing.assert_array_equal(after(run), before)


def test_opt_09_first_step_is_proportional_to_the_learning_rate(new_run) -> None:
    small = first_step(new_run, batch(), adam(learning_rate=1e-4))
    double = first_step(new_run, batch(), adam(learning_rate=2e-4))
    # B starts at 0, so the change is linear in B up to terms of second order
    assert np.abs(double - 2 * small).max() < 0.1 * np.abs(double).max()


def test_opt_10_first_step_ignores_the_gradients_scale(new_run) -> None:
    small = first_step(new_run, batch(), adam())
    large = first_step(new_run, scaled(batch(), 100.0), adam())
    share = by_format(float32=0.02, bfloat16=0.25)  # rounded gradients near 0 change sides
    np.testing.assert_allclose(small, large, atol=share * np.abs(small).max())


def test_opt_11_decoupled_decay(new_run) -> None:
    fresh = after(new_run())
    run = new_run()
    train_step(run, batch(), adam(learning_rate=1e-2))
    assert np.abs(after(run) - fresh).max() > 1e-3
    # lr x decay = 1 removes the weights; without gradient and momentum nothing else moves
    run.optim_step(adam(learning_rate=1.0, weight_decay=1.0, beta1=0.0, beta2=0.0)).result()
    np.testing.assert_allclose(after(run), fresh, atol=1e-4)


def test_opt_12_gradient_clipping(new_run) -> None:
    params = {"eps": 1e6, "learning_rate": 3.0}
    free = first_step(new_run, batch(), adam(**params))
    clipped = first_step(new_run, batch(), adam(**params, grad_clip_norm=1e-3))
    loose = first_step(new_run, batch(), adam(**params, grad_clip_norm=1e9))
    np.testing.assert_allclose(loose, free, atol=1e-6)
    assert np.abs(clipped).max() < 0.1 * np.abs(free).max()


def test_opt_13_momentum_persists(new_run) -> None:
    run = new_run()
    train_step(run, batch())
    before = after(run)
    run.optim_step(adam()).result()
    assert np.abs(after(run) - before).max() > 1e-5


def test_opt_14_and_15_a_step_without_gradients_is_safe(new_run) -> None:
    run = new_run()
    before = after(run)
    metrics = run.optim_step(adam()).result().metrics
    assert metrics is None or all(isinstance(value, float) for value in metrics.values())
    np.testing.assert_array_equal(after(run), before)


def test_opt_16_keyword_alias(new_run) -> None:
    run = new_run()
    run.forward_backward(batch(), "cross_entropy").result()
    run.optim_step(adam_params=adam()).result()


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.95), (0.5, 0.999)])
def test_opt_17_bias_correction(new_run, betas: tuple[float, float]) -> None:
    reference = first_step(new_run, batch(), adam())
    step = first_step(new_run, batch(), adam(beta1=betas[0], beta2=betas[1]))
    np.testing.assert_allclose(step, reference, atol=0.01 * np.abs(reference).max())


def test_zero_weights_train_nothing(new_run) -> None:
    run = new_run()
    before = after(run)
    train_step(run, [datum(tokens(8), np.zeros(7))], adam())
    np.testing.assert_array_equal(after(run), before)


def test_one_token_is_a_datum(new_run) -> None:
    run = new_run()
    item = tinker.Datum(
        model_input=text([5]),
        loss_fn_inputs={
            "target_tokens": tensor([6], np.int64),
            "weights": tensor([1.0], np.float32),
        },
    )
    assert forward(run, [item])[0].shape == (1,)
    train_step(run, [item])
