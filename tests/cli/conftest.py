"""The command line in this process, in an empty folder with one small recipe of the user's."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlx import cli

SMALL = """\
purpose: "two steps of each stage"
model: {name: tiny, layers: 2, hidden: 32, heads: 2, kv_heads: 2, ffn: 64}
task: {name: arithmetic, digits: 2}
objective: rl/eval/accuracy
stages:
  sft: {kind: fit, data: "@task/demos", loss: [{name: nll}], steps: 2, rows_per_step: 4, lr: 1e-3, log_every: 1}
  rl:
    kind: online
    policy: "@sft"
    data: "@task/train"
    reward: [{name: format}, {name: length}]
    advantage: [{name: group_zscore}]
    loss: [{name: clipped_surrogate}]
    prompts_per_step: 2
    group_size: 4
    max_new_tokens: 8
    steps: 2
    lr: 1e-3
    eval: {every: 1, data: "@task/dev", metrics: [accuracy], limit: 4}
  test: {kind: evaluate, policies: {rl: "@rl"}, data: "@task/test", metrics: [accuracy], limit: 4, max_new_tokens: 8}
"""


@dataclass
class Result:
    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """The message without its lists of known names, which grow with the catalogue."""
        return re.sub(r" \((known|nearest of \d+): [^)]*\)", "", self.err).strip()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def rlx(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(command: str, *words: str) -> Result:
        no_recipes = command.startswith("-") or command in ("eval", "report", "resume") or "--recipes" in words
        own = [] if no_recipes else ["--recipes", "mine"]
        monkeypatch.setattr(sys, "argv", ["rlx", command, *words, *own])
        capfd.readouterr()
        status: object = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
        out, err = capfd.readouterr()
        return Result(int(str(status or 0)), out, err)

    return call
