"""`launch`: in how many processes a run is trained, and what DeepSpeed is told. Nothing here imports torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlx.build import Binder
from rlx.types import ConfigError

# What a recipe decides, by the key that decides it: DeepSpeed's own settings of these are refused.
DECIDED = {
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "gradient_clipping": "optim.clip",
    "train_batch_size": "prompts_per_step, rows_per_step",
    "train_micro_batch_size_per_gpu": "token_budget",
    "gradient_accumulation_steps": "token_budget",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "torch_autocast": "model.dtype",
    "activation_checkpointing": "model.activation_checkpointing",
}


@dataclass(kw_only=True)
class Launch:
    """One process (`local`), or `gpus` of them on each machine, under a stage of ZeRO.

    `hostfile` lists machines as DeepSpeed reads them (`worker-1 slots=8`); without GPUs, `gpus` processes share the CPU.
    `deepspeed` is a JSON file of more settings of DeepSpeed's. `offload_optimizer` and `offload_parameters` keep these in the
    host's memory, `offload_frozen` the models that are not trained (rlx/offload.py), in one process, too. A rank that makes no
    progress for `timeout` seconds ends the run.
    """

    name: str
    stage: int | None = None
    gpus: int | None = None
    hostfile: str | None = None
    deepspeed: str | dict[str, Any] | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False
    offload_frozen: bool = False
    timeout: float = 1800.0

    def problems(self) -> list[str]:
        """What is wrong with the settings taken together."""
        found = []
        if self.stage is None:
            for key in ("gpus", "hostfile", "deepspeed", "offload_optimizer", "offload_parameters"):
                if getattr(self, key):
                    found.append(f"launch.{key}: launch={self.name} is one process; choose launch=zero0 to zero3")
            return found
        if not 0 <= self.stage <= 3:
            found.append(f"launch.stage: expected 0 to 3, got {self.stage}")
        if self.gpus is not None and self.gpus < 1:
            found.append(f"launch.gpus: expected at least 1, got {self.gpus}")
        if self.timeout <= 0:
            found.append(f"launch.timeout: expected more than 0 seconds, got {self.timeout:g}")
        if self.offload_optimizer and self.stage == 0:
            found.append("launch.offload_optimizer: needs launch=zero1, zero2 or zero3")
        if self.offload_parameters and self.stage != 3:
            found.append("launch.offload_parameters: needs launch=zero3")
        if self.hostfile is not None and not Path(self.hostfile).expanduser().is_file():
            found.append(f"launch.hostfile: there is no file {self.hostfile!r}; expected lines such as `worker-1 slots=8`")
        return found

    def settings(self) -> dict[str, Any]:
        """What DeepSpeed is told besides batch sizes, optimiser and clipping. Raises ConfigError, with every wrong key."""
        if self.stage is None:
            return {}
        zero: dict[str, Any] = {"stage": self.stage}
        for key, part in (("offload_optimizer", self.offload_optimizer), ("offload_param", self.offload_parameters)):
            if part:
                zero[key] = {"device": "cpu", "pin_memory": bool(visible_gpus())}
        own: dict[str, Any] = {"zero_optimization": zero}
        given, where = self.given()
        wrong = [f"{where}: {key}: is set by the recipe ({by}); leave it out" for key, by in DECIDED.items() if key in given]
        wrong += [f"{where}: {line}" for line in [*conflicts(own, given), *unsaved(given)]]
        if wrong:
            raise ConfigError("\n".join(wrong))
        return merged(own, given)

    def given(self) -> tuple[dict[str, Any], str]:
        """The user's settings of DeepSpeed (those that are `auto` are left to rlx), and where they stand."""
        node, where = self.deepspeed or {}, "launch.deepspeed"
        if isinstance(node, str):
            where = f"launch.deepspeed {node}"
            try:
                node = json.loads(Path(node).expanduser().read_text(encoding="utf-8"))
            except OSError as error:
                raise ConfigError(f"{where}: cannot be read ({error.strerror})") from error
            except ValueError as error:
                raise ConfigError(f"{where}: is not JSON: {error}") from error
            if not isinstance(node, dict):
                raise ConfigError(f"{where}: expected a mapping, got {type(node).__name__}")
        return without_auto(node), where


def launch_of(config: Mapping[str, Any]) -> Launch:
    """The launch of a composed config, with its `deepspeed` read. Raises ConfigError with all that is wrong with it."""
    binder = Binder()
    launch: Launch | None = binder.record(Launch, "launch", config.get("launch") or {"name": "local"}, "launch")
    wrong = list(binder.errors) if launch is None else launch.problems()
    if launch is None or wrong:
        raise ConfigError("\n".join(wrong))
    if launch.stage is not None:
        launch.settings()
        launch.deepspeed = launch.given()[0] or None
    return launch


def undivided(stage: Any) -> list[str]:
    """What a stage asks for that several processes do not do, one line each."""
    found = []
    if getattr(stage, "grad_variance", False):
        found.append("grad_variance: no process has the whole gradient; leave it out, or take launch=local")
    updates = stage.all_updates() if hasattr(stage, "all_updates") else {}
    trained = [update.train for update in updates.values()]
    for model in dict.fromkeys(trained):
        if trained.count(model) > 1:
            names = ", ".join(name for name, update in updates.items() if update.train == model)
            found.append(f"updates: {names} all train {model!r}, and with DeepSpeed a model has one optimiser; launch=local")
    return found


def without_auto(node: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping without the values `auto`, by which other tools mean what rlx leaves out."""
    kept = {k: without_auto(v) if isinstance(v, Mapping) else v for k, v in node.items() if v != "auto"}
    return {k: v for k, v in kept.items() if v != {} or node[k] == {}}


def conflicts(own: Mapping[str, Any], given: Mapping[str, Any], path: str = "") -> list[str]:
    """One line for each key that both set, and differently."""
    found = []
    for key, value in given.items():
        at = f"{path}.{key}".lstrip(".")
        if isinstance(value, Mapping) and isinstance(own.get(key), Mapping):
            found += conflicts(own[key], value, at)
        elif key in own and own[key] != value:
            found.append(f"{at}: {value!r} contradicts {own[key]!r} of `launch`; leave it out")
    return found


def unsaved(given: Mapping[str, Any]) -> list[str]:
    """One line for each setting under which the optimiser's state is where it cannot be saved from."""
    zero = given.get("zero_optimization") or {}
    offload = zero.get("offload_optimizer") or {}
    found = {
        "offload_optimizer.device": offload.get("device") == "nvme",
        "offload_optimizer.ratio": offload.get("ratio", 1.0) != 1.0,
        "offload_optimizer.super_offload": bool(offload.get("super_offload")),
        "zenflow": bool(zero.get("zenflow")),
    }
    said = "a run that is killed could not go on, since the optimiser's state cannot be saved from there; leave it out"
    return [f"zero_optimization.{key}: {said}" for key, wrong in found.items() if wrong]


def merged(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Both, mappings key by key."""
    both = {
        key: merged(own[key], value) if isinstance(value, Mapping) and isinstance(own.get(key), Mapping) else value
        for key, value in given.items()
    }
    return {**own, **both}


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name.strip() for name in given.split(",") if name.strip()]
        return names[: names.index("-1")] if "-1" in names else names  # as CUDA does: -1 hides what comes after it
    numbers = sorted(int(path.name.removeprefix("nvidia")) for path in Path("/dev").glob("nvidia[0-9]*"))
    return [str(number) for number in numbers]


def num_ranks(launch: Launch) -> int:
    """How many processes there will be on all machines. Raises ConfigError."""
    if launch.stage is None:
        return 1
    if launch.hostfile is None:
        return len(chosen_gpus(launch))
    lines = Path(launch.hostfile).expanduser().read_text(encoding="utf-8").splitlines()
    slots = [int(found[1]) for line in lines if (found := re.match(r"\s*[^#\s]+\s+slots=(\d+)", line))]
    return sum(launch.gpus or number for number in slots)


def chosen_gpus(launch: Launch) -> list[str]:
    """The GPU of each process on this machine; on a machine without GPUs just numbers. Raises ConfigError."""
    visible = visible_gpus()
    if not visible and launch.gpus is None:
        raise ConfigError("launch.gpus: no GPU is visible here; launch.gpus=2 trains in two processes on the CPU")
    if visible and launch.gpus is not None and launch.gpus > len(visible):
        raise ConfigError(f"launch.gpus: {launch.gpus} asked for, but {len(visible)} visible (CUDA_VISIBLE_DEVICES)")
    names = visible or [str(i) for i in range(launch.gpus or 0)]
    return names[: launch.gpus]


def idle_gpus(launch: Launch) -> str:
    """The key that would put the GPUs to use that are visible and not used; empty where all are."""
    visible = len(visible_gpus())
    used = 1 if launch.stage is None else launch.gpus or visible
    if launch.hostfile is not None or visible <= used:
        return ""
    add = f"launch.gpus={visible}" if launch.stage is not None else f"launch=zero2 launch.gpus={visible}"
    return f"{visible} GPUs are visible and {used} used; {add} uses all"
