"""Several processes that share the optimiser's state, the gradients or the weights: DeepSpeed's ZeRO stages 0 to 3."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlx import partitions, world
from rlx.learner import MakeLearner, TorchLearner
from rlx.types import Batch, Component, ConfigError, Policy

# Weights in bfloat16; the optimiser has its own in float32, in which gradients are added up as well.
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


class Whole(nn.Module):
    """A policy as one module, which is what DeepSpeed divides: its forward gives the fields of a batch."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = (policy,)  # in a tuple, so that its tensors are registered once
        self.module = policy.module
        self.heads = getattr(policy, "heads", None)

    def forward(self, unit: Batch, wants: set[str], temperature: float) -> dict[str, Tensor]:
        """The fields of `wants`."""
        return self.policy[0].forward(unit, wants, temperature)


class DeepSpeedLearner(TorchLearner):
    """One rank of several: the loop, reductions and schedule of TorchLearner, with DeepSpeed for the gradient and the step.

    Losses are divided by the counts of all ranks, so that gradients are to be added up; DeepSpeed averages them, hence the
    factor of `world.size()`. Under stage 3 a copy of the weights is divided and trained, and `policy` stays whole: it gets
    the new weights once after each step, and whatever samples, evaluates or saves uses it without a collective.
    """

    repeats = False  # the other ranks are in the middle of a sum: all of them start again, with a smaller `share`

    def __init__(
        self,
        policy: Policy,
        optim: Component[Any],
        *,
        lr: float,
        total: int,
        stage: int,
        settings: Mapping[str, Any],
        share: float = 1.0,
    ) -> None:
        deepspeed = imported()
        if policy.device.type != (there := deepspeed.get_accelerator().device_name()):
            raise ConfigError(
                f"model.device: the model is on {policy.device.type} and DeepSpeed on {there}; give model.device={there}, "
                "or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
            )
        gc.collect()  # the engines of the stage before hold themselves in cycles
        low = stage > 0 and bool(getattr(policy, "bf16", False))
        if low:
            for weight in Whole(policy).parameters():
                weight.data = weight.data.bfloat16()
        super().__init__(policy, optim, lr=lr, total=total, trained=twin(policy) if stage == 3 else policy)
        self.name, self.low = optim.name, low
        self.groups = self.optimizer.state_dict()["param_groups"]
        self.order = [p for group in self.optimizer.param_groups for p in group["params"]]  # as the numbers of `groups` count
        whole = Whole(self.trained)
        buffers = [buffer.clone() for buffer in whole.buffers()]
        self.stage, self.share = stage, share
        if (settings.get("zero_optimization") or {}).get("offload_optimizer"):
            for group in self.optimizer.param_groups:
                if "fused" in group:  # on a CPU six times as fast as torch's other kernels, and as DeepSpeed's own
                    group.update(fused=True, foreach=False)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=whole,
            optimizer=self.optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "steps_per_print": 10**9,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "gradient_clipping": float(self.settings["clip"] or 0.0) if stage else 0.0,
                **(BF16 if low else {}),
                **settings,
            },
            dist_init_required=False,
        )
        # DeepSpeed rounds buffers to bfloat16 as well: the frequencies of rotary embeddings among them, which need float32.
        for buffer, kept in zip(whole.buffers(), buffers, strict=True):
            buffer.data = kept.to(buffer.device)

    def _forward(self, unit: Batch, wants: set[str], temperature: float, *, last: bool) -> dict[str, Tensor]:
        self.engine.set_gradient_accumulation_boundary(last)
        fields: dict[str, Tensor] = self.engine(unit, wants, temperature)
        return fields

    def _backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * world.size())

    def _descend(self, lr: float, *, allowed: bool) -> Tensor:
        norm: Any = None
        if self.stage == 0:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.settings["clip"] or float("inf"))
            allowed = allowed and bool(torch.isfinite(norm))
        if not allowed:
            return torch.tensor(float("nan")) if norm is None else norm
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with world.phase("the optimiser's step"):
            self.engine.step()  # which does nothing where the norm is not finite
            if self.stage and not self.steps:
                partitions.check_divisible(self.optimizer, self.name)
            if self.stage:
                partitions.forget_gradient(self.optimizer)
            if self.stage == 3:
                publish(self.trained, self.policy)
        return torch.as_tensor(self.engine.get_global_grad_norm() if norm is None else norm)

    def state_dict(self) -> dict[str, Any]:
        """That of one process, whole on rank 0: a run goes on under another stage, in more or fewer processes, or in one.

        `weights` are those in float32, where the policy has them rounded. All ranks call it.
        """
        if self.stage == 0:
            return super().state_dict()
        state, groups = partitions.gathered(self.optimizer, self.order), partitions.settings(self.optimizer, self.groups)
        weights = {"weights": partitions.gathered_weights(self.parameters)} if self.low else {}
        return {"optimizer": {"state": state, "param_groups": groups}, **self.counters(), **weights}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from there. All ranks call it."""
        if self.stage == 0:
            super().load_state_dict(saved)
            return
        self.load_counters(saved)
        partitions.put(self.optimizer, self.order, saved["optimizer"]["state"])
        partitions.put_settings(self.optimizer, saved["optimizer"]["param_groups"])
        partitions.put_weights(self.optimizer, self.parameters, saved.get("weights") or self.policy.parameters())


def imported() -> Any:
    """DeepSpeed, without its lines of information, and without an operator that it would compile for a minute.

    That one makes sums of CPU processes faster.
    """
    import logging
    import warnings

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    return deepspeed


def twin(policy: Any) -> Any:
    """A copy with weights of its own."""
    made = copy.copy(policy)
    made.module = copy.deepcopy(policy.module)
    if getattr(policy, "heads", None) is not None:
        made.heads = copy.deepcopy(policy.heads)
    return made


@torch.no_grad()
def publish(trained: Any, policy: Any) -> None:
    """Copy the divided weights into a whole model, one at a time: all ranks hold all of them, and no more."""
    from deepspeed.runtime.zero import GatheredParameters

    for part in ("module", "heads"):
        if getattr(policy, part, None) is not None:
            for whole, divided in zip(getattr(policy, part).parameters(), getattr(trained, part).parameters(), strict=True):
                if divided.requires_grad:
                    with GatheredParameters([divided]):
                        whole.copy_(divided)


def learner_of(stage: int | None, settings: Mapping[str, Any], share: float) -> MakeLearner:
    """What trains a model: in one process (no stage), or under a stage of ZeRO with a share of the token budget."""
    return TorchLearner if stage is None else partial(DeepSpeedLearner, stage=stage, settings=settings, share=share)
