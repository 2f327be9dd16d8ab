"""Gymnasium's environments as arrays of environments: one for each seed, stepped together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlx.types import ConfigError, Floats, Ids, VecStep


def make(id: str, **settings: Any) -> Any:
    """An environment of Gymnasium, or of MiniGrid, by its id. Raises ConfigError where it is not installed or not known."""
    try:
        import gymnasium
    except ImportError as error:
        raise ConfigError("environments of Gymnasium need it installed: pip install 'rlx[gym]'") from error
    if id.startswith(("MiniGrid-", "BabyAI-")):
        try:
            import minigrid  # noqa: F401  (registers its environments)
        except ImportError as error:
            raise ConfigError(f"{id}: needs MiniGrid: pip install 'rlx[minigrid]'") from error
    try:
        return gymnasium.make(id, **settings)
    except (gymnasium.error.Error, TypeError) as error:
        raise ConfigError(f"{id}: {str(error).splitlines()[0]}") from error


class GymEnvs:
    """Environments of one id, each reset with its own seed. Observations are flattened to float32."""

    def __init__(self, id: str, seeds: Sequence[int], settings: dict[str, Any] | None = None) -> None:
        self.envs = [make(id, **(settings or {})) for _ in seeds]
        self.seeds = list(seeds)

    def reset(self) -> Floats:
        """Every environment at its start."""
        self._seen = np.stack([flat(env.reset(seed=s)[0]) for env, s in zip(self.envs, self.seeds, strict=True)])
        self._done = np.zeros(len(self.envs), bool)
        return self._seen.copy()

    def step(self, actions: Ids) -> VecStep:
        """One action in each environment that is not done."""
        reward = np.zeros(len(self.envs), np.float32)
        terminated, truncated = np.zeros_like(self._done), np.zeros_like(self._done)
        for i in np.flatnonzero(~self._done).tolist():
            seen, reward[i], terminated[i], truncated[i], _ = self.envs[i].step(int(actions[i]))
            self._seen[i] = flat(seen)
        self._done |= terminated | truncated
        return self._seen.copy(), reward, terminated, truncated & ~terminated, {}


def flat(seen: Any) -> Floats:
    """An observation as one row of numbers."""
    return np.asarray(seen, np.float32).ravel()
