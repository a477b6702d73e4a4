"""A service with a quantised base, through the SDK."""

from __future__ import annotations

import numpy as np

from tests.e2e.sdk import batch, forward, prompt_logprobs, tokens, train_step
from tests.tiny_models import tiny_model
from tinker_cookbook.utils.sdk_sessions import close_session


def test_training_and_sampling_share_the_quantised_base(service_factory) -> None:
    model = tiny_model(tied=False)
    quantised = service_factory(model, "--base-format", "int4", state="shared")
    client = quantised.connect()
    training = client.create_lora_training_client(str(model), rank=4, seed=0).result()
    data = batch(seed=1, length=20)
    losses = [train_step(training, data).metrics["loss:sum"] for _ in range(4)]
    assert losses[-1] < losses[0]

    path = training.save_weights_for_sampler("trained").result().path
    sampler = client.create_sampling_client(model_path=path).result()
    for datum, scored in zip(data, forward(training, data), strict=True):
        ids = datum.model_input.to_ints()
        np.testing.assert_allclose(prompt_logprobs(sampler, ids), scored[:-1], atol=1e-3)
    close_session(client, "success")
    quantised.stop()

    full = service_factory(model, state="shared")
    client = full.connect()
    sampler = client.create_sampling_client(model_path=path).result()
    assert prompt_logprobs(sampler, tokens(9)).shape == (8,)
    assert "trained with base_format=int4 is loaded on base_format=full" in full.log()
    close_session(client, "success")
