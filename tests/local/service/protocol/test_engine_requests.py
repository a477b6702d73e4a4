"""JSON requests become engine specs, or errors that name the field."""

import numpy as np
import pytest

from tinker_cookbook.local.engine.types import AdamSpec, LoraSpec, SparseRows
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.protocol.engine_requests import (
    decode_adam,
    decode_lora,
    decode_sample_spec,
    refuse_other_optimizer,
)
from tinker_cookbook.utils.shared_limits import MAX_LORA_RANK


def sample_body(**changes) -> dict:
    body = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 5},
        "num_samples": 1,
    }
    return body | changes


def test_lora_defaults_and_values() -> None:
    assert decode_lora({}) == LoraSpec()
    values = {"rank": 8, "seed": 1, "train_unembed": False, "train_mlp": True, "train_attn": False}
    assert decode_lora(values) == LoraSpec(8, 1, train_unembed=False, train_attn=False)


@pytest.mark.parametrize(
    ("metadata", "alpha"),
    [
        ({"renderer": "x"}, 32.0),
        ({"lora_alpha": "8"}, 8.0),
        ({"lora_alpha": "8", "lora_rslora": "true"}, 32.0),
        ({"lora_rslora": "true"}, 128.0),
        ({"lora_rslora": "false", "lora_dropout": "0"}, 32.0),
    ],
)
def test_alpha_is_read_from_the_metadata_of_the_run(metadata: dict, alpha: float) -> None:
    assert decode_lora({"rank": 16}, metadata) == LoraSpec(16, alpha=alpha)


def test_dropout_is_read_from_the_metadata_of_the_run() -> None:
    assert decode_lora({}, {"lora_dropout": "0.25"}) == LoraSpec(dropout=0.25)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lora_alpha": "big"}, "user_metadata.lora_alpha='big' is not accepted"),
        ({"lora_alpha": "0"}, "lora_alpha='0' is not accepted; expected a number above 0"),
        ({"lora_alpha": "inf"}, "lora_alpha='inf'"),
        ({"lora_rslora": "yes"}, "user_metadata.lora_rslora='yes'.*'true' or 'false'"),
        ({"lora_dropout": "1"}, "lora_dropout='1' is not accepted; expected a number from 0 to le"),
    ],
)
def test_wrong_values_in_the_metadata_are_refused(metadata: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode_lora({}, metadata)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": -1}, "rank=-1"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 10_000_000}, "rank=10000000"),
        (
            {"rank": MAX_LORA_RANK + 1},
            f"lora_config.rank={MAX_LORA_RANK + 1}.*up to {MAX_LORA_RANK}",
        ),
        ({"seed": "x"}, "seed='x'"),
        ({"train_mlp": False, "train_attn": False, "train_unembed": False}, "trains nothing"),
        ({"alpha": 3}, "alpha is not a known field"),
    ],
)
def test_wrong_lora_settings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode_lora(values)


def test_other_optimizers_are_refused() -> None:
    refuse_other_optimizer({"type": "adamw"}, field="optimizer_config")
    with pytest.raises(UserError, match=r"optimizer_config.type='dimuon'.*adamw"):
        refuse_other_optimizer({"type": "dimuon", "version": 1}, field="optimizer_config")
    with pytest.raises(UserError, match="dimuon"):
        decode_adam({"optimizer_params": {"type": "dimuon", "learning_rate": 0.1}})


def test_adam_defaults_and_values() -> None:
    assert decode_adam({}) == AdamSpec()
    assert decode_adam({"adam_params": {"learning_rate": 0, "grad_clip_norm": 1.5}}) == AdamSpec(
        learning_rate=0.0, grad_clip_norm=1.5
    )


def test_the_type_of_adam_params_is_ignored() -> None:
    assert decode_adam({"adam_params": {"type": 3}}) == AdamSpec()


BAD_ADAM = [("learning_rate", None), ("learning_rate", -1e-4), ("beta1", 1.0), ("beta1", -0.1)]
BAD_ADAM += [
    ("beta2", 1),
    ("eps", -1e-8),
    ("weight_decay", -0.1),
    ("grad_clip_norm", -1),
    ("lr", 1),
]


@pytest.mark.parametrize(("name", "value"), BAD_ADAM)
def test_wrong_adam_settings_are_refused(name: str, value) -> None:
    with pytest.raises(UserError, match=f"adam_params.{name}"):
        decode_adam({"adam_params": {name: value}})


def test_a_sample_request_is_read() -> None:
    params = {"max_tokens": 7, "seed": 5, "temperature": 0, "top_k": 3, "top_p": 0.5, "stop": "x"}
    spec = decode_sample_spec(
        sample_body(sampling_params=params, num_samples=4, prompt_logprobs=True)
    )
    np.testing.assert_array_equal(spec.prompt, [1, 2, 3])
    assert (spec.max_tokens, spec.seed, spec.temperature, spec.top_k) == (7, 5, 0.0, 3)
    assert (spec.top_p, spec.stop, spec.num_samples, spec.prompt_logprobs) == (0.5, ["x"], 4, True)


@pytest.mark.parametrize(
    ("sent", "read"), [(None, None), ([], []), ("a", ["a"]), (["a", "b"], ["a", "b"]), ([1], [1])]
)
def test_stops(sent, read) -> None:
    params = {} if sent is None else {"stop": sent}
    assert decode_sample_spec(sample_body(sampling_params=params)).stop == read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": {"chunks": []}}, "prompt has no tokens"),
        ({"prompt": {}}, "prompt.chunks is missing"),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, -1]}]}}, r"tokens\[1\]=-1"),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [True]}]}}, "=True"),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [2**31]}]}}, "not a token id"),
        ({"prompt": {"chunks": [{"type": "dmel", "dmel": "eA=="}]}}, "'dmel' is not supported"),
        ({"prompt": {"chunks": ["x"]}}, "not a chunk"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 10**6}, "num_samples=1000000"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens=0"),
        ({"sampling_params": {"max_tokens": -1}}, "max_tokens=-1"),
        ({"sampling_params": {"temperature": -0.1}}, "temperature=-0.1"),
        ({"sampling_params": {"temperature": None}}, "temperature=None"),
        ({"sampling_params": {"top_p": 0}}, "top_p=0"),
        ({"sampling_params": {"top_p": 1.1}}, "top_p=1.1"),
        ({"sampling_params": {"top_k": -2}}, "top_k=-2"),
        ({"sampling_params": {"stop": ["a", 1]}}, "texts only, or token ids only"),
        ({"sampling_params": {"stop": [""]}}, "stop=''.*texts of 1 to 4096"),
        ({"sampling_params": {"beam": 2}}, "beam is not a known field"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs=-1"),
        ({"target_prompt_logprobs": {"dtype": "int64", "data": [1]}}, r"expected \[P - 1, K\]"),
        (
            {"target_prompt_logprobs": {"dtype": "int64", "data": [1], "shape": [2, 2]}},
            "holds 1 values",
        ),
        ({"target_prompt_logprobs": {"dtype": "float32", "data": []}}, "dtype='float32'"),
    ],
)
def test_wrong_sample_requests_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode_sample_spec(sample_body(**changes))


def test_target_tokens_dense_and_sparse() -> None:
    dense = {"dtype": "int64", "data": [1, 2, -1, 4], "shape": [2, 2]}
    spec = decode_sample_spec(sample_body(target_prompt_logprobs=dense))
    assert isinstance(spec.target_prompt_logprobs, np.ndarray)
    np.testing.assert_array_equal(spec.target_prompt_logprobs, [[1, 2], [-1, 4]])
    sparse = {"dtype": "int64", "data": [9], "shape": [2, 2]}
    sparse |= {"sparse_crow_indices": [0, 0, 1], "sparse_col_indices": [1]}
    spec = decode_sample_spec(sample_body(target_prompt_logprobs=sparse))
    assert isinstance(spec.target_prompt_logprobs, SparseRows)
    assert spec.target_prompt_logprobs.shape == (2, 2)
