"""Bad input is refused promptly, by name, and harms nothing (ERR)."""

# pyright: reportArgumentType=false

import numpy as np
import pytest
import tinker
from tinker import types

from tests.e2e.sdk import (
    batch,
    datum,
    fails_as_user_error,
    fails_promptly,
    forward,
    is_alive,
    params,
    rl_datum,
    sample,
    tensor,
    text,
    tokens,
    train_step,
)

IDS = tokens(8)
ONES = np.ones(7)


@pytest.fixture(scope="module")
def run(new_run) -> tinker.TrainingClient:
    return new_run()


def with_inputs(**inputs: tinker.TensorData) -> list[tinker.Datum]:
    return [tinker.Datum(model_input=text(IDS[:-1]), loss_fn_inputs=inputs)]


def targets(values=IDS[1:], dtype=np.int64) -> tinker.TensorData:
    return tensor(values, dtype)


def weights(values=ONES, dtype=np.float32) -> tinker.TensorData:
    return tensor(values, dtype)


def refuse(run, data, match: str, loss="cross_entropy", **options) -> None:
    for call in (run.forward, run.forward_backward):
        fails_as_user_error(lambda call=call: call(data, loss, **options).result(), match)


def test_err_01_length_mismatches(run) -> None:
    refuse(run, with_inputs(target_tokens=targets(IDS[1:-1]), weights=weights()), "target_tokens")
    refuse(run, with_inputs(target_tokens=targets(), weights=weights(np.ones(9))), "weights")
    good = batch(1)
    bad = with_inputs(target_tokens=targets(), weights=weights(np.ones(9)))
    refuse(run, good + bad, r"data\[1\]")
    assert is_alive(run)


def test_err_02_no_targets(run) -> None:
    refuse(run, with_inputs(weights=weights()), "target_tokens")


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_err_03_missing_rl_inputs(run, loss: str) -> None:
    refuse(run, batch(1), "logprobs|advantages", loss)


@pytest.mark.parametrize("token", [-1, 100_000, 2**31 - 1])
def test_err_04_input_ids_out_of_range(run, token: int) -> None:
    bad = tinker.Datum(
        model_input=text([5, token, 7]),
        loss_fn_inputs={"target_tokens": targets([5, 6, 7]), "weights": weights(np.ones(3))},
    )
    refuse(run, [bad], str(token))
    assert is_alive(run)


@pytest.mark.parametrize("token", [-1, 100_000, 2**40])
def test_err_05_target_ids_out_of_range(run, token: int) -> None:
    ids = [*IDS[1:-1], token]
    refuse(run, with_inputs(target_tokens=targets(ids), weights=weights()), str(token))
    assert is_alive(run)


def test_err_06_unknown_loss(run) -> None:
    refuse(run, batch(1), "no_such_loss", "no_such_loss")
    refuse(run, batch(1), "loss", "")


BAD_CONFIGS = [{"clip_low_threshold": "x"}, {"clip_high_threshold": float("nan")}]
BAD_CONFIGS += [{"no_such_setting": 1.0}, {"clip_low_threshold": 1.5, "clip_high_threshold": 0.5}]


@pytest.mark.parametrize("config", BAD_CONFIGS)
def test_err_07_bad_loss_config(run, config: dict) -> None:
    data = [rl_datum(IDS, -ONES, ONES)]
    refuse(run, data, "", "ppo", loss_fn_config=config)


def test_err_08_zero_length(run) -> None:
    empty = tinker.Datum(
        model_input=tinker.ModelInput.empty(),
        loss_fn_inputs={"target_tokens": targets([]), "weights": weights([])},
    )
    refuse(run, [empty], "no tokens")
    assert is_alive(run)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_err_09_values_that_are_not_finite(run, value: float) -> None:
    bad = weights([1, 1, 1, value, 1, 1, 1])
    refuse(run, with_inputs(target_tokens=targets(), weights=bad), "weights")
    refuse(run, [rl_datum(IDS, -ONES, ONES * value)], "advantages", "importance_sampling")
    assert is_alive(run)


BAD_ADAM = [{"learning_rate": value} for value in (float("nan"), float("inf"), -1.0)]
BAD_ADAM += [{"beta1": 1.0}, {"beta2": -0.5}, {"eps": -1.0}, {"weight_decay": -1.0}]
BAD_ADAM += [{"grad_clip_norm": -1.0}]


@pytest.mark.parametrize("bad", BAD_ADAM)
def test_err_10_bad_adam_params(run, bad: dict) -> None:
    adam = tinker.AdamParams(**bad)
    fails_as_user_error(lambda: run.optim_step(adam).result(), next(iter(bad)))
    assert is_alive(run)


def test_err_11_over_long_sequence(run) -> None:
    refuse(run, [datum(tokens(1500))], "1499|1500")
    assert is_alive(run)


def test_err_12_unsupported_chunks(run, base_sampler) -> None:
    audio = types.DmelChunk(dmel=b"x")
    image = types.ImageChunk(data=b"x", format="png", expected_tokens=2)
    pointer = types.ImageAssetPointerChunk(location="file:///etc/passwd", format="png")
    for chunk in (audio, image):
        bad = tinker.Datum(
            model_input=tinker.ModelInput(chunks=[chunk]),
            loss_fn_inputs={"target_tokens": targets([5, 6]), "weights": weights([1, 1])},
        )
        refuse(run, [bad], "")
    for chunk in (audio, image, pointer):
        prompt = tinker.ModelInput(chunks=[tinker.EncodedTextChunk(tokens=[5]), chunk])
        fails_promptly(lambda prompt=prompt: base_sampler.sample(prompt, 1, params()).result())
    assert is_alive(run)


def test_err_12_a_call_that_the_sdk_refuses_itself_does_not_block_the_run(run) -> None:
    pointer = types.ImageAssetPointerChunk(location="x", format="png", expected_tokens=2)
    bad = tinker.Datum(
        model_input=tinker.ModelInput(chunks=[pointer]),
        loss_fn_inputs={"target_tokens": targets([5, 6]), "weights": weights([1, 1])},
    )
    fails_promptly(lambda: run.forward([bad], "cross_entropy").result())
    assert is_alive(run)


def test_err_13_wrong_types_and_ranks(run) -> None:
    refuse(run, with_inputs(target_tokens=targets(dtype=np.float32), weights=weights()), "target")
    cube = tensor(np.ones((7, 1, 1)), np.float32)
    refuse(run, with_inputs(target_tokens=targets(), weights=cube), "weights")
    wide = tensor(np.ones((7, 2)), np.float32)
    refuse(run, with_inputs(target_tokens=targets(), weights=wide), "weights")


BAD_PATHS = ["tinker://nobody:train:0/weights/x", "tinker://a/weights", "tinker://../weights/x"]
BAD_PATHS += ["tinker://a/weights/../../etc", "/etc/passwd", "file:///etc/passwd", "tinker://"]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_err_14_bad_training_paths(module_client, path: str) -> None:
    fails_promptly(lambda: module_client.create_training_client_from_state(path).result())


@pytest.mark.parametrize("path", BAD_PATHS)
def test_err_15_bad_sampler_paths(module_client, path: str) -> None:
    fails_promptly(lambda: module_client.create_sampling_client(model_path=path).result())


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a\0b", "x" * 300, "a b", "%2e%2e"])
def test_err_16_bad_names(run, name: str) -> None:
    fails_as_user_error(lambda: run.save_state(name).result(), "path=")
    fails_promptly(lambda: run.save_weights_for_sampler(name).result())
    fails_promptly(lambda: run.save_weights_external(name).result())
    assert is_alive(run)


def test_err_17_sampler_weights_cannot_be_trained(run, module_client) -> None:
    path = run.save_weights_for_sampler("err-17").result().path
    create = module_client.create_training_client_from_state
    fails_as_user_error(lambda: create(path).result(), "cannot be trained")


def test_err_18_unknown_objects(rest) -> None:
    calls = [
        lambda: rest.get_training_run("nobody:train:0").result(),
        lambda: rest.list_checkpoints("nobody:train:0").result(),
        lambda: rest.delete_checkpoint("nobody:train:0", "weights/x").result(),
        lambda: rest.get_session("nobody").result(),
        lambda: rest.get_sampler("nobody").result(),
        lambda: rest.get_weights_info_by_tinker_path("tinker://nobody/weights/x").result(),
        lambda: rest.export_session_trace("nobody").result(),
    ]
    for call in calls:
        assert isinstance(fails_promptly(call, "nobody"), tinker.NotFoundError)


def test_err_19_bad_ttl(run) -> None:
    for ttl in (5, 0, -1, 10**12):
        fails_as_user_error(
            lambda ttl=ttl: run.save_state("err-19", ttl_seconds=ttl).result(), "ttl_seconds"
        )


BAD_PARAMS = [{"max_tokens": 0}, {"max_tokens": -5}, {"temperature": -1.0}]
BAD_PARAMS += [{"temperature": float("nan")}, {"top_p": -0.1}, {"top_p": 2.0}, {"top_k": -7}]
BAD_PARAMS += [{"stop": [10**7]}]


@pytest.mark.parametrize("options", BAD_PARAMS)
def test_err_21_bad_sampling_params(base_sampler, options: dict) -> None:
    fails_promptly(lambda: sample(base_sampler, IDS, **options))


def test_err_21_bad_sample_requests(base_sampler) -> None:
    for num_samples in (0, -1, 10**6):
        fails_promptly(lambda n=num_samples: sample(base_sampler, IDS, n), "num_samples")
    fails_promptly(lambda: sample(base_sampler, []))
    fails_promptly(lambda: sample(base_sampler, [5, 100_000]), "100000")
    assert sample(base_sampler, IDS).sequences


def test_err_22_over_long_prompt(base_sampler) -> None:
    fails_promptly(lambda: sample(base_sampler, tokens(5000)), "5000")


def test_err_23_bad_prompt_logprob_options(base_sampler) -> None:
    fails_promptly(lambda: sample(base_sampler, IDS, topk_prompt_logprobs=-1))
    fails_promptly(lambda: sample(base_sampler, IDS, topk_prompt_logprobs=10**6))
    fails_promptly(lambda: sample(base_sampler, IDS, prompt_alt_tokens_k=-1))
    fails_promptly(
        lambda: base_sampler.compute_logprobs(text(IDS), prompt_logprobs_last_n=100).result(),
        "last_n=100",
    )
    wrong = tensor(np.ones((3, 1)), np.int64)
    fails_promptly(lambda: sample(base_sampler, IDS, target_prompt_logprobs=wrong))


def test_err_24_unknown_base_for_sampling(module_client) -> None:
    create = module_client.create_sampling_client
    fails_promptly(lambda: create(base_model="nobody/nothing").result(), "nobody/nothing")


def test_err_25_a_failed_operation_is_a_user_error_with_useful_text(
    new_run, module_client, base_sampler
) -> None:
    """Category `user`, the value at fault, what is accepted; the same when it is asked again."""
    run = new_run()
    bad_data = with_inputs(target_tokens=targets([*IDS[1:-1], 100_000]), weights=weights())
    named = "tinker://00000000:train:0/weights/none"
    operations = [
        (run.forward_backward(bad_data, "cross_entropy"), "100000.*ids 0 to"),
        (run.forward(batch(), "ppoo"), "ppoo.*did you mean 'ppo'"),
        (run.optim_step(tinker.AdamParams(beta1=2.0)), "beta1=2.0.*expected"),
        (run.save_state("a/b"), "a/b"),
        (base_sampler.sample(text(IDS), 1, params(temperature=-1.0)), "temperature=-1.0.*expected"),
    ]
    for future, match in operations:
        fails_as_user_error(future.result, match)
        fails_as_user_error(future.result, match)
    load, create = (
        module_client.create_training_client_from_state,
        module_client.create_lora_training_client,
    )
    fails_as_user_error(lambda: load(named).result(), f"{named}.*does not exist")
    fails_as_user_error(lambda: create(base_model="no/model").result(), "no/model.*has")
    assert is_alive(run)


def test_err_26_a_refused_batch_leaves_no_gradient(new_run) -> None:
    run = new_run()
    before = forward(run, batch())
    bad = with_inputs(target_tokens=targets([*IDS[1:-1], 100_000]), weights=weights())
    fails_as_user_error(lambda: run.forward_backward(batch() + bad, "cross_entropy").result())
    run.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    for one, other in zip(before, forward(run, batch()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_err_27_a_large_request(new_run) -> None:
    run = new_run()
    wide = np.zeros((1000, 900), np.int64) + 5
    item = tinker.Datum(
        model_input=text(tokens(1000)),
        loss_fn_inputs={
            "target_tokens": tensor(wide, np.int64),
            "weights": tensor(np.ones((1000, 900)) / 900, np.float32),
        },
    )
    result = run.forward([item], "cross_entropy").result()
    assert result.loss_fn_outputs[0]["logprobs"].shape == [1000, 900]


def test_a_failed_step_between_good_ones_changes_nothing(new_run) -> None:
    one, two = new_run(), new_run()
    for run in (one, two):
        train_step(run, batch())
    bad = with_inputs(target_tokens=targets(), weights=weights(np.ones(3)))
    failing = one.forward_backward(bad, "cross_entropy")
    after = one.forward_backward(batch(), "cross_entropy")
    stepped = one.optim_step(tinker.AdamParams())
    fails_as_user_error(failing.result)
    after.result()
    stepped.result()
    train_step(two, batch(), tinker.AdamParams())
    for left, right in zip(forward(one, batch()), forward(two, batch()), strict=True):
        np.testing.assert_array_equal(left, right)
