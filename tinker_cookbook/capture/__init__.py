"""Recording of agents: an endpoint that keeps the tokens and logprobs it sampled."""

from tinker_cookbook.capture.calls import RecordedCall, count_sequences
from tinker_cookbook.capture.endpoint import RecordingEndpoint
from tinker_cookbook.capture.exporter import CaptureExporter, CaptureSink, JsonlFileSink
from tinker_cookbook.capture.instrument import instrument_tinker, uninstrument_tinker
from tinker_cookbook.capture.program import ProgramOutcome, run_in_sandbox, run_program
from tinker_cookbook.capture.rollout import Address, CallLimits, CallRefusedError, Rollout
from tinker_cookbook.capture.samplers import ClientSampler, PolicySampler, Sampler
from tinker_cookbook.capture.scope import RESERVED_KEYS, capture, current_scope
from tinker_cookbook.capture.store import (
    CallDatabase,
    CallLog,
    CallStore,
    open_calls,
    read_calls,
)

__all__ = [
    "RESERVED_KEYS",
    "Address",
    "CallDatabase",
    "CallLimits",
    "CallLog",
    "CallRefusedError",
    "CallStore",
    "CaptureExporter",
    "CaptureSink",
    "ClientSampler",
    "JsonlFileSink",
    "PolicySampler",
    "ProgramOutcome",
    "RecordedCall",
    "RecordingEndpoint",
    "Rollout",
    "Sampler",
    "capture",
    "count_sequences",
    "current_scope",
    "instrument_tinker",
    "open_calls",
    "read_calls",
    "run_in_sandbox",
    "run_program",
    "uninstrument_tinker",
]
