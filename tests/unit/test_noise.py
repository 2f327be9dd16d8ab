"""Counter-based draws: literal values (results of earlier versions depend on them), range and independence."""

from __future__ import annotations

import numpy as np
import pytest

from rlx.rollout.noise import key, mix, uniforms


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((), 0),
        ((0,), 12035550249420947055),
        ((0, 1), 16965494097514110161),
        ((1, 0), 7434303198761161278),
        ((-1,), 6755974106381971767),
        ((2**64 - 1,), 6755974106381971767),
    ],
)
def test_key_values(parts: tuple[int, ...], expected: int) -> None:
    assert key(*parts) == expected


def test_mix_is_splitmix64() -> None:
    """The first outputs of the reference implementation for the seed 1234567."""
    step = 0x9E3779B97F4A7C15
    state = np.array([(1234567 + i * step) % 2**64 for i in range(3)], np.uint64)
    assert mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniforms_values() -> None:
    expected = [[0.6524484863740322, 0.36818951565166946], [0.1663964394676608, 0.5267179955718279]]
    assert uniforms([0, 1], 2).tolist() == expected


def test_an_entry_depends_on_its_key_and_position_alone() -> None:
    keys = [key(3, i) for i in range(5)]
    table = uniforms(keys, 7)
    assert table[[4, 0]].tolist() == uniforms([keys[4], keys[0]], 7).tolist()
    assert table[:, :3].tolist() == uniforms(keys, 3).tolist()
    assert uniforms([], 3).shape == (0, 3)
    assert uniforms([2**64 - 1], 0).shape == (1, 0)


def test_uniforms_are_uniform_and_neighbours_independent() -> None:
    """Keys are made as the sampler makes them; each statistic stays within 4.5 standard deviations."""
    keys = [key(0, 7, prompt, sample) for prompt in range(200) for sample in range(10)]
    x = uniforms(keys, 50)
    assert 0.0 <= x.min() < 1e-4
    assert 1 - 1e-4 < x.max() < 1.0
    assert abs(x.mean() - 0.5) < 4.5 / np.sqrt(12 * x.size)
    counts = np.histogram(x, bins=100, range=(0, 1))[0]
    chi2 = ((counts - x.size / 100) ** 2 / (x.size / 100)).sum()
    assert 99 - 4.5 * np.sqrt(2 * 99) < chi2 < 99 + 4.5 * np.sqrt(2 * 99)
    for a, b in ((x[:, :-1], x[:, 1:]), (x[:-1], x[1:]), (x[:, :-2], x[:, 2:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4.5 / np.sqrt(a.size)
