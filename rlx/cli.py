"""The command line. Nothing heavier than Typer is imported here: `rlx --help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
data_app = typer.Typer(help="Look at data as the policy sees it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

WORDS = "RECIPE [KEY=VALUE]"
Overrides = Annotated[list[str], typer.Argument(metavar=WORDS, help="A recipe's name, then what to change.")]
Recipes = Annotated[Path | None, typer.Option("--recipes", metavar="DIR", help="A folder with recipes of your own.")]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="FILE|MODEL",
        help="Allow code of your own that the config names (./my_reward.py), or that comes with a model.",
    ),
]


def version(asked: bool) -> None:
    """Print the version and leave."""
    if asked:
        from rlx import __version__

        print(f"rlx {__version__}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Post-training of language models as recipes.

    A recipe is a YAML file that says what is trained, on what, and by which method. Start with

    \b
      rlx list                                     what there is
      rlx train grpo_math                          SFT, then GRPO, on a laptop
      rlx train grpo_math model=Qwen/Qwen2.5-0.5B task=gsm8k
      rlx reproduce grpo_math                      the paper's claim, with a verdict
    """


@app.command()
def train(
    overrides: Overrides,
    multirun: Annotated[
        bool, typer.Option("-m", "--multirun", help="Sweep: run every combination of comma-separated values.")
    ] = False,
    recipes: Recipes = None,
    trust: Trust = None,
    job_of: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Train a recipe, stage by stage.

    Any key of the recipe can be changed on the command line. A run that was stopped goes on with `rlx resume`, or when it
    is started again with the same settings and its run_dir.

    \b
      rlx train grpo_math
      rlx train grpo_math stages.rl.lr=3e-4 seed=1 run_dir=runs/mine
      rlx train grpo_math model=Qwen/Qwen2.5-0.5B task=gsm8k
      rlx train grpo_math scale=smoke              two steps of everything
      rlx train -m grpo_math seed=0,1,2 stages.rl.lr=1e-4,3e-4
      rlx train grpo_math track=wandb
      rlx train grpo_math launch=zero2 launch.gpus=8
    """
    from rlx import app as run

    overrides, recipes = by_path(overrides, recipes)
    if multirun:
        run.sweep(overrides, recipes, trust or [])
    else:
        run.train(overrides, recipes, trust or [], sweep=job_of)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run that has not finished.")],
    trust: Trust = None,
) -> None:
    """Go on with a run that was stopped or killed.

    Stages that are done are skipped. The first that is not goes on from its last state, to the same metrics as if nothing
    had happened (on the same machine). SIGTERM and Ctrl-C write a state after the step; `save.minutes` (5) and `save.steps`
    say how often one is written anyway. Exit status of a run that was stopped: 130 after Ctrl-C, 143 after SIGTERM.

    \b
      rlx resume runs/mine
      rlx resume runs/mine --trust ./my_reward.py
    """
    from rlx import app as run

    run.resume(run_dir, trust or [])


@app.command()
def check(
    overrides: Annotated[list[str] | None, typer.Argument(metavar=WORDS, help="A recipe's name, then what to change.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Check every recipe there is.")] = False,
    first_batch: Annotated[
        bool, typer.Option("--first-batch", help="Also run the real first batch of each stage on a shrunken model.")
    ] = False,
    recipes: Recipes = None,
    trust: Trust = None,
) -> None:
    """Find every mistake in a recipe before anything is loaded.

    Binds all components, prints the order of the stages and the batch arithmetic, and calls each loss, advantage, reduction
    and derive on a generated batch.

    \b
      rlx check grpo_math stages.rl.lr=3e-4
      rlx check --all
      rlx check grpo_math --first-batch
    """
    from rlx import app as run

    overrides, recipes = by_path(overrides, recipes)
    run.check(overrides, recipes, trust or [], every=every, first_batch=first_batch)


@app.command("list")
def list_(
    text: Annotated[str, typer.Argument(help="Only those whose name, purpose or paper has this text.")] = "",
    family: Annotated[str, typer.Option(help="Only those of this folder of recipes/.")] = "",
    arxiv: Annotated[str, typer.Option(help="Only those of this paper, such as 2402.03300.")] = "",
    results: Annotated[bool, typer.Option("--results", help="Show recorded verdicts, and which are stale.")] = False,
    names: Annotated[str, typer.Option(metavar="GROUP", help="What a recipe may name instead: loss, task, model, ...")] = "",
    recipes: Recipes = None,
) -> None:
    """List the recipes, or the names that one may use.

    \b
      rlx list
      rlx list grpo
      rlx list --names loss
      rlx list --arxiv 2503.14476
      rlx list --family paper
    """
    from rlx import show

    if names:
        show.list_names(names, text)
    else:
        show.list_recipes(text, family, arxiv, recipes, results=results)


@app.command()
def show(overrides: Overrides, recipes: Recipes = None) -> None:
    """Print a composed recipe as YAML: what would run.

    \b
      rlx show grpo_math
      rlx show paper/grpo_math
    """
    from rlx import show as shown

    shown.show_recipe(*by_path(overrides, recipes))


@data_app.command("show")
def data_show(
    overrides: Overrides,
    rows: Annotated[int, typer.Option(help="How many rows of each data set.")] = 3,
    recipes: Recipes = None,
    trust: Trust = None,
) -> None:
    """Print rows as tokens, those that are trained on marked.

    \b
      rlx data show grpo_math
      rlx data show sft_math task=gsm8k task.path=data/gsm8k model=Qwen/Qwen2.5-0.5B
    """
    from rlx import show as shown

    shown.show_data(*by_path(overrides, recipes), trust or [], rows)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="RUN|DIR|HUB_ID", help="A run directory, a model directory or a hub id.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]", help="Task, metrics, limit and the like.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust: Trust = None,
) -> None:
    """Measure a model on held-out tasks.

    \b
      rlx eval runs/mine                         every stage of a run, on its own task
      rlx eval Qwen/Qwen2.5-0.5B task=gsm8k limit=200
      rlx eval runs/mine/rl/out task=arithmetic metrics=[accuracy,pass@8] --json
    """
    from rlx import app as run

    run.evaluate(model, overrides or [], trust or [], as_json=as_json)


@app.command()
def reproduce(
    overrides: Overrides,
    seeds: Annotated[str, typer.Option(help="Seeds instead of the recipe's, such as 0,1,2,3.")] = "",
    paper: Annotated[
        bool, typer.Option("--paper", help="Run at the published settings, beside the published figures.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the result is written (default: docs/results; with changed settings beside the runs)."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes at a time (0: one a core, or one a GPU).")] = 0,
    long: Annotated[bool, typer.Option("--long", help="Also a claim that needs over 20 minutes on two cores.")] = False,
    recipes: Recipes = None,
    trust: Trust = None,
) -> None:
    """Run a paper's claim against its controls: a verdict.

    Method and controls are trained over several seeds. Exit status: 0 reproduced, 3 not reproduced, 4 inconclusive.

    \b
      rlx reproduce grpo_math
      rlx reproduce dapo --seeds 10,11,12
      rlx reproduce grpo_math --paper
    """
    from rlx import app as run

    overrides, recipes = by_path(overrides, recipes)
    status = run.reproduce(overrides, recipes, trust or [], seeds=seeds, paper=paper, out=out, jobs=jobs, long=long)
    raise typer.Exit(status)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_SWEEP", help="A run directory, or one that holds several.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file (default: report.html in the directory).")] = None,
) -> None:
    """Write an HTML page of a run or a sweep.

    The page is one file that needs no other; the plots are written beside it as PNGs, too.

    \b
      rlx report runs/mine
      rlx report multirun/2026-01-31_12-00-00
    """
    from rlx.report.page import write

    print(write(path, out))


def by_path(overrides: list[str] | None, recipes: Path | None) -> tuple[list[str], Path | None]:
    """`./mine/capitals.yaml` is `capitals` with that file among the recipes."""
    words = list(overrides or [])
    for i, word in enumerate(words):
        path = word.removeprefix("recipe=")
        if path.endswith((".yaml", ".yml")) and (i == 0 or word != path):
            if recipes is not None or not Path(path).is_file():
                from rlx.types import ConfigError

                why = "give the recipe's name beside --recipes" if recipes is not None else "there is no such file"
                raise ConfigError(f"recipe {path}: {why}")
            words[i], recipes = f"recipe={Path(path).stem}", Path(path)
    return words, recipes


def main() -> None:
    """Run the command; a mistake of the user's is one message and exit status 2, a run that broke down one and status 1."""
    try:
        app()
    except Exception as error:
        status = told(error)
        if status is None:
            raise
        print(f"rlx: {error}", file=sys.stderr)
        raise SystemExit(status) from None


def told(error: Exception) -> int | None:
    """The exit status of an error whose message is all there is to say; None for a mistake of rlx's own."""
    from rlx.types import ConfigError, Failed

    if isinstance(error, ConfigError):
        return 2
    return error.status if isinstance(error, Failed) else None


if __name__ == "__main__":
    main()
