"""Uniform random numbers that are addressed by (seed, stream, position), not drawn in sequence.

The random number of a token depends only on its address. So a seeded request gives the same tokens
whatever else is in the batch, in whatever order rows are computed, and whether or not a sequence
was preempted. No torch.
"""

from __future__ import annotations

import os

import numpy as np

__all__ = [
    "ALTERNATIVES_STREAM",
    "draw_uniforms",
    "fresh_seed",
    "hash_positions",
    "hash_streams",
    "uniforms_at",
]

ALTERNATIVES_STREAM = 1 << 32
"""First stream for draws at prompt positions; lower streams are the completions of a request."""

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_DROPPED_BITS = np.uint64(11)
"""Bits of a hash that a float64 in [0, 1) has no room for."""


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> _SHIFT_1)) * _MIX_1
    state = (state ^ (state >> _SHIFT_2)) * _MIX_2
    return state ^ (state >> _SHIFT_3)


def draw_uniforms(
    seeds: np.ndarray | np.uint64, streams: np.ndarray | np.uint64, positions: np.ndarray
) -> np.ndarray:
    """Hash each (seed, stream, position) to a float64 in [0, 1) with 53 random bits.

    Args:
        seeds, streams, positions: uint64, broadcast against each other.

    Source: the output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), applied once for
    each part of the address.
    """
    return uniforms_at(hash_streams(seeds, streams), positions)


def hash_streams(seeds: np.ndarray | np.uint64, streams: np.ndarray | np.uint64) -> np.ndarray:
    """Hash each (seed, stream) to uint64, for `uniforms_at`."""
    with np.errstate(over="ignore"):
        state = _mix(np.atleast_1d(np.asarray(seeds, np.uint64)) + _GAMMA)
        return _mix(state + np.asarray(streams, np.uint64) * _GAMMA + _GAMMA)


def uniforms_at(hashed: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the numbers of `draw_uniforms` at the positions of hashed streams."""
    # arrays of integers wrap around without a warning
    state = _mix(hashed + np.asarray(positions, np.uint64) * _GAMMA + _GAMMA)
    return (state >> _DROPPED_BITS).astype(np.float64) * 2.0**-53


def hash_positions(key: int, tokens: np.ndarray) -> np.ndarray:
    """Hash (key, position, token) for every token of a sequence, uint64 [T]."""
    with np.errstate(over="ignore"):
        state = np.arange(len(tokens), dtype=np.uint64) * _GAMMA + np.uint64(key)
        return _mix(_mix(state + _GAMMA) + tokens.astype(np.uint64) * _GAMMA)


def fresh_seed() -> int:
    """Return an unpredictable 64-bit seed for a request without a seed."""
    return int.from_bytes(os.urandom(8), "little")
