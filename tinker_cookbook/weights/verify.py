"""Compare an exported model with the service that trained it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tinker_cookbook.weights.gguf import convert_base, find_gguf
from tinker_cookbook.weights.gguf_model import GgufModel

if TYPE_CHECKING:
    import tinker

__all__ = ["Comparison", "Scorer", "compare_with_service", "open_scorer", "score_reply"]

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
    num_greedy: int
    """Number of greedy replies of the service that the export also gives, token by token."""
    num_prompts: int


class Scorer(Protocol):
    """A model that scores given tokens."""

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits after each token, float [T, vocabulary]."""
        ...


def compare_with_service(
    client: tinker.SamplingClient, folder: str | Path, base_model: str | Path
) -> Comparison:
    """Sample from the service and score the samples with the exported model.

    Args:
        client: Samples from the checkpoint that was exported.
        folder: The export: a merged model or a PEFT adapter, which run in float32 through
            transformers, or a GGUF file, which runs through llama.cpp.
        base_model: Folder of the base model, for an adapter and for its tokenizer.
    """
    import tinker

    sampled = tinker.SamplingParams(max_tokens=TOKENS_PER_REPLY, temperature=1.0, seed=0)
    greedy = tinker.SamplingParams(max_tokens=TOKENS_PER_REPLY, temperature=0.0)
    waiting = []
    for tokens in _tokenize(Path(base_model)):
        prompt = tinker.ModelInput.from_ints(tokens)
        samples = client.sample(prompt, REPLIES_PER_PROMPT, sampled)
        waiting.append((tokens, samples, client.sample(prompt, 1, greedy)))
    differences, num_greedy = [], 0
    with open_scorer(folder, base_model) as scorer:
        for tokens, samples, best in waiting:
            for sequence in samples.result().sequences:
                found, _ = score_reply(scorer, tokens, sequence.tokens)
                differences.append(found - np.asarray(sequence.logprobs, np.float64))
            reply = best.result().sequences[0].tokens
            num_greedy += score_reply(scorer, tokens, reply)[1]
    d = np.concatenate(differences)
    kl = float(np.mean(np.expm1(d) - d))
    return Comparison(kl, float(np.abs(d).max()), len(d), num_greedy, len(waiting))


def score_reply(
    scorer: Scorer, prompt: Sequence[int], reply: Sequence[int]
) -> tuple[np.ndarray, bool]:
    """Return the log probability of each token of a reply, and whether all are the likeliest.

    If they are, the model's own greedy reply is this one.
    """
    logits = scorer.logits([*prompt, *reply])[len(prompt) - 1 : -1].astype(np.float64)
    tokens = np.asarray(reply)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logprobs[np.arange(len(tokens)), tokens], bool((logits.argmax(-1) == tokens).all())


def _tokenize(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.encode(text) for text in PROMPTS]


@contextlib.contextmanager
def open_scorer(folder: str | Path, base_model: str | Path) -> Iterator[Scorer]:
    """Load an export. A GGUF adapter is loaded next to the base model, converted for this."""
    file = find_gguf(folder)
    if file is None:
        is_adapter = (Path(folder) / "adapter_config.json").exists()
        yield _Transformers(Path(folder), Path(base_model) if is_adapter else None)
    elif not file.stem.rpartition("-")[0].endswith("-adapter"):
        with GgufModel(file) as model:
            yield model
    else:
        with tempfile.TemporaryDirectory(prefix="tinker-export-") as scratch:
            base = convert_base(base_model, Path(scratch) / "base.gguf")
            with GgufModel(base, adapter=file) as model:
                yield model


class _Transformers:
    """A model in transformers, in float32."""

    def __init__(self, folder: Path, base_model: Path | None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        source = folder if base_model is None else base_model
        self._model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        if base_model is not None:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._model, str(folder))
        self._model.eval()

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        import torch

        with torch.no_grad():
            return self._model(torch.tensor([list(tokens)])).logits[0].numpy()
