"""Counter-based random numbers: a draw depends on what it is for, never on the order or the company in which it is drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MIX_1, MIX_2, STEP = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15
WORD = 2**64 - 1


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The SplitMix64 finaliser (Steele et al. 2014): neighbouring counters become independent-looking words."""
    x = x + np.uint64(STEP)  # arrays of unsigned words wrap around
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    return x ^ (x >> np.uint64(31))


def mix_one(x: int) -> int:
    """`mix` of a single word: a numpy call on one number costs more than all of this."""
    x = (x + STEP) & WORD
    x = ((x ^ (x >> 30)) * MIX_1) & WORD
    x = ((x ^ (x >> 27)) * MIX_2) & WORD
    return x ^ (x >> 31)


def key(*parts: int) -> int:
    """One 64-bit key of a tuple of integers, such as (seed, step, prompt, sample)."""
    word = 0
    for part in parts:
        word = mix_one(word ^ mix_one(part & WORD))
    return word


def uniforms(keys: list[int], length: int) -> NDArray[np.float64]:
    """(len(keys), length) uniforms in [0, 1): entry (i, t) depends on keys[i] and t alone."""
    base = np.array(keys, np.uint64)[:, None]
    words = mix(base + mix(np.arange(length, dtype=np.uint64))[None])
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
