"""Counters and histograms of the service."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

__all__ = ["Durations", "Labels", "Metrics"]

BUCKETS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)
"""Upper bounds of a histogram's buckets, in seconds."""
Labels = tuple[tuple[str, str], ...]


class Durations:
    """Histograms of durations, one for each set of labels."""

    def __init__(self) -> None:
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def add(self, labels: Labels, seconds: float) -> None:
        counts = self._counts.setdefault(labels, [0] * (len(BUCKETS) + 1))
        counts[sum(seconds > bound for bound in BUCKETS)] += 1
        self._sums[labels] = self._sums.get(labels, 0.0) + seconds

    def samples(self) -> Iterator[tuple[str, Labels, float]]:
        """Yield suffix of the name, labels and value: cumulative buckets, then sum and count."""
        for labels, counts in self._counts.items():
            total = 0
            for bound, count in zip((*map(str, BUCKETS), "+Inf"), counts, strict=True):
                total += count
                yield "_bucket", (*labels, ("le", bound)), total
            yield "_sum", labels, self._sums[labels]
            yield "_count", labels, total


class Metrics:
    """What is counted when it happens. Other metrics are computed when the page is requested."""

    def __init__(self) -> None:
        self.requests: Counter[Labels] = Counter()
        self.request_seconds = Durations()
        self.operations: Counter[Labels] = Counter()
        self.operation_seconds = Durations()

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        labels = (("method", method), ("route", route), ("status", str(status)))
        self.requests[labels] += 1
        self.request_seconds.add((("route", route),), seconds)

    def count_operation(self, kind: str, outcome: str, seconds: float) -> None:
        self.operations[(("kind", kind), ("outcome", outcome))] += 1
        self.operation_seconds.add((("kind", kind),), seconds)
