"""The metrics page in the text format of Prometheus.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from tinker_cookbook.local.service.state.service_metrics import Durations, Labels

if TYPE_CHECKING:
    from tinker_cookbook.local.service.state.core import Service

__all__ = ["CONTENT_TYPE", "VERSION", "render_metrics"]

VERSION = version("tinker-cookbook")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Samples = Iterable[tuple[Labels, float]]


def render_metrics(service: Service) -> str:
    """Return all metrics of the service in the text format."""
    counted = service.metrics
    page = _Page()
    page.add("tinker_info", "gauge", "1", [((("version", VERSION),), 1)])
    formats = [
        ((("model", name), ("dtype", info.dtype), ("device", info.device)), 1)
        for name, info in service.engine.loaded_models().items()
    ]
    page.add("tinker_model_info", "gauge", "Loaded models and their number format", formats)
    page.add(
        "tinker_uptime_seconds",
        "gauge",
        "Time since the start",
        _one(time.time() - service.started_at),
    )
    page.add("tinker_http_requests", "counter", "HTTP requests", counted.requests.items())
    page.add_histogram(
        "tinker_http_request_seconds", "Time until the answer begins", counted.request_seconds
    )
    page.add("tinker_operations", "counter", "Finished operations", counted.operations.items())
    page.add_histogram(
        "tinker_operation_seconds", "Time from the start to the result", counted.operation_seconds
    )
    engine = service.engine_stats()
    _add_queues(page, service, engine)
    _add_work(page, service, engine)
    _add_memory(page, service, engine)
    return page.text()


class _Page:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, kind: str, text: str, samples: Samples) -> None:
        suffix = "_total" if kind == "counter" else ""
        self._head(name + suffix, kind, text)
        self._lines += [_line(name + suffix, labels, value) for labels, value in samples]

    def add_histogram(self, name: str, text: str, durations: Durations) -> None:
        self._head(name, "histogram", text)
        self._lines += [
            _line(name + suffix, labels, value) for suffix, labels, value in durations.samples()
        ]

    def _head(self, name: str, kind: str, text: str) -> None:
        self._lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]

    def text(self) -> str:
        return "\n".join([*self._lines, ""])


def _add_queues(page: _Page, service: Service, engine: Mapping[str, float]) -> None:
    futures = service.futures.stats()
    lengths = {
        "engine": engine.get("queued_operations", 0.0),
        "sampling_waiting": engine.get("waiting_requests", 0.0),
        "sampling_running": engine.get("running_sequences", 0.0),
        "out_of_order": float(sum(run.gate.num_held for run in service.runs.values())),
        "unfinished": futures["futures_unfinished"],
        "streams": float(service.num_streams),
    }
    samples = [((("queue", name),), value) for name, value in lengths.items()]
    page.add("tinker_queue_length", "gauge", "Waiting or running work, by kind", samples)
    page.add(
        "tinker_results_kept", "gauge", "Results that clients can read", _one(futures["futures"])
    )


def _add_work(page: _Page, service: Service, engine: Mapping[str, float]) -> None:
    page.add("tinker_runs", "gauge", "Training runs in memory", _one(len(service.runs)))
    page.add("tinker_samplers", "gauge", "Sampling sessions", _one(len(service.samplers)))
    page.add("tinker_sessions", "gauge", "Active sessions", _one(len(service.sessions)))
    page.add("tinker_models_loaded", "gauge", "Base models", _one(engine.get("models", 0.0)))
    counters = {
        "optimizer_steps": ("Optimizer steps", service.progress.num_steps),
        "trained_tokens": (
            "Tokens of forward_backward requests",
            service.progress.num_trained_tokens,
        ),
        "prompt_tokens": ("Prompt tokens computed", engine.get("prompt_tokens", 0.0)),
        "sampled_tokens": ("Tokens sampled", engine.get("sampled_tokens", 0.0)),
        "sampling_seconds": (
            "Time that the engine spent sampling",
            engine.get("sampling_seconds", 0.0),
        ),
    }
    for name, (text, value) in counters.items():
        page.add(f"tinker_{name}", "counter", text, _one(value))


def _add_memory(page: _Page, service: Service, engine: Mapping[str, float]) -> None:
    results = service.futures.stats()["futures_result_bytes"]
    page.add("tinker_result_bytes", "gauge", "Memory of the kept results", _one(results))
    cache = engine.get("kv_cache_bytes", 0.0)
    page.add("tinker_kv_cache_bytes", "gauge", "Memory of the KV cache", _one(cache))
    page.add(
        "process_resident_memory_bytes",
        "gauge",
        "Memory of the process (RSS)",
        _one(service.resident_bytes()),
    )
    page.add(
        "process_start_time_seconds",
        "gauge",
        "Start of the process in Unix time",
        _one(service.started_at),
    )


def _one(value: float) -> Samples:
    return [((), value)]


def _line(name: str, labels: Labels, value: float) -> str:
    shown = ",".join(f'{key}="{_escape(text)}"' for key, text in labels)
    return f"{name}{{{shown}}} {value:.15g}" if shown else f"{name} {value:.15g}"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
