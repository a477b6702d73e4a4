"""The progress display of a run: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

__all__ = ["SUPERVISED_NUMBERS", "ProgressReporter", "ShownNumbers", "format_seconds"]

LINE_SECONDS = 2.0
RATE_STEPS = 20
ShownNumbers = tuple[tuple[str, str, str], ...]
"""Label, key and format of each metric in the progress display."""
SUPERVISED_NUMBERS: ShownNumbers = (
    ("loss", "train_mean_nll", ".4f"),
    ("held-out", "test/nll", ".4f"),
    ("lr", "learning_rate", ".1e"),
)


class ProgressReporter:
    """Reports finished steps with loss, tokens per second and the time left."""

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        stream: TextIO | None = None,
        shown: ShownNumbers = SUPERVISED_NUMBERS,
    ) -> None:
        self._shown = shown
        self._total = total_steps
        self._done = start_step
        self._stream = stream or sys.stderr
        self._history: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=RATE_STEPS)
        self._tokens = 0
        self._last_line = float("-inf")
        self._bar = self._open_bar() if self._stream.isatty() else None

    def step(self, metrics: Mapping[str, float]) -> None:
        """Report one more finished step."""
        self._done += 1
        self._tokens += int(metrics.get("num_tokens", 0))
        self._history.append((time.monotonic(), self._tokens))
        if self._bar is not None:
            self._bar.set_postfix_str(self._numbers(metrics), refresh=False)
            self._bar.update(1)
            return
        now = time.monotonic()
        worth_a_line = self._done == self._total or any(key.startswith("test/") for key in metrics)
        if worth_a_line or now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            left = (
                "" if self._done == self._total else f"  {format_seconds(self.seconds_left())} left"
            )
            print(
                f"step {self._done}/{self._total}  {self._numbers(metrics)}{left}",
                file=self._stream,
                flush=True,
            )

    def message(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Close the bar, which stays visible."""
        if self._bar is not None:
            self._bar.close()

    def tokens_per_second(self) -> float:
        """Return the rate over the last steps."""
        (first_time, first_tokens), (last_time, last_tokens) = self._history[0], self._history[-1]
        return (last_tokens - first_tokens) / max(last_time - first_time, 1e-9)

    def seconds_left(self) -> float:
        """Estimate the remaining time from the last steps."""
        (first_time, _), (last_time, _) = self._history[0], self._history[-1]
        per_step = (last_time - first_time) / max(len(self._history) - 1, 1)
        return per_step * (self._total - self._done)

    def _numbers(self, metrics: Mapping[str, float]) -> str:
        shown = [
            f"{label} {metrics[key]:{spec}}"
            for label, key, spec in self._shown
            if isinstance(metrics.get(key), float)
        ]
        return "  ".join([*shown, f"{self.tokens_per_second():.0f} tokens/s"])

    def _open_bar(self) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self._total,
            initial=self._done,
            file=self._stream,
            unit="step",
            dynamic_ncols=True,
        )


def format_seconds(seconds: float) -> str:
    """Return a duration such as `1m 15s`."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {secs:02d}s" if minutes else f"{secs}s"
