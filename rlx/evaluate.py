"""`rlx eval`: the evaluate stage on demand, for a run's stages, a model directory or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rlx.compose import Numbers
from rlx.plan import plan
from rlx.report.read import StageLog, load_run
from rlx.report.tables import final_table
from rlx.run import run_stage, write_json
from rlx.track import Lines, NoTracker
from rlx.types import ConfigError

SETTINGS = ("metrics", "limit", "samples", "temperature", "max_new_tokens", "split")


def measure(model: str, arguments: list[str], trust: list[str], scratch: Path) -> tuple[str, list[dict[str, Any]]]:
    """The table and the rows (policy, metrics, n) of one evaluation. Raises ConfigError."""
    config, policies = base(model)
    outs = [path for path in policies.values() if path != model]  # a run's own: whoever trusts its model trusts these
    stage: dict[str, Any] = {"kind": "evaluate", "policies": policies, "metrics": ["accuracy"]}
    split = "test"
    given = settings(arguments)
    if "task" in given:  # first: task.KEY is of the new task, wherever it stands
        config["task"] = {"name": given.pop("task")}
    for key, value in given.items():
        if key == "split":
            split = str(value)
        elif key in SETTINGS:
            stage[key] = value
        elif key == "seed" or key.startswith(("task.", "model.")):
            put(config, key, value)
        else:
            raise ConfigError(f"{key}: rlx eval takes task, task.KEY, model.KEY, seed, {', '.join(SETTINGS)}")
    if not (config.get("task") or {}).get("name"):
        absent = "" if Path(model).expanduser().exists() else f"{model}: there is no such directory, so it is a hub id; "
        raise ConfigError(f"{absent}which task? Give task=NAME, such as task=gsm8k or task=arithmetic")
    config["stages"] = {"eval": {**stage, "data": f"@task/{split}"}}
    made = plan(config, trusted=[*trust, *outs])
    write_json(scratch / "run.json", {"recipe": f"eval {model}", "status": "finished", "seed": config["seed"]})
    (scratch / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run_stage(made, "eval", scratch, display=Lines(), tracker=NoTracker())
    run = load_run(scratch)
    log: StageLog = run.stages[0]
    return final_table(run), [{k: v for k, v in row.items() if k not in ("step", "seconds")} for row in log.metrics]


def settings(arguments: list[str]) -> dict[str, Any]:
    """Words of the form key=value. Raises ConfigError."""
    out = {}
    for text in arguments:
        key, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"{text!r}: expected key=value, such as task=gsm8k or limit=200")
        try:
            out[key] = yaml.load(value, Loader=Numbers)
        except yaml.YAMLError:
            raise ConfigError(f"{text!r}: its value is not YAML") from None
    return out


def put(config: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path, making the mappings on the way. Raises ConfigError where something else stands there."""
    *parents, last = path.split(".")
    node = config
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{path}: {part} is {node!r}, which has no keys")
    node[last] = value


def base(model: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The config that an evaluation starts from, and the weights by name: all trained stages of a run, or one model."""
    folder = Path(model).expanduser()
    if (folder / "run.json").is_file() and (folder / "config.yaml").is_file():
        saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        outs = {name: folder / name / "out" for name in saved["stages"]}
        policies = {name: str(out) for name, out in outs.items() if (out / "config.json").is_file()}
        if not policies:
            raise ConfigError(f"{model}: no stage of this run has finished, so there are no weights to measure")
        kept = {k: saved[k] for k in ("model", "task", "seed") if saved.get(k) is not None}
        if isinstance(kept.get("task"), str):
            kept["task"] = {"name": kept["task"]}
        return {"recipe": "eval", **kept}, policies
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{model}: holds neither a run (run.json) nor a model (config.json)")
    return {"recipe": "eval", "model": {"name": model}, "seed": 0}, {folder.name or model: model}
