"""Requests and results that the service (HTTP, futures, store) and the engine (torch) exchange.

They are plain dataclasses over numpy arrays, importable without torch. The service builds them from
request bodies; the engine never sees JSON, protobuf or HTTP.

Axes: N tokens of a datum, P tokens of a prompt, T tokens of a completion, K targets or candidates
per position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from tinker_cookbook.local.engine.loss_graph import LossGraph

__all__ = [
    "AdamSpec",
    "ImageInput",
    "LogitRule",
    "LoraSpec",
    "LossSpec",
    "ModelInfo",
    "OnToken",
    "SampleResult",
    "SampleSpec",
    "SampledSequence",
    "SparseRows",
    "TokenLogprobs",
    "TrainDatum",
    "TrainResult",
]


@dataclass(frozen=True)
class ModelInfo:
    """A base model that the engine can train and sample from."""

    name: str
    """Name that clients use, e.g. `HuggingFaceTB/SmolLM2-135M-Instruct`."""
    folder: str
    """Local folder with config.json, weights and tokenizer files."""
    vocab_size: int
    max_context_length: int
    """Maximum tokens of prompt and completion together."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a completion if the request does not name stops."""
    supports_images: bool = False
    dtype: str = "float32"
    """Number format of its matrix products, such as `bfloat16`; sums are in float32."""
    device: str = "cpu"
    base_format: str = "full"
    """How its matrices are stored: `full`, `int8` or `int4`."""


@dataclass(frozen=True)
class LoraSpec:
    """Shape of a new adapter: `W' = W + (alpha / rank) * B @ A`."""

    rank: int = 32
    seed: int | None = None
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    alpha: float = 32.0
    dropout: float = 0.0
    """Share of each A's inputs that a training step drops, on attention and MLP."""


@dataclass(frozen=True)
class AdamSpec:
    """Settings of one AdamW step, as in torch.optim.AdamW (decoupled decay, bias correction)."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    """Maximum global norm of the adapter's gradient; 0 is off."""


@dataclass(frozen=True)
class ImageInput:
    """An image in a token sequence."""

    position: int
    """Index of its first token in the sequence."""
    data: bytes
    """Content of the image file."""
    format: str
    """Format of the file, such as `png`."""
    expected_tokens: int | None
    """Number of tokens that the sequence has for it; None if the sequence has none yet."""


@dataclass(frozen=True)
class SparseRows:
    """A CSR matrix [N, K]; cells that are not listed are 0."""

    values: np.ndarray
    crow_indices: np.ndarray
    col_indices: np.ndarray
    shape: tuple[int, int]


@dataclass(frozen=True)
class TrainDatum:
    """One training record; position i of every loss input belongs to input token i."""

    tokens: np.ndarray
    """int32 [N]; the positions of an image hold 0."""
    loss_inputs: dict[str, np.ndarray | SparseRows]
    """float32 or int64, [N] or [N, K]; `target_tokens` int64."""
    images: tuple[ImageInput, ...] = ()


@dataclass(frozen=True)
class LossSpec:
    """A loss and its settings, e.g. `LossSpec("ppo", {"clip_low_threshold": 0.8})`."""

    name: str
    config: dict[str, float | str] = field(default_factory=dict)
    graph: LossGraph | None = None
    """The computation of the loss `custom`; None for other losses."""


@dataclass
class TrainResult:
    """Result of a forward or forward_backward pass over one batch."""

    logprobs: list[np.ndarray]
    """Per datum: float32, in the shape of its `target_tokens` ([N] or [N, K])."""
    metrics: dict[str, float]
    """Keys are `NAME:REDUCTION`; `loss:sum` is always present."""


class LogitRule(Protocol):
    """Changes which tokens one completion may draw, and with which probabilities.

    The tokens are drawn from the changed logits. Their logprobs are still those of the model
    without the rule.
    """

    def change(self, logits_V: np.ndarray) -> None:
        """Change the float32 logits of the next token in place; -inf forbids a token.

        At least one token must stay possible. An error ends the request.
        """
        ...

    def add(self, token: int) -> None:
        """Take note of a drawn token. An error ends the request."""
        ...


@dataclass(frozen=True)
class SampleSpec:
    """A sampling request: one prompt and `num_samples` completions."""

    prompt: np.ndarray
    """int32 [P]."""
    num_samples: int = 1
    max_tokens: int | None = None
    """Maximum tokens per completion; None: up to the context length."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_k: int = -1
    """Number of most likely tokens to draw from; -1 is off."""
    top_p: float = 1.0
    """Probability mass of the most likely tokens to draw from; 1 is off."""
    seed: int | None = None
    """A request with a seed always gets the same tokens; None draws a new seed."""
    stop: Sequence[str] | Sequence[int] | None = None
    """Stop strings or token ids. None: the model's end-of-sequence tokens; empty: never stop."""
    prompt_logprobs: bool = False
    """Whether the logprob of every prompt token is requested."""
    prompt_logprobs_last_n: int | None = None
    """Score only this many tokens at the end of the prompt; None: all."""
    topk_prompt_logprobs: int = 0
    """Number of most likely tokens to return per prompt position."""
    topk_sample_logprobs: int = 0
    """Number of most likely tokens to return per sampled token."""
    prompt_alt_tokens_k: int = 0
    """Number of alternatives to draw per prompt position."""
    target_prompt_logprobs: np.ndarray | SparseRows | None = None
    """Token ids to score, int64 [P - 1, K]: row i at prompt position i + 1; -1 is an empty cell."""
    images: tuple[ImageInput, ...] = ()
    new_rule: Callable[[], LogitRule] | None = None
    """Makes the rule of one completion, on the engine's thread; None for no rule."""


OnToken = Callable[..., None]
"""Listener of a sampling request; the engine thread calls it for every token as it is drawn.

Its arguments are (number of the completion, token, logprob) and, if top-k logprobs were requested,
a fourth: (ids int32 [k], logprobs float32 [k]). It must return quickly.
"""


@dataclass(frozen=True)
class TokenLogprobs:
    """The k most likely tokens at each of L positions, best first."""

    token_ids: np.ndarray
    """int32 [L, k]."""
    logprobs: np.ndarray
    """float32 [L, k]; a position without a value holds token 0 and -99999.0 in its first cell."""


@dataclass
class SampledSequence:
    """One completion. If a stop token ended it, that is its last token."""

    tokens: np.ndarray
    """int32 [T]."""
    logprobs: np.ndarray
    """float32 [T], before rules, temperature, top_k and top_p."""
    stop_reason: Literal["stop", "length"]
    topk_logprobs: TokenLogprobs | None = None


@dataclass
class SampleResult:
    """All completions of one request, and the requested scores of its prompt."""

    sequences: list[SampledSequence]
    prompt_logprobs: np.ndarray | None = None
    """float32 [P]; NaN for tokens without one, such as the first."""
    topk_prompt_logprobs: TokenLogprobs | None = None
    target_prompt_logprobs: np.ndarray | SparseRows | None = None
    prompt_alt_tokens: TokenLogprobs | None = None
    prompt_cache_hit_tokens: int = 0
    """Prompt tokens that were copied from the KV cache instead of computed."""
