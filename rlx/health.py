"""Health lines: what one step's metrics say is going wrong, and which config key to change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Metrics = Mapping[str, float]

TRUNCATED = 0.3  # share of completions that the token limit cuts
NO_SIGNAL = 0.7  # share of groups whose rewards are all equal, mean of WINDOW logged steps
ENTROPY_FLOOR = 0.05  # nats per token
ENTROPY_SHARE = 0.1  # of the first WINDOW logged steps' entropy
GAP = 0.05  # nats, the largest |rollout logp - training logp|
KL = 1.0  # nats per token from the reference
WINDOW = 5


def health(stage: str, metrics: Metrics, history: Sequence[Metrics]) -> list[tuple[str, str]]:
    """Return (key, line) for each thing that looks wrong.

    metrics: this step's. history: the earlier logged steps', oldest first, without this one. A key names the same
    trouble at every step, so that a caller can print each once. A metric that is missing or nan raises no line.
    """
    at = f"stages.{stage}"
    found = {
        "truncated": _truncated(at, metrics),
        "no_signal": _no_signal(at, [*history, metrics][-WINDOW:]),
        "failures": _failures(at, metrics),
        "entropy": _entropy(at, metrics, history),
        "gap": _gap(at, metrics),
        "kl": _kl(at, metrics),
    }
    return [(key, line) for key, line in found.items() if line is not None]


def _truncated(at: str, metrics: Metrics) -> str | None:
    share = _get(metrics, "truncated")
    if not share > TRUNCATED:
        return None
    line = f"{at}: {share:.0%} of the completions are cut at max_new_tokens; raise {at}.max_new_tokens"
    trained = "reward" in metrics  # an evaluate stage pays no reward
    return f"{line} (or add {{name: soft_overlong, budget: TOKENS}} to {at}.reward)" if trained else line


def _no_signal(at: str, window: Sequence[Metrics]) -> str | None:
    share = _mean(window, "groups/no_signal")
    if len(window) < WINDOW or not share > NO_SIGNAL:
        return None
    reward = _mean(window, "reward")
    trouble = f"{at}: in {share:.0%} of the groups all rewards are equal, so they teach nothing"
    harder = f"take harder prompts ({at}.data)"
    easier = f"start from a stronger policy ({at}.policy) or raise {at}.group_size"
    if math.isnan(reward):
        return f"{trouble}; if they are right, {harder}; if they are wrong, {easier}"
    return f"{trouble} (mean reward {reward:.2f}); {harder if reward >= 0.5 else easier}"


def _failures(at: str, metrics: Metrics) -> str | None:
    count = _get(metrics, "reward/failures")
    if not count > 0:
        return None
    return f"{at}: {count:.0f} completions could not be scored and were left out of this step; see {at}.reward"


def _entropy(at: str, metrics: Metrics, history: Sequence[Metrics]) -> str | None:
    now, first = _get(metrics, "entropy"), _mean(history[:WINDOW], "entropy")
    if len(history) < WINDOW or not (now < ENTROPY_FLOOR and now < ENTROPY_SHARE * first):
        return None
    return (
        f"{at}: entropy collapse, {now:.3f} nats per token after {first:.3f} at the start; raise clip_high in "
        f"{at}.loss, add {{name: entropy, weight: 0.01}} to it, or lower {at}.lr"
    )


def _gap(at: str, metrics: Metrics) -> str | None:
    gap = _get(metrics, "gap/max")
    if not gap > GAP:
        return None
    return (
        f"{at}: the rollout's log-probabilities differ from the training model's by up to {gap:.3g} nats; set model.dtype=fp32"
    )


def _kl(at: str, metrics: Metrics) -> str | None:
    kl = _get(metrics, "ref_kl")
    if not kl > KL:
        return None
    return (
        f"{at}: the policy is {kl:.2f} nats per token away from its reference; lower {at}.lr "
        f"or raise the weight of {{name: kl}} in {at}.loss"
    )


def _get(metrics: Metrics, key: str) -> float:
    """The metric, or nan, of which every comparison is false."""
    return metrics.get(key, math.nan)


def _mean(steps: Sequence[Metrics], key: str) -> float:
    values = [step[key] for step in steps if key in step and not math.isnan(step[key])]
    return math.fsum(values) / len(values) if values else math.nan
