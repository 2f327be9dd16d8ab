"""Take a step with every loss of the catalogue, on weights that stay the same: metrics and gradients.

In one process each batch is one unit; in ranks it is many, under a stage of ZeRO with every weight divided.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from catalogued import WHOLE, Result, alone, batch_of, cases, policy

from rlx import world
from rlx.learner import TorchLearner, gradient
from rlx.terms import Update
from rlx.types import Batch, Component
from rlx.units import own_units


def walked(learner: Any, budget: int) -> dict[str, list[tuple[Result, list[int]]]]:
    """By loss and reduction: metrics, gradient and each rank's tokens in two steps that learn nothing (a rate of 0).

    One is on a batch, one on so little that a rank has nothing.
    """
    found = {}
    for case in cases():
        batch, update = batch_of(case), case.update(budget)
        parts = batch, alone(case, batch)
        found[str(case)] = [((learner.step(x, update, (0,)), learner.seen), tokens(update, x)) for x in parts]
    return found


def tokens(update: Update, batch: Batch) -> list[int]:
    """How many tokens each rank trains on in a step."""
    own = own_units(policy(), batch, update.token_budget, whole_groups=update.whole_groups)
    return world.gathered(sum(int(unit["mask"].sum()) for unit, repeated in own if not repeated))


def seeing(learner: type[TorchLearner], gradient_of: Any) -> Any:
    """A learner that keeps the gradient of its last step in `seen`."""

    class Seeing(learner):  # type: ignore[misc, valid-type]
        def _descend(self, lr: float, *, allowed: bool) -> Tensor:
            self.seen = torch.cat([gradient_of(p).flatten() for p in self.parameters])
            return super()._descend(lr, allowed=allowed)

    return Seeing


SGD = Component[Any]("sgd", lambda parameters, lr: torch.optim.SGD(parameters, lr=lr), settings={"clip": 0.0})


def in_one() -> Any:
    """The gradients of one process."""
    return walked(seeing(TorchLearner, gradient)(policy(), SGD, lr=0.0, total=1), WHOLE)


def divided(stage: int) -> Any:
    """The same under a stage of ZeRO."""
    from deepspeed.utils import safe_get_full_grad

    from rlx.zero import DeepSpeedLearner

    def full(p: Any) -> Tensor:
        found = safe_get_full_grad(p)
        return torch.zeros(getattr(p, "ds_shape", p.shape)) if found is None else found

    zero = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    return walked(seeing(DeepSpeedLearner, full)(policy(), SGD, lr=0.0, total=1, stage=stage, settings=zero), 100)


def in_ranks() -> dict[str, Any]:
    """The same by stage."""
    return {str(stage): divided(stage) for stage in (2, 3)}
