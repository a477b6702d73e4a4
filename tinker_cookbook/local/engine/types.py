"""What crosses the seam between the service (HTTP, futures, store) and the engine (torch).

Plain dataclasses over numpy, importable without torch. The service builds them from the wire types,
the engine never sees JSON, protobuf or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tinker_cookbook.local.engine.loss_graph import LossGraph

__all__ = [
    "AdamSpec",
    "ImageInput",
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
    """A base model the engine can train and sample."""

    name: str
    """The name clients use, e.g. `HuggingFaceTB/SmolLM2-135M-Instruct`."""
    folder: str
    """Local folder with config.json, weights and tokenizer files."""
    vocab_size: int
    max_context_length: int
    """Tokens of prompt and completion together."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a completion when the request names no stop of its own."""
    supports_images: bool = False
    dtype: str = "float32"
    """Number format of its matrix products, such as `bfloat16`; sums are kept in float32."""
    device: str = "cpu"


@dataclass(frozen=True)
class LoraSpec:
    """Shape of a new adapter. `W' = W + (alpha / rank) * B @ A` with alpha 32."""

    rank: int = 32
    seed: int | None = None
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    alpha: float = 32.0


@dataclass(frozen=True)
class AdamSpec:
    """One AdamW step, as torch.optim.AdamW defines it (decoupled weight decay, bias correction)."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    """Global norm limit over the adapter's gradient; 0 is off."""


@dataclass(frozen=True)
class ImageInput:
    """An image that stands at `position` in the token sequence."""

    position: int
    data: bytes
    format: str
    expected_tokens: int | None


@dataclass(frozen=True)
class SparseRows:
    """A CSR matrix [N, K]; entries that are not listed are 0."""

    values: np.ndarray
    crow_indices: np.ndarray
    col_indices: np.ndarray
    shape: tuple[int, int]


@dataclass(frozen=True)
class TrainDatum:
    """One training record; position i of every loss input belongs to input token i."""

    tokens: np.ndarray
    """int32 [N]; positions of an image hold 0."""
    loss_inputs: dict[str, np.ndarray | SparseRows]
    """float32 or int64, [N] or [N, K]; `target_tokens` int64."""
    images: tuple[ImageInput, ...] = ()


@dataclass(frozen=True)
class LossSpec:
    """Loss name and its settings, e.g. `LossSpec("ppo", {"clip_low_threshold": 0.8})`."""

    name: str
    config: dict[str, float | str] = field(default_factory=dict)
    graph: LossGraph | None = None
    """What `custom` computes."""


@dataclass
class TrainResult:
    """Result of forward or forward_backward over one batch."""

    logprobs: list[np.ndarray]
    """Per datum: float32, the shape of its `target_tokens` ([N] or [N, K])."""
    metrics: dict[str, float]
    """Keys are `name:reduction`; `loss:sum` is always present."""


@dataclass(frozen=True)
class SampleSpec:
    """A sampling request: one prompt, `num_samples` completions."""

    prompt: np.ndarray
    """int32 [P]."""
    num_samples: int = 1
    max_tokens: int | None = None
    """None: up to the context length."""
    temperature: float = 1.0
    top_k: int = -1
    """-1 is off."""
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] | Sequence[int] | None = None
    """None: the model's end-of-sequence tokens; empty: no stop at all; else only these."""
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_alt_tokens_k: int = 0
    target_prompt_logprobs: np.ndarray | SparseRows | None = None
    """int64 [P - 1, K] token ids; row i is scored at prompt position i + 1. -1: an empty cell."""
    images: tuple[ImageInput, ...] = ()


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
    """One completion. A stop token, where one ended it, is the last token."""

    tokens: np.ndarray
    """int32 [T]."""
    logprobs: np.ndarray
    """float32 [T]: of the model itself, before temperature, top_k and top_p."""
    stop_reason: Literal["stop", "length"]
    topk_logprobs: TokenLogprobs | None = None


@dataclass
class SampleResult:
    """All completions of one request and what was asked about its prompt."""

    sequences: list[SampledSequence]
    prompt_logprobs: np.ndarray | None = None
    """float32 [P]; NaN where there is none (the first position always)."""
    topk_prompt_logprobs: TokenLogprobs | None = None
    target_prompt_logprobs: np.ndarray | SparseRows | None = None
    prompt_alt_tokens: TokenLogprobs | None = None
    prompt_cache_hit_tokens: int = 0
