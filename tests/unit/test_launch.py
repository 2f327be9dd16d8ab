"""What `launch` may say, without starting anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlx.compose import compose
from rlx.launch import Launch, chosen_gpus, idle_gpus, launch_of, num_ranks
from rlx.plan import plan
from rlx.types import ConfigError


def said(**launch: object) -> str:
    with pytest.raises(ConfigError) as error:
        launch_of({"launch": launch})
    return str(error.value)


def test_mistakes_are_told_by_key() -> None:
    assert said(name="local", gpus=2) == "launch.gpus: launch=local is one process; choose launch=zero0 to zero3"
    assert said(name="zero2", stage=2, gpus=0) == "launch.gpus: expected at least 1, got 0"
    assert said(name="zero0", stage=0, gpus=2, offload_optimizer=True) == (
        "launch.offload_optimizer: needs launch=zero1, zero2 or zero3"
    )
    assert said(name="zero2", stage=2, gpus=2, offload_parameters=True) == "launch.offload_parameters: needs launch=zero3"
    assert said(name="zero2", stage=2, timeout=0) == "launch.timeout: expected more than 0 seconds, got 0"
    assert "launch.gpu: " in said(name="zero2", stage=2, gpu=2)
    assert said(name="zero2", stage=2, hostfile="none.txt") == (
        "launch.hostfile: there is no file 'none.txt'; expected lines such as `worker-1 slots=8`"
    )


def test_settings_of_deepspeed_are_merged_and_conflicts_refused(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"

    def write(node: object) -> dict[str, object]:
        file.write_text(json.dumps(node))
        return {"name": "zero3", "stage": 3, "gpus": 2, "deepspeed": str(file), "offload_parameters": True}

    taken = launch_of({"launch": write({"zero_optimization": {"stage": 3, "overlap_comm": True}, "gradient_clipping": "auto"})})
    assert taken.settings()["zero_optimization"] == {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": False},
        "overlap_comm": True,
    }
    assert taken.deepspeed == {"zero_optimization": {"stage": 3, "overlap_comm": True}}  # the file is not needed again
    wrong = write({"gradient_clipping": 1.0, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    assert said(**wrong).splitlines() == [
        f"launch.deepspeed {file}: gradient_clipping: is set by the recipe (optim.clip); leave it out",
        f"launch.deepspeed {file}: bf16: is set by the recipe (model.dtype); leave it out",
        f"launch.deepspeed {file}: zero_optimization.stage: 2 contradicts 3 of `launch`; leave it out",
    ]
    lost = write({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}})
    assert said(**lost) == (
        f"launch.deepspeed {file}: zero_optimization.offload_optimizer.device: a run that is killed could not go on, since the "
        "optimiser's state cannot be saved from there; leave it out"
    )
    assert said(**write([1])) == f"launch.deepspeed {file}: expected a mapping, got list"
    file.write_text("{")
    assert said(**{**wrong, "deepspeed": str(file)}).startswith(f"launch.deepspeed {file}: is not JSON: ")
    assert said(**{**wrong, "deepspeed": "none.json"}) == (
        "launch.deepspeed none.json: cannot be read (No such file or directory)"
    )


def test_gpus_in_use_and_idle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    local, all_, two = (Launch(name="local"), Launch(name="zero2", stage=2), Launch(name="zero2", stage=2, gpus=2))
    assert (chosen_gpus(all_), chosen_gpus(two)) == (["2", "5", "7"], ["2", "5"])
    assert idle_gpus(local) == "3 GPUs are visible and 1 used; launch=zero2 launch.gpus=3 uses all"
    assert idle_gpus(two) == "3 GPUs are visible and 2 used; launch.gpus=3 uses all"
    assert idle_gpus(all_) == ""
    with pytest.raises(ConfigError, match=r"launch.gpus: 4 asked for, but 3 visible"):
        chosen_gpus(Launch(name="zero2", stage=2, gpus=4))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,-1,5")
    assert chosen_gpus(all_) == ["2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert chosen_gpus(two) == ["0", "1"]
    with pytest.raises(ConfigError, match=r"no GPU is visible here; launch.gpus=2 trains in two processes on the CPU"):
        chosen_gpus(all_)
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\nworker-1 slots=8\nworker-2 slots=4\n")
    assert num_ranks(Launch(name="zero2", stage=2, hostfile=str(hosts))) == 12
    assert num_ranks(Launch(name="zero2", stage=2, hostfile=str(hosts), gpus=2)) == 4
    assert (num_ranks(two), num_ranks(local)) == (2, 1)


def test_what_several_processes_do_not_do_is_told_by_stage() -> None:
    composed = compose(["grpo_math", "launch=zero2", "launch.gpus=2", "stages.rl.grad_variance=true", "launch.timeout=-1"])
    with pytest.raises(ConfigError) as error:
        plan(composed.config)
    assert str(error.value) == "launch.timeout: expected more than 0 seconds, got -1"
    composed.config["launch"]["timeout"] = 60
    with pytest.raises(ConfigError) as error:
        plan(composed.config)
    assert str(error.value) == (
        "stages.rl.grad_variance: no process has the whole gradient; leave it out, or take launch=local"
    )
    update = {"loss": [{"name": "policy_gradient"}], "lr": 1e-4}
    composed = compose(["grpo_math", "launch=zero2", "launch.gpus=2"])
    rl = composed.config["stages"]["rl"]
    rl |= {"loss": None, "updates": {"one": update, "two": update}}
    del rl["loss"]
    with pytest.raises(ConfigError) as error:
        plan(composed.config)
    assert str(error.value) == (
        "stages.rl.updates: one, two all train 'policy', and with DeepSpeed a model has one optimiser; launch=local"
    )
