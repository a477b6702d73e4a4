"""Reduce a curve to what a screen can show: the extremes of each part, and means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

__all__ = ["Curve", "thin_curve"]

SIGNIFICANT_DIGITS = 6


class Curve(TypedDict):
    """A reduced curve; all lists are ordered by step."""

    x: list[int]
    """Steps of the points: at most two per part, its lowest and its highest one."""
    y: list[float]
    mean_x: list[float]
    """Mean step of each part."""
    mean_y: list[float]
    count: list[int]
    """Number of points of each part; all 1 for a short curve."""
    total: int
    """Number of points of the whole curve."""


def thin_curve(steps: np.ndarray, values: np.ndarray, parts: int) -> Curve:
    """Reduce a curve to at most `2 * parts` points, without losing its extremes.

    Args:
        steps: int [N], rising.
        values: float [N], finite.
        parts: Number of equal intervals of steps; a curve with at most `2 * parts` points is
            returned whole.
    """
    if len(steps) <= 2 * parts:
        xs, ys = steps.tolist(), _round(values)
        return {
            "x": xs,
            "y": ys,
            "mean_x": xs,
            "mean_y": ys,
            "count": [1] * len(xs),
            "total": len(xs),
        }
    part_N = _parts_of(steps, parts)
    starts_P = np.flatnonzero(np.diff(part_N, prepend=-1))
    counts_P = np.diff(starts_P, append=len(part_N))
    kept = _extremes(values, part_N, starts_P)
    return {
        "x": steps[kept].tolist(),
        "y": _round(values[kept]),
        "mean_x": _round(np.add.reduceat(steps.astype(float), starts_P) / counts_P),
        "mean_y": _round(np.add.reduceat(values, starts_P) / counts_P),
        "count": counts_P.tolist(),
        "total": len(steps),
    }


def _parts_of(steps: np.ndarray, parts: int) -> np.ndarray:
    """Return int [N]: the part of each point."""
    first, last = int(steps[0]), int(steps[-1])
    return ((steps - first) * parts // (last - first + 1)).astype(np.int64)


def _extremes(values: np.ndarray, part_N: np.ndarray, starts_P: np.ndarray) -> np.ndarray:
    """Return the indices of the lowest and highest point of each part, and of both ends."""
    # Sorted by part and then by value, the first of each part is its lowest point.
    order_N = np.lexsort((values, part_N))
    ends_P = np.append(starts_P[1:], len(values)) - 1
    chosen = np.concatenate([order_N[starts_P], order_N[ends_P], [0, len(values) - 1]])
    return np.unique(chosen)


def _round(values: np.ndarray | Sequence[float]) -> list[float]:
    return [float(f"{value:.{SIGNIFICANT_DIGITS}g}") for value in np.asarray(values).tolist()]
