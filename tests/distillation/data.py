"""Data sets over plain token ids, and a teacher that a test can train in a second."""

from __future__ import annotations

import chz
import numpy as np
import tinker

from tests.conftest import ServiceProcess
from tinker_cookbook.supervised.common import datum_from_model_input_weights
from tinker_cookbook.supervised.types import SupervisedDataset, SupervisedDatasetBuilder

PROMPT_TOKENS, REPLY_TOKENS = 5, 6


def make_datum(number: int) -> tinker.Datum:
    """Return a sequence of tokens that depends on a number; only the reply is trained."""
    rng = np.random.default_rng(number)
    tokens = rng.integers(10, 200, PROMPT_TOKENS + REPLY_TOKENS).tolist()
    weights = np.array([0.0] * PROMPT_TOKENS + [1.0] * REPLY_TOKENS)
    return datum_from_model_input_weights(tinker.ModelInput.from_ints(tokens), weights)


class TokenData(SupervisedDataset):
    """Datums by number, in another order each epoch."""

    def __init__(self, first: int, count: int, batch_size: int) -> None:
        self._numbers = list(range(first, first + count))
        self._batch_size = batch_size
        self._order = self._numbers

    def get_batch(self, index: int) -> list[tinker.Datum]:
        start = index * self._batch_size
        return [make_datum(number) for number in self._order[start : start + self._batch_size]]

    def __len__(self) -> int:
        return len(self._numbers) // self._batch_size

    def set_epoch(self, seed: int = 0) -> None:
        self._order = np.random.default_rng(seed).permutation(self._numbers).tolist()


class PromptedTokenData(TokenData):
    """The teacher has another prompt before each reply."""

    def get_teacher_prompts(self, index: int) -> list[tinker.ModelInput]:
        return [tinker.ModelInput.from_ints([7, 8, 9]) for _ in self.get_batch(index)]


@chz.chz
class TokenBuilder(SupervisedDatasetBuilder):
    first: int = 0
    count: int = 8
    batch_size: int = 4
    test_size: int = 4
    prompted: bool = False

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        kind = PromptedTokenData if self.prompted else TokenData
        train = kind(self.first, self.count, self.batch_size)
        if not self.test_size:
            return train, None
        return train, kind(self.first + 1000, self.test_size, self.test_size)


def train_teacher(
    service: ServiceProcess, favourite: int, *, steps: int = 5, renderer_name: str | None = None
) -> str:
    """Train an adapter to say one token more often; return its sampler path."""
    client = service.connect()
    metadata = {"renderer_name": renderer_name} if renderer_name else None
    training = client.create_lora_training_client(
        service.model, rank=4, seed=1, user_metadata=metadata
    ).result()
    data = [make_datum(number) for number in range(500, 508)]
    for datum in data:
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy().copy()
        targets[PROMPT_TOKENS - 1 :: 2] = favourite
        datum.loss_fn_inputs["target_tokens"] = tinker.TensorData.from_numpy(targets)
    for _ in range(steps):
        gradient = training.forward_backward(data, "cross_entropy")
        update = training.optim_step(tinker.AdamParams(learning_rate=1e-2))
        gradient.result()
        update.result()
    return training.save_weights_for_sampler(f"teacher-{favourite}").result().path
