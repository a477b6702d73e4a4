"""Requests that cannot be served are refused with the field, its value and what is accepted."""

from __future__ import annotations

import numpy as np
import pytest

from tinker_cookbook.local.engine.sampling.request_checks import check_sample_spec
from tinker_cookbook.local.engine.types import ModelInfo, SampleSpec, SparseRows
from tinker_cookbook.local.errors import UserError

INFO = ModelInfo("tiny", "", vocab_size=320, max_context_length=1024, eos_token_ids=(2,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": np.zeros(0, np.int32)}, "prompt has no tokens"),
        ({"prompt": np.array([5, 320])}, "prompt token 320"),
        ({"prompt": np.array([-1])}, "prompt token -1"),
        ({"prompt": np.ones(2000, np.int32)}, "prompt has 2000 tokens"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 2000}, "max_tokens=2000"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -2}, "top_k=-2"),
        ({"topk_sample_logprobs": -1}, "topk_sample_logprobs=-1"),
        (
            {"topk_sample_logprobs": 1024, "num_samples": 4096, "max_tokens": 100},
            "topk_sample_logprobs asks for 419430400",
        ),
        ({"prompt_alt_tokens_k": 10**6}, "prompt_alt_tokens_k=1000000"),
        ({"prompt_logprobs_last_n": 2}, "needs prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 9}, "prompt_logprobs_last_n=9"),
        ({"target_prompt_logprobs": np.zeros((4, 1), int)}, r"needs \[3, K\]"),
        ({"target_prompt_logprobs": np.full((3, 1), 320)}, "holds 320"),
        (
            {
                "target_prompt_logprobs": SparseRows(
                    np.ones(1, int), np.zeros(4), np.zeros(1), (3, 1)
                )
            },
            "crow_indices|must be equal",
        ),
    ],
)
def test_unusable_requests_are_refused_with_the_value(changes, message):
    fields = {"prompt": np.array([5, 6, 7, 8]), "max_tokens": 3} | changes
    with pytest.raises(UserError, match=message):
        check_sample_spec(SampleSpec(**fields), INFO)
