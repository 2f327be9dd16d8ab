"""Counter-based random numbers: a draw depends on what it is for, never on the order or the company in which it is drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MIX_1, MIX_2, STEP = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The SplitMix64 finaliser (Steele et al. 2014): neighbouring counters become independent-looking words."""
    with np.errstate(over="ignore"):
        x = x + STEP
        x = (x ^ (x >> np.uint64(30))) * MIX_1
        x = (x ^ (x >> np.uint64(27))) * MIX_2
        return x ^ (x >> np.uint64(31))


def key(*parts: int) -> int:
    """One 64-bit key of a tuple of integers, such as (seed, step, prompt, sample)."""
    word = np.zeros(1, np.uint64)
    for part in parts:
        word = mix(word ^ mix(np.array([part % 2**64], np.uint64)))
    return int(word[0])


def uniforms(keys: list[int], length: int) -> NDArray[np.float64]:
    """(len(keys), length) uniforms in [0, 1): entry (i, t) depends on keys[i] and t alone."""
    base = np.array(keys, np.uint64)[:, None]
    with np.errstate(over="ignore"):
        words = mix(base + mix(np.arange(length, dtype=np.uint64))[None])
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
