"""TRL's side: its trainers, on the same files."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trl
from datasets import load_dataset
from transformers import TrainerCallback

from benchmark.clock import Clock, Passes
from benchmark.prepare import words
from benchmark.rlx_side import paid
from benchmark.workloads import BETA, LR, Setting, Workload

Told = Callable[[list[list[int]], list[list[int]], list[str]], None]  # ids of prompts and answers, texts of the answers


def arguments(work: Workload, setting: Setting, device: str, output: str) -> dict[str, Any]:
    """What every trainer is told: rlx's optimiser, schedule, batch and no files."""
    return {
        "output_dir": output,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu",
        "max_steps": 1_000_000,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": setting.micro,
        "gradient_accumulation_steps": work.sequences // setting.micro,
        **dict(setting.arguments),
    }


def trainer(work: Workload, folder: Path, setting: Setting, device: str, told: Told | None = None, **more: Any) -> Any:
    """The trainer of a workload. `told` hears of what GRPO sampled; `more` are arguments of the config."""
    output = tempfile.mkdtemp(prefix="trl-", dir=folder)
    given = {**arguments(work, setting, device, output), **more}
    tokenizer = words(folder)
    shared = {
        "train_dataset": load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=output),
        "processing_class": tokenizer,
    }
    model = str(folder / ("classifier" if work.kind == "rm" else "model"))
    if work.kind == "grpo":

        def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
            if told is not None:
                told(tokenizer(prompts)["input_ids"], completion_ids, completions)
            return [paid(text) for text in completions]

        args = trl.GRPOConfig(**given, num_generations=work.group, max_completion_length=work.new)
        return trl.GRPOTrainer(model, reward, args, **shared)
    if work.kind == "sft":
        return trl.SFTTrainer(model, trl.SFTConfig(**given), **shared)
    if work.kind == "dpo":
        return trl.DPOTrainer(model, args=trl.DPOConfig(**given, beta=BETA), **shared)
    return trl.RewardTrainer(model, trl.RewardConfig(**given), **shared)


class Steps(TrainerCallback):  # type: ignore[misc]
    """Told of each optimiser step."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step is done."""
        self.passes.step()


def run(work: Workload, folder: Path, clock: Clock, passes: Passes, setting: Setting) -> None:
    """Train until the parent asks for no more."""

    def told(prompts: list[list[int]], answers: list[list[int]], texts: list[str]) -> None:
        for i in range(0, len(prompts), work.group):
            passes.played(len(prompts[i]), [len(a) for a in itertools.islice(answers, i, i + work.group)])

    made = trainer(work, folder, setting, clock.device, told)
    made.add_callback(Steps(passes))
    clock.wrap(made, "compute_loss", "update")
    clock.wrap(made.accelerator, "backward", "update")
    clock.without_optimizer()
    if work.kind == "grpo":
        clock.wrap(made, "_generate", "rollout")
    made.train()
