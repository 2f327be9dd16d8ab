"""What a user gets wrong: one clear message, exit status 2, no traceback."""

from pathlib import Path

import pytest

CHECKED = {
    "recipe": (["smal"], "recipe=smal: no recipe is called 'smal'; did you mean 'small'?; recipes of your own: --recipes DIR"),
    "no recipe": (["seed=1"], "which recipe? Give its name, such as grpo_math; recipes of your own: --recipes DIR"),
    "option": (["small", "scale=smoek"], "scale=smoek: no scale is called 'smoek'; did you mean 'smoke'?"),
    "key": (
        ["small", "stages.rl.gruop_size=4"],
        "stages.rl.gruop_size: stage kind 'online' takes no 'gruop_size'; did you mean 'group_size'?",
    ),
    "top-level key": (["small", "sede=1"], "sede: no such key at the top of a recipe; did you mean 'seed'?"),
    "component": (
        ["small", "stages.rl.loss.0.name=cliped"],
        "stages.rl.loss.0.name: no loss is called 'cliped'; did you mean 'clipped_surrogate'?",
    ),
    "hyperparameter": (
        ["small", "stages.rl.loss.0.clip_lo=0.1"],
        "stages.rl.loss.0.clip_lo: loss 'clipped_surrogate' takes no 'clip_lo'; did you mean 'clip_low'?",
    ),
    "type": (["small", "stages.rl.steps=many"], "stages.rl.steps: expected a whole number, got 'many'"),
    "seed": (["small", "seed=abc"], "seed: expected a whole number, got 'abc'"),
    "negative seed": (["small", "seed=-1"], "seed: expected at least 0, got -1"),
    "no steps": (["small", "stages.sft.steps=0"], "stages.sft.steps: expected at least 1, got 0"),
    "rate": (["small", "stages.sft.lr=-1"], "stages.sft.lr: expected 0 or more, got -1.0"),
    "limit": (["small", "stages.rl.eval.limit=0"], "stages.rl.eval.limit: expected at least 1, got 0"),
    "no loss": (["small", "stages.sft.loss=[]"], "stages.sft.loss: required; a stage without a loss trains nothing"),
    "stage": (["small", "stages.rl=5"], "stages.rl: expected a mapping with `kind`, got 5"),
    "stage reference": (
        ["small", "stages.rl.policy=@stf"],
        "stages.rl.policy: '@stf' refers to no stage of the recipe; did you mean 'sft'?",
    ),
    "reference without @": (
        ["small", "stages.rl.policy=sft"],
        "stages.rl.policy: 'sft' is no directory here and no hub id (owner/name); a stage's weights are written @STAGE",
    ),
    "split": (
        ["small", "stages.rl.data=@task/trian"],
        "stages.rl.data: the task has no split 'trian'; did you mean 'train'?",
    ),
    "data of a stage": (
        ["small", "stages.rl.data=@sft"],
        "stages.rl.data: stage 'sft' writes no rows; expected @task/SPLIT, a stage that does, or a data set such as "
        "{name: jsonl, path: FILE}",
    ),
    "missing data": (
        ["small", "stages.sft.data={name: jsonl, path: ./none.jsonl}"],
        "stages.sft.data.path: there is no file or directory './none.jsonl'",
    ),
    "missing task data": (["small", "task=gsm8k", "task.path=./none"], "task.path: there is no file or directory './none'"),
    "missing model": (
        ["small", "model=./none"],
        "model.name: './none' is no model of rlx, no directory here and no hub id (owner/name)",
    ),
    "group": (
        ["small", "stages.rl.group_size=1"],
        "stages.rl.group_size: advantage 'group_zscore' compares the samples of a prompt; 2 or more are needed",
    ),
    "reference": (
        ["small", "stages.rl.loss=[{name: clipped_surrogate},{name: kl}]"],
        "stages.rl.reference: required, because loss 'kl' reads ref_logp",
    ),
    "cycle": (["small", "stages.sft.policy=@rl"], "stages: sft -> rl -> sft: each starts from the next, so none can run first"),
    "objective's stage": (
        ["small", "objective=sfft/loss"],
        "objective: 'sfft/loss' names no stage of the recipe; write stage/metric; did you mean 'sft'?",
    ),
    "objective's metric": (
        ["small", "objective=rl/eval/acuracy"],
        "objective: stage 'rl' measures no 'eval/acuracy'; write stage/metric; did you mean 'rl/eval/accuracy'?",
    ),
    "untrusted": (
        ["small", "stages.rl.reward=./r.py:score"],
        "stages.rl.reward.0.name: './r.py:score' is code from outside rlx; to run it add --trust ./r.py",
    ),
    "no such function": (
        ["small", "stages.rl.reward=./r.py:socre", "--trust", "./r.py"],
        "stages.rl.reward.0.name: ./r.py defines no 'socre'",
    ),
    "code of a model": (
        ["small", "model=a/b", "model.trust_remote_code=true"],
        "model.trust_remote_code: would run code that comes with the model; to allow it add --trust a/b",
    ),
    "several values": (
        ["small", "seed=0,1"],
        "seed=0,1: several values make a sweep, which -m runs; one value that is a list is written key=[1,2]",
    ),
    "syntax": (
        ["small", "stages.rl.lr==3"],
        "stages.rl.lr==3: cannot be read as key=value; put quotes around a value with special characters: 'key=\"a: b\"'",
    ),
    "word": (["small", "seed"], "'seed': expected key=value, such as seed=1 or stages.rl.lr=3e-4"),
    "environment": (
        ["small", "purpose=${oc.env:HOME}"],
        "purpose=${oc.env:HOME}: resolvers are not for configs; a value may only refer to keys of the recipe",
    ),
    "hydra": (["small", "hydra.run.dir=x"], "hydra.run.dir=x: Hydra's own settings are for sweeps (rlx train -m)"),
    "nothing to remove": (["small", "~stages.rl.evall"], "Could not delete from config. 'stages.rl.evall' does not exist."),
}


@pytest.mark.parametrize(("words", "message"), CHECKED.values(), ids=CHECKED.keys())
def test_mistake(rlx, words, message):
    Path("r.py").write_text("def score(episodes):\n    return [0.0 for _ in episodes]\n")
    result = rlx("check", *words)
    assert (result.status, result.said) == (2, f"rlx: {message}")


def test_all_mistakes_at_once(rlx):
    result = rlx("check", "small", "objectiv=rl/loss", "stages.rl.steps=x", "stages.rl.lrr=1", "stages.sft.loss.0.name=nl")
    assert result.status == 2
    assert result.said.splitlines() == [
        "rlx: objectiv: no such key at the top of a recipe; did you mean 'objective'?",
        "stages.sft.loss.0.name: no loss is called 'nl'; did you mean 'nll'?",
        "stages.rl.steps: expected a whole number, got 'x'",
        "stages.rl.lrr: stage kind 'online' takes no 'lrr'; did you mean 'lr'?",
    ]


NO_TASK = "there is no such directory, so it is a hub id; which task? Give task=NAME, such as task=gsm8k or task=arithmetic"
RECIPES = {
    "YAML": (
        "purpose: x\nmodel: {name: tiny\nseed: 1\n",
        "mine/bad.yaml line 3: is not YAML: did not find expected ',' or '}'",
    ),
    "list": ("- 1\n", "mine/bad.yaml: a recipe is a mapping, got list"),
    "hydra": ("hydra: {run: {dir: /}}\n", "mine/bad.yaml: `hydra:` is not for recipes"),
    "environment": (
        "purpose: ${oc.env:HOME}\n",
        "mine/bad.yaml: '${oc.env:' is a resolver; a recipe may only refer to its own keys",
    ),
    "run_dir": (
        "run_dir: /tmp/x\n",
        "mine/bad.yaml: `run_dir` is for the command line (run_dir=DIR), not for recipes",
    ),
    "claim": (
        "defaults: [/recipe/small]\nclaim: {says: x, checks: [{metric: rl/eval/accuracy, minus: nobody, min: 0.0}]}\n",
        "claim.checks.0: no arm 'nobody'",
    ),
    "arms": (
        "defaults: [/recipe/small]\nclaim:\n  says: x\n"
        "  checks: [{metric: rl/eval/acuracy, min: 0.0, minus: to}, {metric: rl/eval/acuracy, min: 0.0, minus: three}]\n"
        "  arms: {one: {stages.rl.lrr: 1.0}, two: {stages.rk.lr: 1.0}, three: {stages.rl.lr: 1.0}}\n",
        "claim.checks.0: no arm 'to'; did you mean 'two'?",
        "claim, arm method: stage 'rl' measures no 'eval/acuracy'; write stage/metric; did you mean 'rl/eval/accuracy'?",
        "claim, arm one: stages.rl.lrr: stage kind 'online' takes no 'lrr'; did you mean 'lr'?",
        "claim, arm two: 'stages.rk.lr': the recipe has no 'rk' there",
    ),
    "parent": (
        "defaults: [/recipe/smal]\n",
        "mine/bad.yaml: defaults: '/recipe/smal' is no recipe; write - /recipe/NAME; did you mean 'small'?; "
        "recipes of your own: --recipes DIR",
    ),
    "empty": ("purpose: nothing\n", "stages: a recipe needs at least one stage"),
    "no task": (
        "stages: {a: {kind: fit, data: '@task/demos', loss: nll, steps: 1, lr: 1.0}}\n",
        "stages.a.data: '@task/demos' needs a task, and the recipe has none; give task=NAME",
    ),
    "required": (
        "task: arithmetic\nstages: {a: {kind: fit, data: '@task/demos', loss: nll, lr: 1.0}}\n",
        "stages.a.steps: required by stage kind 'fit', not given",
    ),
}


@pytest.mark.parametrize(("text", "messages"), [(text, messages) for text, *messages in RECIPES.values()], ids=RECIPES.keys())
def test_bad_recipe(rlx, text, messages):
    Path("mine/bad.yaml").write_text(text)
    result = rlx("check", "bad")
    assert (result.status, result.said) == (2, "rlx: " + "\n".join(messages))


def test_two_recipes_of_one_name(rlx):
    Path("mine/other").mkdir()
    Path("mine/other/small.yaml").write_text("purpose: x\n")
    result = rlx("check", "small")
    assert (result.status, result.err) == (
        2,
        "rlx: two recipes are called 'small': mine/other/small.yaml and mine/small.yaml\n",
    )


def test_bad_row_names_the_line(rlx):
    Path("rows.jsonl").write_text('{"prompt": "1+1", "completion": "2"}\n{"prompt": "1+1",\n')
    result = rlx("train", "small", "stages.sft.data={name: jsonl, path: ./rows.jsonl}", "run_dir=out")
    assert result.status == 2
    assert result.err.startswith("rlx: ./rows.jsonl line 2: ")
    assert len(result.err.splitlines()) == 1


def test_reward_that_raises(rlx):
    Path("r.py").write_text("def score(episodes):\n    raise KeyError('gold')\n")
    result = rlx("train", "small", "stages.rl.reward=./r.py:score", "--trust", "./r.py", "run_dir=out")
    assert result.status == 2
    assert result.err.startswith("rlx: stages.rl.reward: reward 'score' raised KeyError: 'gold' (r.py line 2, on the prompt '")
    assert len(result.err.splitlines()) == 1


def test_model_without_a_tokenizer(rlx):
    from rlx.models.load import tiny

    tiny(layers=1, hidden=32, heads=2, kv_heads=2, ffn=64).module.save_pretrained("bare")
    result = rlx("train", "small", "model=bare", "run_dir=out")
    assert result.status == 2
    assert result.err.startswith("rlx: model 'bare': no tokenizer could be loaded (")
    assert result.err.endswith("; save one beside the model with tokenizer.save_pretrained(DIR)\n")
    assert len(result.err.splitlines()) == 1


def test_run_dir_that_cannot_be_written(rlx):
    Path("file").write_text("")
    result = rlx("train", "small", "run_dir=file/out")
    assert (result.status, result.err) == (
        2,
        "rlx: run_dir=file/out: cannot be written (Not a directory); choose another with run_dir=DIR\n",
    )


def test_run_dir_that_holds_something_else(rlx):
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("")
    result = rlx("train", "small", "run_dir=full")
    assert (result.status, result.err) == (
        2,
        "rlx: run_dir=full: is not empty and holds no run; choose an empty or new directory\n",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "nowhere"], f"nowhere: {NO_TASK}"),
        (["eval", "mine"], "mine: holds neither a run (run.json) nor a model (config.json)"),
        (["report", "nowhere"], "nowhere is no directory: expected a run directory or a sweep directory"),
        (["list", "--recipes", "nowhere"], "--recipes nowhere: is no directory"),
        (
            ["train", "-m", "small,smal"],
            "recipe=smal: no recipe is called 'smal'; did you mean 'small'?; recipes of your own: --recipes DIR",
        ),
        (["train", "-m", "recipe=glob(zzz*)"], "the sweep has no jobs: no value matches; `rlx list` shows the recipes"),
    ],
)
def test_other_commands(rlx, words, message):
    result = rlx(*words)
    assert (result.status, result.said) == (2, f"rlx: {message}")


OWN = """\
def term(logp, mask):
    raise KeyError("gold")

def credit(ret):
    return 1 / 0
"""


def test_a_component_of_the_users_that_raises_in_a_check(rlx):
    Path("own.py").write_text(OWN)
    result = rlx(
        "check", "small", "stages.sft.loss=./own.py:term", "stages.rl.advantage=./own.py:credit", "--trust", "./own.py"
    )
    assert (result.status, result.err) == (
        2,
        "rlx: stages.sft.loss: 'term' raised KeyError: 'gold'\n"
        "stages.rl.advantage: 'credit' raised ZeroDivisionError: division by zero\n",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.digits=2"], f"owner/name: {NO_TASK}"),
        (["task.digit=2", "task=arithmetic"], "task.digit: task 'arithmetic' takes no 'digit'; did you mean 'digits'?"),
        (["task=arithmetic", "seed=1", "task.digits=2", "task.digits.x=2"], "task.digits.x: digits is 2, which has no keys"),
        (["task=arithmetic", "metrics=[a"], "'metrics=[a': its value is not YAML"),
    ],
)
def test_settings_of_eval(rlx, words, message):
    result = rlx("eval", "owner/name", *words)
    assert (result.status, result.said) == (2, f"rlx: {message}")
