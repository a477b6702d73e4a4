"""The JSON request bodies of the Tinker API: every field with its type, default and limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np

from tinker_cookbook.local.engine.types import AdamSpec, LoraSpec
from tinker_cookbook.local.limits import INT32, MAX_INT32, RANK, SAMPLING, Range
from tinker_cookbook.local.service.protocol.json_body import JsonObject
from tinker_cookbook.local.service.protocol.paths import check_name, check_ttl
from tinker_cookbook.local.service.protocol.stops import STOPS
from tinker_cookbook.local.service.protocol.token_arrays import INTEGERS
from tinker_cookbook.local.service.protocol.typed_body import AtMost

__all__ = [
    "CLONE_STRIDE",
    "AdamParams",
    "AssignProject",
    "CancelFuture",
    "CopyWeights",
    "CreateCustomLoss",
    "CreateModel",
    "CreateSamplingSession",
    "CreateSession",
    "ExchangeTicket",
    "FinishSession",
    "GetInfo",
    "Heartbeat",
    "JoinSamplingSession",
    "LoadIntoRun",
    "LoadWeights",
    "LoraConfig",
    "NativeSamplingParams",
    "NewRun",
    "NumberedRequest",
    "OptimStep",
    "RetrieveFuture",
    "RetrieveFutures",
    "Sample",
    "SampleRequest",
    "SamplingParams",
    "SaveWeights",
    "SaveWeightsExternal",
    "Saving",
    "SearchCursor",
    "SearchSessions",
    "SetExpiry",
    "StatusQuery",
    "TargetTokens",
    "UploadedGraph",
    "UseWeights",
    "WeightsInfo",
]

CLONE_STRIDE = 1_000_000_000
"""The SDK numbers the samples of the nth copy of a sampling client from n times this."""
MAX_RETRIEVED = 100_000
"""Maximum number of results that a poll may report as received."""

RunSeqId = Annotated[int, Range(1, MAX_INT32)]
"""Number of a request within a training run."""
SeqId = Annotated[int, INT32]
"""Number of a run, a sampling session or a loss within its session."""
Name = Annotated[str, check_name]
Ttl = Annotated[int | None, check_ttl]
AtLeastZero = Annotated[float, Range(0)]
Below1 = Annotated[float, Range(0, 1, excludes_highest=True)]

# --- sessions ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CreateSession:
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None
    tags: list[str] = field(default_factory=list)
    project_id: str | None = None
    sdk_version: str | None = None


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    session_id: str


@dataclass(frozen=True, kw_only=True)
class FinishReason:
    type: Literal["success", "errored", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class FinishSession:
    reason: FinishReason = FinishReason(type="success")
    detail: str | None = None


@dataclass(frozen=True, kw_only=True)
class AssignProject:
    project_id: str


@dataclass(frozen=True, kw_only=True)
class Owner:
    type: Literal["own", "accessible", "user"]
    owner_urns: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class StatusQuery:
    """A status, with the reasons that fit; None: any reason."""

    type: str
    reasons: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class SearchCursor:
    last_created_at: str
    last_session_id: str


@dataclass(frozen=True, kw_only=True)
class SearchSessions:
    session_id: str | None = None
    display_name: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = field(default_factory=dict)
    owner: Owner = Owner(type="own")
    statuses: list[StatusQuery] | None = None
    cursor: SearchCursor | None = None
    limit: Annotated[int, Range(1, 200)] = 50


@dataclass(frozen=True, kw_only=True)
class ExchangeTicket:
    ticket: str


# --- training runs ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NumberedRequest:
    """What every numbered request of a training run holds."""

    model_id: str
    seq_id: RunSeqId


@dataclass(frozen=True, kw_only=True)
class NewRun:
    """What every request that creates a training run holds."""

    session_id: str
    model_seq_id: SeqId
    user_metadata: dict[str, str] | None = None
    optimizer_config: JsonObject | None = None


@dataclass(frozen=True, kw_only=True)
class CreateModel(NewRun):
    base_model: str
    lora_config: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoadWeights(NewRun):
    path: str
    optimizer: bool
    base_model: str | None = None


@dataclass(frozen=True, kw_only=True)
class LoadIntoRun(NumberedRequest):
    """The older form of `LoadWeights`: replace the weights of an existing run."""

    path: str
    optimizer: bool


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    refuses_unknown: ClassVar[bool] = True
    rank: Annotated[int, RANK] = LoraSpec.rank
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


@dataclass(frozen=True, kw_only=True)
class GetInfo:
    model_id: str


@dataclass(frozen=True, kw_only=True)
class OptimStep:
    """One of the two objects holds the optimizer's settings; `adam_params` wins."""

    adam_params: JsonObject = field(default_factory=dict)
    optimizer_params: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AdamParams:
    refuses_unknown: ClassVar[bool] = True
    learning_rate: AtLeastZero = AdamSpec.learning_rate
    beta1: Below1 = AdamSpec.beta1
    beta2: Below1 = AdamSpec.beta2
    eps: AtLeastZero = AdamSpec.eps
    weight_decay: AtLeastZero = AdamSpec.weight_decay
    grad_clip_norm: AtLeastZero = AdamSpec.grad_clip_norm
    type: object = None
    """Ignored: `optimizer_params.type` chooses the optimizer."""


@dataclass(frozen=True, kw_only=True)
class CreateCustomLoss:
    session_id: str
    custom_loss_seq_id: SeqId


@dataclass(frozen=True, kw_only=True)
class UploadedGraph:
    """The loss itself; `engine.loss_graph` checks its inputs and its graph."""

    name: str
    inputs: object = None
    graph: object = None


# --- weights ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What every request that saves weights holds."""

    ttl_seconds: Ttl = None
    user_metadata: dict[str, str] | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class SaveWeights(Saving):
    path: Name | None = None
    """Name of the checkpoint. The default is the number of the request."""


@dataclass(frozen=True, kw_only=True)
class UseWeights:
    """The form of `save_weights_for_sampler` that saves nothing.

    A sampling session of this number uses the weights directly.
    """

    sampling_session_seq_id: SeqId
    kind: Literal["snapshot", "inflight"] = "snapshot"


@dataclass(frozen=True, kw_only=True)
class SaveWeightsExternal(Saving):
    path: Name
    age_encryption_recipients: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SetExpiry:
    ttl_seconds: Ttl = None


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    tinker_path: str


@dataclass(frozen=True, kw_only=True)
class CopyWeights:
    source_path: str
    ttl_seconds: Ttl = None
    destination_project_id: str | None = None


# --- sampling ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CreateSamplingSession:
    session_id: str
    sampling_session_seq_id: SeqId
    base_model: str | None = None
    model_path: str | None = None


@dataclass(frozen=True, kw_only=True)
class JoinSamplingSession:
    sampling_session_id: str


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """The address of a sample request; `Sample` is its content."""

    sampling_session_id: str
    seq_id: Annotated[int, Range(0, 2**63 - 1)]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The sampling settings that this API and the OpenAI API have in common."""

    max_tokens: Annotated[int, SAMPLING["max_tokens"]] | None = None
    """Maximum length of a completion; None: up to the context length."""
    temperature: Annotated[float, SAMPLING["temperature"]] = 1.0
    top_k: Annotated[int, SAMPLING["top_k"]] = -1
    top_p: Annotated[float, SAMPLING["top_p"]] = 1.0
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class NativeSamplingParams(SamplingParams):
    refuses_unknown: ClassVar[bool] = True
    stop: Annotated[list[str] | list[int], STOPS] | None = None


@dataclass(frozen=True, kw_only=True)
class TargetTokens:
    """Token ids whose logprobs are asked for, as a dense or a sparse (CSR) int64 tensor."""

    dtype: Literal["int64"]
    data: Annotated[np.ndarray, INTEGERS]
    shape: Annotated[np.ndarray, INTEGERS] | None = None
    sparse_crow_indices: Annotated[np.ndarray, INTEGERS] | None = None
    sparse_col_indices: Annotated[np.ndarray, INTEGERS] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    chunks: list[object]


@dataclass(frozen=True, kw_only=True)
class Sample:
    prompt: ModelInput
    sampling_params: NativeSamplingParams = NativeSamplingParams()
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    num_samples: Annotated[int, SAMPLING["num_samples"]] = 1
    topk_prompt_logprobs: Annotated[int, SAMPLING["topk_prompt_logprobs"]] = 0
    topk_sample_logprobs: Annotated[int, SAMPLING["topk_sample_logprobs"]] = 0
    prompt_alt_tokens_k: Annotated[int, SAMPLING["prompt_alt_tokens_k"]] = 0
    target_prompt_logprobs: TargetTokens | None = None


@dataclass(frozen=True, kw_only=True)
class RetrieveFuture:
    request_id: str


@dataclass(frozen=True, kw_only=True)
class CancelFuture:
    request_id: str


@dataclass(frozen=True, kw_only=True)
class FuturesTarget:
    type: Literal["sampling_session"]
    sampling_session_id: str
    cloned_sampler_id: Annotated[int, Range(0, CLONE_STRIDE)] = 0


@dataclass(frozen=True, kw_only=True)
class RetrieveFutures:
    target: FuturesTarget
    timeout: AtLeastZero = math.inf
    prev_cursor: Annotated[int, Range(0, 2**63 - 1)] = 0
    retrieved_request_ids: Annotated[list[str], AtMost(MAX_RETRIEVED)] = field(default_factory=list)
