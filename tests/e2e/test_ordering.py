"""Order within a run, independence between runs, the async spellings (ORD, ASY)."""

import asyncio
import threading
import time
import warnings

import numpy as np
import pytest
import tinker

from tests.e2e.sdk import (
    ADAM,
    batch,
    datum,
    fails_as_user_error,
    forward,
    logprobs_of,
    params,
    prompt_logprobs,
    sample,
    tensor,
    text,
    tokens,
    train_step,
)
from tinker_cookbook.utils.sdk_sessions import close_session


def flat(run: tinker.TrainingClient) -> np.ndarray:
    return np.concatenate(forward(run, batch(2, seed=5)))


def bad_batch() -> list[tinker.Datum]:
    (item,) = batch(1)
    inputs = item.loss_fn_inputs | {"weights": tensor([1.0], np.float32)}
    return [tinker.Datum(model_input=item.model_input, loss_fn_inputs=inputs)]


def test_ord_01_pipelined_equals_sequential(new_run) -> None:
    data = [batch(2, seed=number) for number in range(4)]
    pipelined, sequential = new_run(), new_run()
    futures = []
    for item in data:
        futures.append(pipelined.forward_backward(item, "cross_entropy"))
        futures.append(pipelined.optim_step(ADAM))
    for future in futures:
        future.result()
    for item in data:
        sequential.forward_backward(item, "cross_entropy").result()
        sequential.optim_step(ADAM).result()
    np.testing.assert_array_equal(flat(pipelined), flat(sequential))


def test_ord_02_forward_around_a_queued_step(new_run) -> None:
    run = new_run()
    before = run.forward(batch(), "cross_entropy")
    run.forward_backward(batch(), "cross_entropy")
    run.optim_step(ADAM)
    after = run.forward(batch(), "cross_entropy")
    expected = forward(new_run(), batch())
    np.testing.assert_array_equal(logprobs_of(before.result())[0], expected[0])
    assert after.result().metrics["loss:sum"] < before.result().metrics["loss:sum"]


def test_ord_03_sampler_taken_in_the_middle(new_run) -> None:
    run = new_run()
    run.forward_backward(batch(), "cross_entropy")
    run.optim_step(ADAM)
    middle = run.forward([datum(tokens(10))], "cross_entropy")
    taken = run.save_weights_and_get_sampling_client()
    run.forward_backward(batch(), "cross_entropy")
    last = run.optim_step(ADAM)
    sampler = taken.result()
    last.result()
    found = prompt_logprobs(sampler, tokens(10))
    np.testing.assert_allclose(found, logprobs_of(middle.result())[0], atol=1e-3)


def test_ord_04_tenants_are_isolated(local_service, new_run) -> None:
    others = [local_service.connect() for _ in range(2)]
    one, two = (new_run(client) for client in others)
    before = flat(two)
    train_step(one, batch())
    np.testing.assert_array_equal(flat(two), before)
    for client in others:
        close_session(client, "success")


def test_ord_05_and_06_failures_stay_alone(new_run) -> None:
    run, other = new_run(), new_run()
    failing = run.forward_backward(bad_batch(), "cross_entropy")
    good = run.forward_backward(batch(), "cross_entropy")
    stepped = run.optim_step(ADAM)
    elsewhere = other.forward_backward(batch(), "cross_entropy")
    fails_as_user_error(failing.result, "weights")
    assert good.result().metrics["loss:sum"] > 0
    stepped.result()
    elsewhere.result()


def test_ord_07_threads(new_run) -> None:
    run = new_run()
    losses: list[float] = []

    def work() -> None:
        losses.extend(
            run.forward_backward(batch(1), "cross_entropy").result().metrics["loss:sum"]
            for _ in range(5)
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(losses) == 20
    assert max(losses) - min(losses) < 1e-3
    run.optim_step(ADAM).result()


def test_ord_08_step_overhead(new_run) -> None:
    run = new_run()
    train_step(run, batch(1))
    seconds = []
    for _ in range(5):
        began = time.monotonic()
        train_step(run, batch(1))
        seconds.append(time.monotonic() - began)
    assert np.median(seconds) < 1.5


@pytest.mark.anyio
async def test_asy_01_async_flow(local_service) -> None:
    client = local_service.connect()
    run = await client.create_lora_training_client(base_model=local_service.model, rank=4)
    computed = run.forward_backward(batch(), "cross_entropy")
    stepped = run.optim_step(ADAM)
    assert (await computed).metrics["loss:sum"] > 0
    await stepped
    sampler = await run.save_weights_and_get_sampling_client()
    responses = await asyncio.gather(
        *[sampler.sample(text(tokens(5)), 1, params(4, stop=[])) for _ in range(8)]
    )
    assert all(len(response.sequences[0].tokens) == 4 for response in responses)
    await client.close("success")


@pytest.mark.anyio
async def test_asy_02_older_async_spellings(local_service) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        client = local_service.connect()
        run = await client.create_lora_training_client_async(base_model=local_service.model, rank=4)
        await (await run.forward_async(batch(), "cross_entropy"))
        await (await run.forward_backward_async(batch(), "cross_entropy"))
        await (await run.optim_step_async(ADAM))
        saved = await (await run.save_state_async("asy-02"))
        named = await (await run.save_weights_for_sampler_async("asy-02"))
        sampler = await client.create_sampling_client_async(model_path=named.path)
        prompt = text(tokens(5))
        assert (await sampler.sample_async(prompt, 1, params(2))).sequences
        assert len(await sampler.compute_logprobs_async(prompt)) == 5
        ephemeral = await run.save_weights_and_get_sampling_client_async()
        assert (await ephemeral.sample_async(prompt, 1, params(2))).sequences
        again = await client.create_training_client_from_state_async(saved.path)
        assert (await again.get_info_async()).lora_rank == 4
        capabilities = await client.get_server_capabilities_async()
        assert capabilities.supported_models[0].model_name == local_service.model
        await client.close("success")


def test_asy_03_future_as_client(module_client, local_service) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        future = module_client.create_lora_training_client(base_model=local_service.model, rank=4)
        assert future.forward(batch(), "cross_entropy").result().loss_fn_outputs


def test_asy_04_futures_interoperate(new_run) -> None:
    run = new_run()
    seen: list[bool] = []
    future = run.forward(batch(), "cross_entropy").future()
    future.add_done_callback(lambda done: seen.append(done.exception() is None))
    assert future.result(timeout=30).loss_fn_outputs
    deadline = time.monotonic() + 5
    while not seen and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen == [True]


@pytest.mark.anyio
async def test_asy_05_cancelling_is_harmless(base_sampler) -> None:
    async def one() -> tinker.SampleResponse:
        return await base_sampler.sample(text(tokens(5)), 4, params(900, stop=[]))

    tasks = [asyncio.create_task(one()) for _ in range(3)]
    await asyncio.sleep(0.2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    began = time.monotonic()
    response = await base_sampler.sample(text(tokens(5)), 1, params(4, stop=[]))
    assert len(response.sequences[0].tokens) == 4
    assert time.monotonic() - began < 5


def test_samples_go_on_while_a_run_trains(new_run, base_sampler) -> None:
    run = new_run()
    steps = [run.forward_backward(batch(8, seed=n), "cross_entropy") for n in range(20)]
    began = time.monotonic()
    assert sample(base_sampler, tokens(5), max_tokens=2).sequences
    waited = time.monotonic() - began
    for step in steps:
        step.result()
    assert waited < time.monotonic() - began + 1
