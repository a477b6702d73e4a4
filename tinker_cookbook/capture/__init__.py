"""Recording of agents: an endpoint that keeps the tokens and logprobs it sampled."""

from tinker_cookbook.capture.calls import RecordedCall, count_sequences
from tinker_cookbook.capture.endpoint import RecordingEndpoint
from tinker_cookbook.capture.program import ProgramOutcome, run_program
from tinker_cookbook.capture.rollout import Address, CallLimits, CallRefusedError, Rollout
from tinker_cookbook.capture.samplers import ClientSampler, PolicySampler, Sampler
from tinker_cookbook.capture.store import (
    CallDatabase,
    CallLog,
    CallStore,
    open_calls,
    read_calls,
)

__all__ = [
    "Address",
    "CallDatabase",
    "CallLimits",
    "CallLog",
    "CallRefusedError",
    "CallStore",
    "ClientSampler",
    "PolicySampler",
    "ProgramOutcome",
    "RecordedCall",
    "RecordingEndpoint",
    "Rollout",
    "Sampler",
    "count_sequences",
    "open_calls",
    "read_calls",
    "run_program",
]
