"""Health lines: each fires on its trouble, names the key to change, and is silent otherwise."""

import pytest

from rlx.health import health

FINE = {
    "truncated": 0.1,
    "groups/no_signal": 0.4,
    "reward/failures": 0.0,
    "entropy": 1.0,
    "gap/max": 1e-5,
    "ref_kl": 0.1,
}


def line(key: str, metrics: dict[str, float], history: list[dict[str, float]] | None = None) -> str:
    return dict(health("rl", metrics, history or []))[key]


def test_nothing_to_say():
    assert health("rl", FINE, [FINE] * 10) == []
    assert health("rl", {}, []) == []
    assert health("rl", dict.fromkeys(FINE, float("nan")), [FINE] * 10) == []


def test_truncated():
    assert line("truncated", {"truncated": 0.62}).startswith(
        "stages.rl: 62% of the completions are cut at max_new_tokens; raise stages.rl.max_new_tokens"
    )
    assert line("truncated", {"truncated": 0.62, "reward": 0.1}).endswith(
        " (or add {name: soft_overlong, budget: TOKENS} to stages.rl.reward)"
    )
    assert "reward" not in line("truncated", {"truncated": 0.62})  # an evaluate stage has no rewards


@pytest.mark.parametrize(
    ("reward", "advice"),
    [(0.97, "take harder prompts (stages.rl.data)"), (0.02, "start from a stronger policy (stages.rl.policy)")],
)
def test_no_signal_says_which_way(reward, advice):
    step = {"groups/no_signal": 0.9, "reward": reward}
    text = line("no_signal", step, [step] * 4)
    assert text.startswith(
        f"stages.rl: in 90% of the groups all rewards are equal, so they teach nothing (mean reward {reward}"
    )
    assert advice in text


def test_no_signal_is_a_mean_over_five_steps():
    step = {"groups/no_signal": 0.9}
    assert health("rl", step, [step] * 3) == []
    assert health("rl", step, [{"groups/no_signal": 0.0}] * 2 + [step] * 2) == []  # 0.54 on average
    text = line("no_signal", step, [{"groups/no_signal": 0.0}] * 2 + [step] * 4)
    assert "harder prompts" in text
    assert "stronger policy" in text


def test_failures():
    assert line("failures", {"reward/failures": 3.0}) == (
        "stages.rl: 3 completions could not be scored and were left out of this step; see stages.rl.reward"
    )


def test_entropy_collapse():
    history = [{"entropy": 1.0}] * 5
    text = line("entropy", {"entropy": 0.04}, history)
    assert "entropy collapse, 0.040 nats per token after 1.000 at the start" in text
    assert "stages.rl.lr" in text
    assert health("rl", {"entropy": 0.06}, history) == []  # low, but not below the floor
    assert health("rl", {"entropy": 0.04}, [{"entropy": 0.3}] * 5) == []  # below the floor, but it began low
    assert health("rl", {"entropy": 0.04}, history[:4]) == []  # too early to say


def test_engine_gap_and_kl():
    assert line("gap", {"gap/max": 0.2}).endswith("by up to 0.2 nats; set model.dtype=fp32")
    assert "2.50 nats per token away" in line("kl", {"ref_kl": 2.5})
