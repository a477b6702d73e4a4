"""Held-out loss: mean negative log-likelihood per trained token, and bits per byte."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

import numpy as np

from tinker_cookbook.eval.evaluators import SamplingClientEvaluator, TrainingClientEvaluator
from tinker_cookbook.supervised.common import compute_bpb, compute_mean_nll
from tinker_cookbook.utils.sdk_compat import call

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.supervised.types import SupervisedDataset
    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["NLLEvaluator", "SamplerNLLEvaluator", "nll_metrics"]

# Number of datums per forward call: enough for full batches, few enough to limit the request.
FORWARD_DATUMS = 64


def nll_metrics(
    logprobs: list[tinker.TensorData],
    data: list[tinker.Datum],
    tokenizer: Tokenizer | None,
    *,
    prefix: str,
) -> dict[str, float]:
    """Compute `<prefix>nll` and, given a tokenizer, `<prefix>bpb`.

    Args:
        logprobs: Per datum, the log probabilities (natural) of the target tokens, [N].
        data: The datums, with `weights` and `target_tokens`.
        tokenizer: Needed for the number of bytes of the trained tokens.
        prefix: Start of the metrics' names, e.g. `test/`.
    """
    weights = [datum.loss_fn_inputs["weights"] for datum in data]
    metrics = {f"{prefix}nll": compute_mean_nll(logprobs, weights)}
    if tokenizer is not None:
        targets = [datum.loss_fn_inputs["target_tokens"] for datum in data]
        metrics[f"{prefix}bpb"] = compute_bpb(logprobs, weights, targets, tokenizer)
    return metrics


class _HeldOutData:
    """Held-out datums, and the prefix of their metrics."""

    def __init__(
        self, data: list[tinker.Datum], name: str = "test", tokenizer: Tokenizer | None = None
    ) -> None:
        self.data = data
        self.name = name
        self.tokenizer = tokenizer

    @classmethod
    def from_dataset(
        cls, dataset: SupervisedDataset, name: str = "test", tokenizer: Tokenizer | None = None
    ) -> Self:
        """Create an evaluator of all datums of a dataset."""
        return cls(_all_datums(dataset), name, tokenizer)


class NLLEvaluator(_HeldOutData, TrainingClientEvaluator):
    """Held-out loss, computed by forward passes of the training client.

    The passes are in the run's own queue, between two optimizer steps, and nothing is sampled.
    So the same weights give the same number, also in a resumed run.
    """

    async def __call__(self, training_client: tinker.TrainingClient) -> dict[str, float]:
        """Return `<name>/nll` and, with a tokenizer, `<name>/bpb`."""
        data = self.data
        futures = [
            training_client.forward(data[start : start + FORWARD_DATUMS], "cross_entropy")
            for start in range(0, len(data), FORWARD_DATUMS)
        ]
        outputs = [output for future in futures for output in (await future).loss_fn_outputs]
        logprobs = [output["logprobs"] for output in outputs]
        return nll_metrics(logprobs, data, self.tokenizer, prefix=f"{self.name}/")


class SamplerNLLEvaluator(_HeldOutData, SamplingClientEvaluator):
    """Held-out loss, computed by a sampling client, if no training client exists."""

    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        """Return `<name>/nll` and, with a tokenizer, `<name>/bpb`."""
        import tinker

        values = await asyncio.gather(
            *(_prompt_logprobs(sampling_client, _whole_sequence(datum)) for datum in self.data)
        )
        # Prompt logprobs are aligned with their tokens; the first token has no prediction.
        logprobs = [
            tinker.TensorData(
                data=np.array([0.0 if x is None else x for x in row[1:]], dtype=np.float32),
                dtype="float32",
                shape=[len(row) - 1],
            )
            for row in values
        ]
        return nll_metrics(logprobs, self.data, self.tokenizer, prefix=f"{self.name}/")


def _all_datums(dataset: SupervisedDataset) -> list[tinker.Datum]:
    return [datum for index in range(len(dataset)) for datum in dataset.get_batch(index)]


def _whole_sequence(datum: tinker.Datum) -> tinker.ModelInput:
    import tinker

    last_target = int(datum.loss_fn_inputs["target_tokens"].to_numpy()[-1])
    last = tinker.EncodedTextChunk(tokens=[last_target])
    return tinker.ModelInput(chunks=[*datum.model_input.chunks, last])


async def _prompt_logprobs(
    client: tinker.SamplingClient, prompt: tinker.ModelInput
) -> list[float | None]:
    return await call(client, "compute_logprobs", prompt)
