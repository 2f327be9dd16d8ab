"""`rlx --help`: light and readable."""

import os
import subprocess
import sys

HEAVY = "torch transformers hydra omegaconf wandb deepspeed datasets numpy rich yaml"


def run(*words: str) -> str:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, env=os.environ).stdout


def test_the_command_line_imports_nothing_heavy():
    code = f"import sys, rlx.cli; print([m for m in '{HEAVY}'.split() if m in sys.modules])"
    assert run("-c", code) == "[]\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys, rlx.cli; sys.argv = ['rlx', '--help']\n"
        "try: rlx.cli.main()\n"
        f"except SystemExit: print([m for m in '{HEAVY}'.split() if m in sys.modules and m != 'rich'])"
    )
    assert run("-c", code).endswith("[]\n")


def test_examples_stand_on_lines_of_their_own(rlx):
    lines = rlx("train", "--help").out.splitlines()
    assert "    rlx train grpo_math" in lines
    assert "    rlx train -m grpo_math seed=0,1,2 stages.rl.lr=1e-4,3e-4" in lines


def test_every_command_explains_itself(rlx):
    for command in ("train", "check", "list", "show", "eval", "reproduce", "report"):
        result = rlx(command, "--help")
        assert result.status == 0
        assert f"    rlx {command}" in result.out
    commands = rlx("--help").out
    assert "..." not in commands.partition("Commands:")[2]


def test_version(rlx):
    from rlx import __version__

    assert rlx("--version").out == f"rlx {__version__}\n"


def test_list_filters(rlx):
    assert "small  two steps of each stage\n" in rlx("list", "small").out
    assert "small" not in rlx("list", "--arxiv", "2402.03300").out
    assert "grpo_math" in rlx("list", "--arxiv", "2402.03300").out
    assert rlx("list", "--family", "mine").out == "small  two steps of each stage\n"
    names = rlx("list", "--names", "reduce").out
    assert names.startswith("token_mean  sum_i sum_t x_it / tokens: every token weighs the same (DAPO")
    assert rlx("list", "--names", "reduce", "grpo").out.split() == next(x for x in names.splitlines() if "GRPO" in x).split()
    wrong = rlx("list", "--names", "los")
    assert (wrong.status, "--names los: there is no such group; groups are stage, loss, " in wrong.err) == (2, True)
    assert rlx("list", "nothing has this text").out == "no recipe matches; `rlx list` shows all\n"


def test_show_prints_what_would_run(rlx):
    out = rlx("show", "small", "stages.rl.lr=5e-4").out
    assert out.startswith("# small: two steps of each stage\n")
    assert "    lr: 0.0005\n" in out


def test_check_says_the_order_and_the_arithmetic(rlx):
    assert rlx("check", "small").out == (
        "sft (fit): 2 optimiser steps of 4 rows\n"
        "rl (online, after sft): 2 steps of 2 prompts x 4 = 8 episodes, 1 optimiser step on each\n"
        "test (evaluate, after rl): accuracy of rl\n"
        "ok\n"
    )
