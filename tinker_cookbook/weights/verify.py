"""Compare an exported model with the service that trained it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tinker

__all__ = ["Comparison", "compare_with_service"]

PROMPTS = ("The weather today is", "Question: What is 2 + 2?\nAnswer:", "My name is")
TOKENS_PER_REPLY = 48
REPLIES_PER_PROMPT = 2


@dataclass(frozen=True)
class Comparison:
    """How far an exported model is from the service's, on tokens that the service sampled."""

    kl: float
    """Estimate of KL(service || export), in nats per token, at least 0.

    The mean of exp(d) - 1 - d with d = log q - log p, where p is the service's and q the export's
    probability of a token sampled from p. Source: J. Schulman, "Approximating KL divergence" (k3).
    """
    max_difference: float
    """Largest absolute difference of the log probabilities, in nats."""
    num_tokens: int


def compare_with_service(
    client: tinker.SamplingClient, folder: str | Path, base_model: str | Path
) -> Comparison:
    """Sample from the service and score the samples with the exported model.

    Args:
        client: Samples from the checkpoint that was exported.
        folder: A merged model or a PEFT adapter. It runs in float32 through transformers.
        base_model: Folder of the base model, for an adapter.
    """
    import tinker

    path, base = Path(folder), Path(base_model)
    is_adapter = (path / "adapter_config.json").exists()
    tokenizer_folder = base if is_adapter else path
    params = tinker.SamplingParams(max_tokens=TOKENS_PER_REPLY, temperature=1.0, seed=0)
    waiting = []
    for tokens in _tokenize(tokenizer_folder):
        prompt = tinker.ModelInput.from_ints(tokens)
        waiting.append((tokens, client.sample(prompt, REPLIES_PER_PROMPT, params)))
    score = _Scorer(path, base if is_adapter else None)
    differences = []
    for tokens, future in waiting:
        for sequence in future.result().sequences:
            found = score(tokens, sequence.tokens)
            differences.append(found - np.asarray(sequence.logprobs, np.float64))
    d = np.concatenate(differences)
    return Comparison(float(np.mean(np.expm1(d) - d)), float(np.abs(d).max()), len(d))


def _tokenize(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.encode(text) for text in PROMPTS]


class _Scorer:
    """A model in transformers."""

    def __init__(self, folder: Path, base_model: Path | None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        source = folder if base_model is None else base_model
        self._model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        if base_model is not None:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._model, str(folder))
        self._model.eval()

    def __call__(self, prompt: Sequence[int], reply: Sequence[int]) -> np.ndarray:
        """Return the log probability of each token of the reply, float64 [T]."""
        import torch

        tokens = torch.tensor([[*prompt, *reply]])
        with torch.no_grad():
            logits = self._model(tokens).logits[0, len(prompt) - 1 : -1].double()
        logprobs = torch.log_softmax(logits, -1)
        return logprobs[torch.arange(len(reply)), torch.tensor(list(reply))].numpy()
