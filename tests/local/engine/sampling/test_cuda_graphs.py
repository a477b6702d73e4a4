"""When steps are recorded, replayed and dropped; stand-ins for torch's classes need no GPU."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator

import pytest
import torch

from tinker_cookbook.local.engine.sampling.cuda_graphs import StepGraphs

REAL_CAPTURE = inspect.signature(torch.cuda.graph.__init__)


class Stream:
    def __init__(self, device: torch.device | None = None) -> None: ...
    def wait_stream(self, stream: Stream) -> None: ...


class Graph:
    num_replays = 0
    fails = False

    def replay(self) -> None:
        Graph.num_replays += 1


@contextlib.contextmanager
def capture(graph: Graph, **options: object) -> Iterator[None]:
    """Accept what torch accepts."""
    REAL_CAPTURE.bind(None, graph, **options)
    yield
    if Graph.fails:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> StepGraphs:
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(Graph, "num_replays", 0)
    monkeypatch.setattr(Graph, "fails", False)
    return StepGraphs(torch.device("cuda"))


def test_the_third_step_of_a_shape_is_recorded(graphs: StepGraphs) -> None:
    calls: list[int] = []
    seen = []
    for _ in range(5):
        graphs.run((1,), lambda: calls.append(1), ())
        seen.append((len(calls), Graph.num_replays, len(graphs)))
    # the third step is computed once more where it is recorded, then recorded, then replayed
    assert seen == [(1, 0, 0), (2, 0, 0), (4, 1, 1), (4, 2, 1), (4, 3, 1)]
    graphs.clear()
    graphs.run((1,), lambda: calls.append(1), ())
    assert (len(calls), Graph.num_replays, len(graphs)) == (5, 3, 0)


def test_the_number_of_records_is_bounded(graphs: StepGraphs) -> None:
    for number in range(100):
        for _ in range(4):
            graphs.run((number,), lambda: None, ())
            graphs.run((0,), lambda: None, ())
    assert len(graphs) == 48
    before = Graph.num_replays
    for number in (0, 99, 60):
        graphs.run((number,), lambda: None, ())
    assert Graph.num_replays == before + 3  # the one used most often is still there


def test_a_failed_record_is_reported_once(
    graphs: StepGraphs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graph, "fails", True)
    calls: list[int] = []
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            graphs.run((1,), lambda: calls.append(1), ())
    assert len(caplog.records) == 1
    assert "not permitted when stream is capturing" in caplog.text
    assert Graph.num_replays == len(graphs) == 0
    assert len(calls) >= 6  # every step was computed
