"""Datums of self-distillation: their places, weights and gradients, against a real teacher."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import tinker

from tests.conftest import ServiceProcess
from tests.distillation.data import train_teacher
from tests.number_format import by_format
from tinker_cookbook.distillation import objectives, sdft
from tinker_cookbook.utils.sdk_compat import wait_for_client

PROMPT, TEACHER_PROMPTS = [20, 21, 22], [[30, 31, 32, 33, 34], [40, 41]]
REPLY_TOKENS = 6
FLOOR = by_format(float32=1e-4, bfloat16=0.1)


@pytest.fixture(scope="module")
def teacher(local_service: ServiceProcess, shared_client: tinker.ServiceClient):
    path = train_teacher(local_service, favourite=77)
    return wait_for_client(shared_client.create_sampling_client(model_path=path))


@pytest.fixture(scope="module")
def base(local_service: ServiceProcess, shared_client: tinker.ServiceClient):
    return wait_for_client(shared_client.create_sampling_client(base_model=local_service.model))


@pytest.fixture(scope="module")
def data(base) -> list[tinker.Datum]:
    """Two replies of the base model, one for each teacher's prompt."""
    params = tinker.SamplingParams(max_tokens=REPLY_TOKENS, seed=1)
    found = base.sample(tinker.ModelInput.from_ints(PROMPT), 2, params).result()
    return [build_datum(list(one.tokens), list(one.logprobs)) for one in found.sequences]


METADATA = [{"group_idx": 1, "traj_idx": 0}, {"group_idx": 0, "traj_idx": 0}]
PROMPTS = [tinker.ModelInput.from_ints(tokens) for tokens in TEACHER_PROMPTS]


def build_datum(reply: list[int], logprobs: list[float]) -> tinker.Datum:
    tokens = PROMPT + reply
    before = len(PROMPT) - 1
    arrays = {
        "target_tokens": np.array(tokens[1:]),
        "logprobs": np.array([0.0] * before + logprobs, np.float32),
        "advantages": np.array([0.0] * before + [0.5] * len(reply), np.float32),
        "mask": np.array([0.0] * before + [1.0] * len(reply), np.float32),
    }
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={name: tinker.TensorData.from_numpy(a) for name, a in arrays.items()},
    )


def teacher_scores(teacher, datum: tinker.Datum, prompt: list[int]) -> np.ndarray:
    reply = datum.loss_fn_inputs["target_tokens"].to_numpy()[len(PROMPT) - 1 :].tolist()
    whole = tinker.ModelInput.from_ints([*prompt, *reply])
    return np.array(teacher.compute_logprobs(whole).result()[len(prompt) :])


def test_advantages_are_the_difference_of_log_probabilities(teacher, data):
    own = list(data)
    metrics = asyncio.run(sdft.compute_sdft_advantages(own, METADATA, teacher, PROMPTS))
    differences = []
    for datum, before, found in zip(own, data, METADATA, strict=True):
        scores = teacher_scores(teacher, before, TEACHER_PROMPTS[found["group_idx"]])
        student = before.loss_fn_inputs["logprobs"].to_numpy()[len(PROMPT) - 1 :]
        advantages = datum.loss_fn_inputs["advantages"].to_numpy()
        np.testing.assert_allclose(advantages[len(PROMPT) - 1 :], scores - student, atol=FLOOR)
        assert (advantages[: len(PROMPT) - 1] == 0).all()
        differences.append(student - scores)
    mean = np.concatenate(differences).mean()
    assert metrics["sdft/teacher_kl"] == pytest.approx(mean, abs=FLOOR)
    assert metrics["sdft/num_skipped"] == 0


def test_the_teacher_that_is_the_student_gives_no_advantage(base, data):
    own = list(data)
    same = [tinker.ModelInput.from_ints(PROMPT)] * 2
    metrics = asyncio.run(sdft.compute_sdft_advantages(own, METADATA, base, same))
    for datum in own:
        np.testing.assert_allclose(datum.loss_fn_inputs["advantages"].to_numpy(), 0, atol=FLOOR)
    assert metrics["sdft/teacher_kl"] == pytest.approx(0, abs=FLOOR)


def test_top_tokens_are_weighted_at_the_trained_positions(teacher, data):
    datums, metrics = asyncio.run(
        sdft.build_topk_distillation_datums(
            data, METADATA, teacher, PROMPTS, topk=4, skip_first_n_tokens=2
        )
    )
    weights = datums[0].loss_fn_inputs["weights"].to_numpy().reshape(-1, 4)
    first = len(PROMPT) - 1 + 2
    assert (weights[:first] == 0).all()
    np.testing.assert_allclose(weights[first:].sum(-1), 1, atol=1e-5)
    assert metrics["sdft/num_trained_tokens"] == 2 * (REPLY_TOKENS - 2)
    assert 0 < metrics["sdft/teacher_mass"] < 1


def test_ids_outside_the_vocabulary_are_left_out(teacher, data):
    datums, _ = asyncio.run(
        sdft.build_topk_distillation_datums(
            data, METADATA, teacher, PROMPTS, topk=8, vocab_size=77, skip_first_n_tokens=0
        )
    )
    for datum in datums:
        tokens = datum.loss_fn_inputs["target_tokens"].to_numpy()
        assert tokens.max() < 77
        weights = datum.loss_fn_inputs["weights"].to_numpy().reshape(-1, 8)
        np.testing.assert_allclose(weights[len(PROMPT) - 1 :].sum(-1), 1, atol=1e-5)


def test_long_replies_are_counted_and_left_alone(teacher, data):
    own = list(data)
    length = len(TEACHER_PROMPTS[1]) + REPLY_TOKENS + 1
    metrics = asyncio.run(sdft.compute_sdft_advantages(own, METADATA, teacher, PROMPTS, length))
    assert metrics["sdft/num_skipped"] == 1
    assert own[1] is data[1]
    assert own[0] is not data[0]


def test_the_custom_loss_is_the_reverse_kl_with_its_gradient(
    teacher, data, local_service: ServiceProcess, shared_client: tinker.ServiceClient
):
    torch = pytest.importorskip("torch")
    datums, _ = asyncio.run(
        sdft.build_reverse_kl_datums(
            data, METADATA, teacher, PROMPTS, topk=5, skip_first_n_tokens=0
        )
    )
    rng = np.random.default_rng(0)
    logprobs = [np.log(rng.dirichlet(np.ones(9), REPLY_TOKENS + 2)[:, :5]) for _ in datums]
    tensors = [torch.tensor(one, requires_grad=True) for one in logprobs]
    loss, metrics = sdft.reverse_kl_custom_loss(datums, tensors)
    loss.backward()
    value = 0.0
    for datum, student, tensor in zip(datums, logprobs, tensors, strict=True):
        rows = slice(len(PROMPT) - 1, None)
        of_teacher = datum.loss_fn_inputs["teacher_logprobs"].to_numpy().reshape(-1, 5)[rows]
        wanted = objectives.reverse_kl(student[rows], of_teacher)
        value += wanted.value_T.sum()
        np.testing.assert_allclose(-tensor.grad.numpy()[rows], wanted.weights_TK, atol=1e-6)
        assert (tensor.grad.numpy()[: rows.start] == 0).all()
    assert float(loss.detach()) == pytest.approx(value, rel=1e-6)
    assert metrics["sdft/reverse_kl"] == pytest.approx(value / (2 * REPLY_TOKENS), rel=1e-6)
    student = shared_client.create_lora_training_client(local_service.model, rank=2).result()
    found = student.forward_backward_custom(datums, sdft.reverse_kl_custom_loss).result()
    assert found.metrics["sdft/reverse_kl"] > 0
