"""Log probabilities of completions under the reference model, computed once per completion.

The reference is the model that the run started from: the base model, or the weights of
`load_checkpoint_path`. It is a second training client that never takes an optimizer step, so its
numbers come from the same forward pass as the policy's and agree with them exactly at step 0. It is
built from the original weights after a resume, too.

Results are stored in the run directory. Later epochs and resumed runs read them from there.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.preference.pair_gradients import sequence_logprobs
from tinker_cookbook.utils.jsonl_log import append_row, read_rows

if TYPE_CHECKING:
    import tinker

__all__ = ["REFERENCE_FILE", "ReferenceScorer"]

REFERENCE_FILE = "reference_logprobs.jsonl"
"""File in the run directory with one object per completion: key and logprob."""


class ReferenceScorer:
    """Scores datums with the reference model; remembers what it has scored."""

    def __init__(self, client: tinker.TrainingClient, folder: str | Path, identity: str) -> None:
        """Read what earlier starts of the run have scored.

        Args:
            client: The reference model; nothing else trains it.
            folder: The run directory.
            identity: Names the reference model, so that scores of another one are not used.
        """
        self.num_scored = 0
        """Completions that the service has scored for this object."""
        self._client = client
        self._identity = identity
        self._path = Path(folder) / REFERENCE_FILE
        self._known = {row["key"]: float(row["logprob"]) for row in read_rows(self._path)}

    async def score(self, data: Sequence[tinker.Datum]) -> np.ndarray:
        """Return the sequence log probability of each datum, float64 [N]."""
        keys = [self._key(datum) for datum in data]
        missing = dict(zip(keys, data, strict=True))
        missing = {key: datum for key, datum in missing.items() if key not in self._known}
        if missing:
            output = await self._client.forward(list(missing.values()), "cross_entropy")
            found = sequence_logprobs(
                list(missing.values()), [o["logprobs"] for o in output.loss_fn_outputs]
            )
            scores = dict(zip(missing, found.tolist(), strict=True))
            await asyncio.to_thread(self._append, scores)
            self._known |= scores
            self.num_scored += len(scores)
        return np.array([self._known[key] for key in keys])

    def _key(self, datum: tinker.Datum) -> str:
        """Return a digest of the reference model, the tokens and their weights."""
        digest = hashlib.sha256(self._identity.encode())
        digest.update(np.asarray(datum.model_input.to_ints(), np.int64).tobytes())
        for name in ("target_tokens", "weights"):
            digest.update(datum.loss_fn_inputs[name].to_numpy().tobytes())
        return digest.hexdigest()

    def _append(self, scores: dict[str, float]) -> None:
        for key, value in scores.items():
            append_row(self._path, {"key": key, "logprob": value})
