"""Whether both sides compute the same: loss and gradient of one batch, each through its own training step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmark import rlx_side, trl_side
from benchmark.prepare import prepare
from benchmark.workloads import Setting, Workload
from rlx.rollout.samplers import answer
from rlx.track import NoTracker
from rlx.types import Component, Episode, Message, Play, Turn
from rlx.units import computed

SAME = (("bf16", False), ("gradient_checkpointing", False))


class Capture(torch.optim.SGD):
    """An optimiser that moves nothing and keeps the gradients that it was shown."""

    seen: list[Tensor]

    def step(self, closure: Any = None) -> Any:
        """Keep them."""
        found = [p for group in self.param_groups for p in group["params"]]
        self.seen = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in found]


def differences(work: Workload, folder: Path) -> dict[str, float]:
    """The largest absolute difference of the loss and of any gradient. Raises ValueError where there is none to compare."""
    work, folder = replace(work, steps=1), folder / "shared"
    folder.mkdir()
    prepare(work, folder)
    rows: list[tuple[list[int], list[int], str]] = []
    theirs, expected = of_trl(work, folder, rows)
    ours, found = of_rlx(work, folder, rows)
    if [x.shape for x in found] != [x.shape for x in expected] or not any(x.any() for x in expected):
        raise ValueError(f"{work.name}: the two sides have no gradient of the same weights to compare")
    worst = max(float((x - y).abs().max()) for x, y in zip(found, expected, strict=True))
    return {"loss": abs(ours - theirs), "gradient": worst, "largest": max(float(x.abs().max()) for x in expected)}


def of_trl(work: Workload, folder: Path, rows: list[tuple[list[int], list[int], str]]) -> tuple[float, list[Tensor]]:
    """Loss and gradient of a step of TRL's trainer; `rows` gets what it sampled."""

    def told(prompts: list[list[int]], answers: list[list[int]], texts: list[str]) -> None:
        rows.extend(zip(prompts, answers, texts, strict=True))

    whole = Setting(SAME, work.sequences)
    made = trl_side.trainer(work, folder, whole, "cpu", told, max_steps=1, max_grad_norm=0.0)
    capture = Capture(made.model.parameters(), lr=0.0)
    made.optimizer, losses, compute = capture, [], made.compute_loss

    def kept(*args: Any, **kwargs: Any) -> Any:
        losses.append(compute(*args, **kwargs))
        return losses[-1]

    made.compute_loss = kept
    made.train()
    return float(losses[0].detach()), capture.seen


def of_rlx(work: Workload, folder: Path, rows: list[tuple[list[int], list[int], str]]) -> tuple[float, list[Tensor]]:
    """Loss and gradient of a step of rlx's stage. Of GRPO, on what TRL sampled."""
    made = rlx_side.planned(work, folder, "cpu", steps=1)
    stage: Any = made.stages["bench"]
    captures: list[Capture] = []

    def optim(parameters: list[Any], lr: float) -> Capture:
        captures.append(Capture(parameters, lr=0.0))
        return captures[-1]

    stage.optim = Component("capture", optim, settings={"clip": 0.0})
    if work.kind == "grpo":
        stage.sampler = replace(stage.sampler, call=lambda play, asked, n: replayed(play, asked, rows))
    return rlx_side.carried_out(made, NoTracker())["loss"], captures[0].seen


def replayed(play: Play, asked: list[Episode], rows: list[tuple[list[int], list[int], str]]) -> list[Episode]:
    """The sampled rows as episodes of the tasks that they answer, with the policy's own log-probabilities."""
    by_prompt = {play.policy.render(row.task.prompt).tobytes(): row for row in asked}
    episodes = []
    for prompt, did, text in rows:
        row = by_prompt[np.array(prompt, np.int64).tobytes()]
        env = play.make_env()
        talk = list(env.reset(row.task))
        said = Message("assistant", text)
        turn = Turn(np.array(prompt, np.int64), np.array(did, np.int64), np.zeros(len(did), np.float32), said)
        turn.info["truncated"] = len(did) == play.sampling.max_new_tokens
        episodes.append(Episode(row.task, row.group))
        answer(episodes[-1], env, talk, turn)
    logp = computed(play.policy, play.policy.collate(episodes), {"logp"}, 16384)["logp"]
    for episode, values in zip(episodes, logp, strict=True):
        episode.turns[0].logp = values[: episode.num_tokens].numpy()
    return episodes
