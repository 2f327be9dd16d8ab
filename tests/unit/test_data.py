"""Rows of every format -> episodes, files of every kind, and what is said about rows that do not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlx.data import files
from rlx.data.formats import episodes
from rlx.envs.single import SingleTurn
from rlx.types import ConfigError, DataError, Episode, Message, Status

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def one(row: dict[str, Any], **columns: str) -> Episode:
    (episode,) = episodes([row], source="train.jsonl", columns=columns)
    return episode


def error(*rows: dict[str, Any], first_line: int = 1, **columns: str) -> str:
    with pytest.raises(DataError) as caught:
        episodes(rows, source="train.jsonl", columns=columns, first_line=first_line)
    return str(caught.value)


# --------------------------------------------------------------------------- formats
def test_prompt_alone_is_an_episode_to_be_played() -> None:
    episode = one({"prompt": "2+2=", "answer": "4", "level": 3})
    assert episode.task.prompt == (Message("user", "2+2="),)
    assert (episode.task.answer, episode.task.meta) == ("4", {"level": 3})
    assert (episode.turns, episode.label, episode.group, episode.status) == ([], None, 0, Status.RUNNING)


def test_prompt_may_be_messages() -> None:
    system = {"role": "system", "content": ""}
    assert one({"prompt": [system, USER]}).task.prompt == (Message("system", ""), Message("user", "Hi"))


def test_prompt_and_completion_is_a_demonstration_without_tokens() -> None:
    episode = one({"prompt": "Hi", "completion": "Hello"})
    (turn,) = episode.turns
    assert (turn.said, turn.replies) == (Message("assistant", "Hello"), ())
    assert (len(turn.seen), len(turn.did), len(turn.logp)) == (0, 0, 0)
    assert (turn.seen.dtype, turn.did.dtype, turn.logp.dtype) == (np.int64, np.int64, np.float32)
    assert (episode.label, episode.status, episode.completion) == (1.0, Status.FINISHED, "Hello")


def test_every_assistant_message_is_a_turn() -> None:
    tool, more = {"role": "tool", "content": "7"}, {"role": "user", "content": "More"}
    episode = one({"messages": [USER, BOT, tool, more, BOT]})
    assert episode.task.prompt == (Message("user", "Hi"),)
    assert [turn.said for turn in episode.turns] == [Message("assistant", "Hello")] * 2
    assert [turn.replies for turn in episode.turns] == [(Message("tool", "7"), Message("user", "More")), ()]
    assert episode.label == 1.0


def test_pair_is_two_episodes_of_a_group() -> None:
    rows = [{"prompt": "Hi", "chosen": "a", "rejected": "b"}, {"prompt": "Ho", "chosen": "c", "rejected": "d"}]
    made = episodes(rows, source="pairs.jsonl")
    assert [(e.group, e.label, e.completion) for e in made] == [(0, 1, "a"), (0, -1, "b"), (1, 1, "c"), (1, -1, "d")]
    assert made[0].task is made[1].task


def test_pair_that_repeats_its_prompt_keeps_only_the_reply() -> None:
    bad = {"role": "assistant", "content": "No"}
    made = episodes([{"prompt": "Hi", "chosen": [USER, BOT], "rejected": [USER, bad]}], source="pairs.jsonl")
    assert [(e.task.prompt, e.completion) for e in made] == [((Message("user", "Hi"),), t) for t in ("Hello", "No")]


def test_implicit_prompt_is_what_both_begin_with() -> None:
    bad, more = {"role": "assistant", "content": "No"}, {"role": "user", "content": "More"}
    made = episodes([{"chosen": [USER, BOT, more, BOT], "rejected": [USER, BOT, more, bad], "margin": 2}], source="pairs.jsonl")
    assert [len(e.task.prompt) for e in made] == [3, 3]
    assert [(e.completion, e.label, e.task.meta) for e in made] == [
        ("Hello", 1, {"margin": 2}),
        ("No", -1, {"margin": 2}),
    ]


def test_implicit_prompt_ends_before_a_reply_although_more_is_shared() -> None:
    more, other = {"role": "user", "content": "More"}, {"role": "user", "content": "Other"}
    chosen, rejected = episodes([{"chosen": [USER, BOT, more, BOT], "rejected": [USER, BOT, other, BOT]}], source="p")
    assert chosen.task.prompt == rejected.task.prompt == (Message("user", "Hi"),)
    assert (len(chosen.turns), rejected.turns[0].replies) == (2, (Message("user", "Other"),))


def test_pairs_win_over_messages_and_messages_over_a_prompt() -> None:
    row = {"prompt": "Hi", "messages": [USER, BOT], "chosen": "a", "rejected": "b"}
    assert len(episodes([row], source="x")) == 2
    assert one({"prompt": "ignored", "messages": [USER, BOT]}).task.prompt == (Message("user", "Hi"),)


def test_columns_are_mapped_and_win_over_the_file_s_own() -> None:
    episode = one({"question": "2+2=", "solution": "4", "answer": "old", "x": 1}, prompt="question", answer="solution")
    assert (episode.task.prompt[0].content, episode.task.answer, episode.task.meta) == ("2+2=", "4", {"x": 1})


def test_one_column_may_be_mapped_twice_and_two_may_be_exchanged() -> None:
    twice = one({"q": "2+2=", "a": "4"}, prompt="q", completion="a", answer="a")
    assert (twice.completion, twice.task.answer, twice.task.meta) == ("4", "4", {})
    exchanged = one({"prompt": "4", "answer": "2+2="}, prompt="answer", answer="prompt")
    assert (exchanged.task.prompt[0].content, exchanged.task.answer) == ("2+2=", "4")


# --------------------------------------------------------------------------- rows that do not fit
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 42}, "column 'prompt': expected text or a list of messages, got 42 (int)"),
        ({"prompt": []}, "column 'prompt': expected text or a list of messages, got [] (list)"),
        ({"prompt": " "}, "column 'prompt': expected text that is not empty, got ' ' (str)"),
        ({"prompt": "a", "completion": ""}, "column 'completion': expected text that is not empty, got '' (str)"),
        (
            {"prompt": "a", "completion": None},
            "column 'completion': expected text or a list of messages, got None (NoneType)",
        ),
        (
            {"prompt": "a", "completion": [USER]},
            "column 'completion': expected an assistant message first, got a user message",
        ),
        (
            {"prompt": "Hi", "chosen": [USER], "rejected": "b"},
            "column 'chosen': expected an assistant message first, got nothing after the prompt",
        ),
        ({"messages": "Hi"}, "column 'messages': expected a list of messages, got 'Hi' (str)"),
        (
            {"messages": [{"from": "human", "value": "Hi"}]},
            "column 'messages.0': expected a message {role, content}, got keys from, value",
        ),
        ({"messages": [USER, "Hi"]}, "column 'messages.1': expected a message {role, content}, got 'Hi' (str)"),
        (
            {"messages": [{"role": "human", "content": "Hi"}]},
            "column 'messages.0.role': expected one of system, user, assistant, tool, got 'human' (str)",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "column 'messages.1.content': expected text that is not empty, got None (NoneType)",
        ),
        (
            {"messages": [USER]},
            "column 'messages': expected a prompt and then an assistant message, got no assistant message",
        ),
        (
            {"messages": [BOT]},
            "column 'messages': expected a prompt and then an assistant message, got an assistant message first",
        ),
        (
            {"chosen": "x" * 99, "rejected": "b"},
            "column 'chosen': expected a list of messages, because there is no column 'prompt'; got '" + "x" * 36 + "... (str)",
        ),
        (
            {"chosen": [USER, BOT], "rejected": [BOT]},
            "columns 'chosen' and 'rejected': expected the same messages up to the assistant's reply",
        ),
    ],
)
def test_bad_cell_is_named(row: dict[str, Any], message: str) -> None:
    assert error(row, first_line=17) == f"train.jsonl line 17, {message}"


def test_column_missing_in_a_later_row_is_named() -> None:
    found = error({"prompt": "a", "completion": "b"}, {"prompt": "a", "x": 1})
    assert found == "train.jsonl line 2, column 'completion': no such column in this row; found prompt, x"


KNOWN = "prompt, chosen, rejected | chosen, rejected | messages | prompt, completion | prompt"


@pytest.mark.parametrize(
    ("found", "suggestion"),
    [
        ("question, answer", "{prompt: question}"),
        ("instruction, output", "{prompt: instruction, completion: output}"),
        ("conversations", "{messages: conversations}"),
        ("a, b", "{prompt: YOUR_COLUMN}"),
    ],
)
def test_unknown_columns_suggest_a_mapping(found: str, suggestion: str) -> None:
    assert error(dict.fromkeys(found.split(", "), "text")) == (
        f"train.jsonl: no format fits the columns {found}; known formats: {KNOWN}; set columns: {suggestion}"
    )


def test_mapping_to_a_column_that_is_not_there() -> None:
    assert error({"q": "a", "b": "c"}, prompt="question") == (
        "train.jsonl: no column 'question' (columns: {prompt: question}); found q, b"
    )


def test_many_bad_rows_are_counted_and_five_shown() -> None:
    rows = [{"prompt": "fine"}, *({"prompt": i} for i in range(7))]
    lines = error(*rows).splitlines()
    assert lines[0] == "train.jsonl line 2, column 'prompt': expected text or a list of messages, got 0 (int)"
    assert lines[5:] == ["train.jsonl: 7 of 8 rows do not fit; the first 5 are shown"]
    assert error(*rows[:3]).splitlines()[2:] == ["train.jsonl: 2 of 3 rows do not fit"]


def test_no_rows() -> None:
    assert error() == "train.jsonl: no rows"


# --------------------------------------------------------------------------- files
def written(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_jsonl_skips_empty_lines_and_counts_them(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '\ufeff{"prompt": "a"}\n\n{"prompt": "b\u2028c"}\n{"prompt": 3}\n')
    assert [e.task.prompt[0].content for e in files.jsonl(path=path, limit=2)] == ["a", "b\u2028c"]
    with pytest.raises(DataError, match=r"a\.jsonl line 4, column 'prompt': .* got 3 \(int\)$"):
        files.jsonl(path=path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "b"', "not valid JSON: Expecting ',' delimiter at character 15"),
        ("[1]", "expected a JSON object with named columns, got list"),
    ],
)
def test_jsonl_line_that_is_no_object(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path, "a.jsonl", '{"prompt": "a"}\n' + line)
    with pytest.raises(DataError) as caught:
        files.jsonl(path=path)
    assert str(caught.value) == f"{path} line 2: {message}"


def test_jsonl_empty_or_not_text(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", "\n")
    with pytest.raises(DataError) as caught:
        files.jsonl(path=path)
    assert str(caught.value) == f"{path}: no rows"
    Path(path).write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError) as caught:
        files.jsonl(path=path)
    assert str(caught.value) == f"{path}: not UTF-8 text (invalid start byte); save it as UTF-8"


def test_missing_file_and_folder(tmp_path: Path) -> None:
    advice = "give the path of a file, absolute or from the current folder"
    path = str(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError) as caught:
        files.jsonl(path=path)
    assert str(caught.value) == f"no such file: {path} (looked in {tmp_path}); {advice}"
    with pytest.raises(ConfigError) as caught:
        files.csv(path=str(tmp_path))
    assert str(caught.value) == f"no such file: {tmp_path} (it is a folder); {advice}"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, "a.jsonl", '{"prompt": "a"}')
    assert len(files.jsonl(path="~/a.jsonl")) == 1


def test_csv_keeps_line_ends_inside_a_field(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'prompt\r\n"two\r\nlines"\r\n')
    (episode,) = files.csv(path=str(tmp_path / "a.csv"))
    assert episode.task.prompt[0].content == "two\r\nlines"


def test_csv_reports_the_line_in_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'question,answer\n"two\nlines",1\n\nb,2\n"",3\n')
    columns = {"prompt": "question"}
    first, second = files.csv(path=path, columns=columns, limit=2)
    assert (first.task.prompt[0].content, second.task.answer) == ("two\nlines", "2")
    with pytest.raises(DataError) as caught:
        files.csv(path=path, columns=columns)
    assert str(caught.value) == f"{path} line 6, column 'prompt': expected text that is not empty, got '' (str)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,answer\na\n", " line 2: expected 2 fields (prompt, answer), got 1"),
        ("prompt,prompt\na,b\n", " line 1: expected column names that differ, got prompt, prompt"),
        ('prompt\n"a\n', " line 2: not valid CSV: unexpected end of data"),
        ("prompt\n", ": no rows"),
    ],
)
def test_csv_that_is_broken(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, "a.csv", text)
    with pytest.raises(DataError) as caught:
        files.csv(path=path)
    assert str(caught.value) == path + message


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet as pq

    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"messages": [[USER, BOT], [BOT, USER]], "id": [7, 8]}), path)
    (episode,) = files.parquet(path=path, limit=1)
    assert (episode.completion, episode.task.meta) == ("Hello", {"id": 7})
    with pytest.raises(DataError, match=r"a\.parquet row 2, column 'messages': expected a prompt"):
        files.parquet(path=path)
    broken = written(tmp_path, "b.parquet", "no parquet")
    with pytest.raises(DataError, match=r"b\.parquet: not a Parquet file: "):
        files.parquet(path=broken)


def test_hub_runs_no_code_and_names_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, **settings: Any) -> list[dict[str, Any]]:
        asked.append((path, settings))
        return [{"prompt": "a"}, {"prompt": 2}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(files.hub(path="a/b", subset="main", limit=1)) == 1
    assert asked == [("a/b", {"name": "main", "split": "train"})]
    with pytest.raises(DataError, match=r"^a/b \[test\] row 2, column 'prompt': "):
        files.hub(path="a/b", split="test")


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **settings: Any) -> None:
        raise ConnectionError("no network\nand more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ConfigError) as caught:
        files.hub(path="a/b", subset="main")
    assert str(caught.value) == (
        "the data set 'a/b' subset 'main' split 'train' could not be loaded from the hub: no network; "
        "check the name and the network, or download it and give the path of the files"
    )


def test_task_of_own_files_has_the_splits_that_are_given(tmp_path: Path) -> None:
    train = written(tmp_path, "train.jsonl", json.dumps({"q": "2+2=", "answer": "4"}))
    test = written(tmp_path, "test.csv", "q,answer\n1+1=,2\n")
    task = files.files(train=train, test=test, demos=str(tmp_path / "later.jsonl"), columns={"prompt": "q"})
    assert list(task.splits) == ["demos", "train", "test"]
    assert [task.splits[name]()[0].task.answer for name in ("train", "test")] == ["4", "2"]
    with pytest.raises(ConfigError, match=r"later\.jsonl"):
        task.splits["demos"]()


def test_task_of_own_files_refuses_other_extensions() -> None:
    with pytest.raises(ConfigError) as caught:
        files.files(train="train.json")
    assert str(caught.value) == "train.json: expected a file that ends in .jsonl, .jsonl.gz, .parquet, .csv, got '.json'"


def test_limit_below_one() -> None:
    with pytest.raises(ConfigError) as caught:
        files.jsonl(path="a.jsonl", limit=0)
    assert str(caught.value) == "a.jsonl: limit: expected at least 1 row, got 0"


# --------------------------------------------------------------------------- the environment of these data
def test_single_turn_asks_and_ends() -> None:
    task = one({"prompt": "Hi"}).task
    env = SingleTurn()
    assert env.reset(task) == (Message("user", "Hi"),)
    reply = env.step(Message("assistant", "Hello"))
    assert (reply.done, reply.messages, reply.reward) == (True, (), 0.0)
