"""Comparison of formulas by math_verify, for workers of `rlx.rewards.pool` only.

math_verify hands text to sympy, which can run for ever (a tower of powers) inside one C call. Its own limits are alarm signals,
which only reach a main thread; the pool's limit holds everywhere.
"""

from __future__ import annotations

from rlx.types import ConfigError

try:
    from math_verify import parse, verify
except ImportError as missing:
    raise ConfigError(f"method math_verify: {missing}; install math-verify or set method: exact") from missing


def same_math(gold: str, said: str) -> bool:
    """Say whether two formulas (LaTeX or plain, without dollar signs) are mathematically equal.

    Letters are variables: meant for mathematics, not for words. Text that no parser takes equals nothing.
    """
    try:
        return bool(verify(formula(gold), formula(said), timeout_seconds=None))
    except Exception:
        return False


def formula(text: str) -> list[object]:
    """What math_verify reads in a formula."""
    bare = text.replace("\\$", "").replace("$", "")
    return list(parse(f"${bare}$", parsing_timeout=None))
