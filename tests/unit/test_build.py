"""The binder: signatures as the schema, every mistake at once."""

import pytest

from rlx.build import Binder, hint, looks_local
from rlx.types import Component, DataRef, LossTerm, ModelRef, Reward


def bound(group: str, node: object, **settings):
    binder = Binder(**settings)
    return binder.component(group, node, "x"), binder.errors


def test_a_component_is_its_function_with_settings_and_what_it_reads():
    made, errors = bound("loss", {"name": "clipped_surrogate", "clip_low": 0.1, "weight": 2})
    assert errors == []
    assert (made.name, made.weight, made.settings) == ("clipped_surrogate", 2.0, {"clip_low": 0.1})
    assert made.reads[:2] == ("logp", "old_logp")
    assert made.call.keywords == {"clip_low": 0.1}


def test_a_number_after_the_name():
    made, errors = bound("metric", "pass@8")
    assert (made.name, made.settings, errors) == ("pass@8", {"k": 8}, [])


def test_read_renames_a_field():
    made, errors = bound("loss", {"name": "nll", "read": {"logp": "dpo_logp"}})
    assert (made.reads[0], errors) == ("dpo_logp", [])
    _, errors = bound("loss", {"name": "nll", "read": {"lgp": "x"}})
    assert errors[0].startswith("x.read.lgp: loss 'nll' reads logp")


def test_null_drops_an_inherited_key():
    made, errors = bound("loss", {"name": "clipped_surrogate", "clip_low": None})
    assert (made.settings, errors) == ({}, [])


def test_one_component_stands_for_a_list_and_twins_are_numbered():
    binder = Binder()
    assert [c.name for c in binder.value(list[Component[LossTerm]], "nll", "x")] == ["nll"]
    twins = binder.value(list[Component[Reward]], ["format", "format"], "x")
    assert [c.name for c in twins] == ["format", "format_2"]


def test_a_key_that_a_swapped_component_does_not_take_is_dropped_unless_it_was_given():
    node = {"name": "policy_gradient", "clip_lo": 0.2}
    binder = Binder(swapped=frozenset({"x"}))
    assert binder.component("loss", dict(node), "x") is not None
    assert binder.notices == ["x.clip_lo: dropped, because loss 'policy_gradient' takes no 'clip_lo'"]
    binder = Binder(swapped=frozenset({"x"}), given=frozenset({"x.clip_lo"}))
    assert binder.component("loss", dict(node), "x") is None
    assert len(binder.errors) == 1


@pytest.mark.parametrize(
    ("want", "value", "message"),
    [
        (int, 1.5, "x: expected a whole number, got 1.5"),
        (int, True, "x: expected a whole number, got True"),
        (float, "a", "x: expected a number, got 'a'"),
        (bool, 1, "x: expected true or false, got 1"),
        (list[int], 3, "x: expected a list, got 3"),
        (dict[str, int], 3, "x: expected a mapping, got 3"),
        (dict[str, int], {"a": "b"}, "x.a: expected a whole number, got 'b'"),
        (ModelRef, 3, "x: expected @stage, a directory or a hub id, got 3"),
        (ModelRef, "@sft:bset", "x: '@sft:bset' asks for 'bset'; known: @sft, @sft:best, @sft:step=80, @sft:20%"),
        (DataRef, "@a/b/c", "x: expected @task/SPLIT or a data set such as {name: jsonl, path: FILE}, got '@a/b/c'"),
        (int | None, "a", "x: expected a whole number, got 'a'"),
    ],
)
def test_a_wrong_value(want, value, message):
    binder = Binder()
    binder.value(want, value, "x")
    assert binder.errors == [message]


def test_right_values():
    binder = Binder()
    assert binder.value(float, 1, "x") == 1.0
    assert binder.value(int | None, None, "x") is None
    assert binder.value(ModelRef, "@sft:step=80", "x") == ModelRef(stage="sft", pick="step=80")
    assert binder.value(ModelRef, "owner/name", "x") == ModelRef(path="owner/name")
    assert binder.value(DataRef, "@task/train", "x") == DataRef(split="train")
    assert binder.errors == []


def test_code_of_the_users_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text("open('ran', 'w')\ndef score(episodes, *, scale: float = 1.0): ...\n")
    made, errors = bound("reward", "./r.py:score")
    assert (made, errors) == (None, ["x.name: './r.py:score' is code from outside rlx; to run it add --trust ./r.py"])
    assert not (tmp_path / "ran").exists()
    made, errors = bound("reward", {"name": "./r.py:score", "scale": 2.0}, trusted=["./r.py"])
    assert (made.name, made.settings, errors) == ("score", {"scale": 2.0}, [])
    (tmp_path / "bad.py").write_text("1 / 0\n")
    _, errors = bound("reward", "./bad.py:score", trusted=["./bad.py"])
    assert errors == ["x.name: importing ./bad.py raised ZeroDivisionError: division by zero"]


def test_hint_names_the_nearest_by_whole_or_part():
    assert hint("cliped", ["nll", "clipped_surrogate"]) == "; did you mean 'clipped_surrogate'? (known: nll, clipped_surrogate)"
    assert hint("zzz", ["nll", "kl"]) == " (known: nll, kl)"


def test_hint_cuts_a_long_list_to_the_nearest_dozen():
    names = [f"recipe_{i}" for i in range(57)]
    text = hint("recipe_56x", names, "`rlx list`")
    assert text.startswith("; did you mean 'recipe_56'? (nearest of 57: recipe_56, ")
    assert text.endswith("; all: `rlx list`)")
    assert text.count("recipe_") == 13


@pytest.mark.parametrize(
    ("path", "local"), [("./a", True), ("/a", True), ("~/a", True), ("a.jsonl", True), ("owner/name", False)]
)
def test_looks_local(path, local):
    assert looks_local(path) is local


def test_a_key_inside_what_was_given_is_never_dropped():
    binder = Binder(swapped=frozenset({"x.0"}), given=frozenset({"x"}))
    assert binder.value(list[Component[LossTerm]], [{"name": "clipped_surrogate", "clip_lo": 0.2}], "x") == [None]
    assert (binder.notices, binder.dropped) == ([], [])
    assert binder.errors[0].startswith("x.0.clip_lo: loss 'clipped_surrogate' takes no 'clip_lo'; did you mean 'clip_low'?")


@pytest.mark.parametrize(
    ("group", "name", "message"),
    [
        ("metric", "accuracy@8", "x.name: metric 'accuracy' takes no number after an @"),
        ("reward", "length@3", "x.name: reward 'length' takes no number after an @"),
        ("metric", "pass@x", "x.name: 'pass@x': a whole number from 1 stands after the @, as in pass@8"),
        ("metric", "pass@0", "x.name: 'pass@0': a whole number from 1 stands after the @, as in pass@8"),
    ],
)
def test_a_number_after_a_name_that_takes_none(group, name, message):
    _, errors = bound(group, name)
    assert errors[0] == message


def test_an_at_in_a_path_of_the_users_is_part_of_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b").mkdir()
    (tmp_path / "a@b" / "r.py").write_text("def score(episodes): ...\n")
    made, errors = bound("reward", "./a@b/r.py:score", trusted=["./a@b/r.py"])
    assert (made.name, errors) == ("score", [])


def test_code_that_comes_with_a_model_runs_only_where_the_model_is_trusted():
    node = {"name": "pretrained", "path": "a/b", "trust_remote_code": True}
    made, errors = bound("model", dict(node))
    expected = "x.trust_remote_code: would run code that comes with the model; to allow it add --trust a/b"
    assert (made, errors) == (None, [expected])
    made, errors = bound("model", dict(node), trusted=["a/b"])
    assert (made.settings["trust_remote_code"], errors) == (True, [])


def test_a_component_that_comes_with_the_recipe_stands_before_the_catalogues():
    def mine(episodes: list) -> list[float]:
        return [7.0 for _ in episodes]

    made, errors = bound("reward", {"name": "verifier", "weight": 2.0}, provided={("reward", "verifier"): mine})
    assert (made.call([None]), made.weight, errors) == ([7.0], 2.0, [])
