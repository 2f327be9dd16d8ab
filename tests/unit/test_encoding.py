"""The state of a stage as JSON and tensors: what is shared stays shared, and rows of the data are named, not written."""

import json

import numpy as np
import pytest
import torch

from rlx.encoding import NotStorable, decode, encode
from rlx.types import Episode, Message, Status, Task


def rows(name: str, n: int = 3) -> list[Episode]:
    return [Episode(Task((Message("user", f"{name} {i}"),), str(i)), i) for i in range(n)]


def through(tree, known):
    plain, tensors = encode(tree, known)
    return decode(json.loads(json.dumps(plain)), tensors, known)


def test_what_goes_in_comes_out():
    tree = {
        "numbers": [1, 2.5, True, None, float("nan"), float("-inf")],
        "containers": ((1, 2), {3}, frozenset({4}), {"a": {}}),
        "arrays": [np.arange(3, dtype=np.int64), np.float32(0.5), np.zeros((2, 0))],
        "tensors": [torch.arange(4).reshape(2, 2), torch.tensor(1.5, dtype=torch.bfloat16)],
        "status": Status.TRUNCATED,
    }
    made = through(tree, {})
    assert made["numbers"][:4] == tree["numbers"][:4]
    assert np.isnan(made["numbers"][4])
    assert made["numbers"][5] == float("-inf")
    assert made["containers"] == tree["containers"]
    assert [type(x) for x in made["containers"]] == [tuple, set, frozenset, dict]
    for x, y in zip(made["arrays"], tree["arrays"], strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.array_equal(x, y)
    for x, y in zip(made["tensors"], tree["tensors"], strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    assert made["status"] is Status.TRUNCATED


def test_a_row_is_named_by_the_data_that_was_read_first_and_what_is_shared_stays_so():
    train = rows("train")
    both = {"task/train": train, "sort/easy": train[1:]}
    pool = [Episode(train[2].task, 0), Episode(train[2].task, 1), Episode(Task((Message("user", "new"),), ""), 2)]
    plain, tensors = encode({"pool": pool}, both)
    assert "train 2" not in json.dumps(plain)
    again = rows("train")
    made = decode(plain, tensors, {"task/train": again})["pool"]
    assert made[0].task is made[1].task is again[2].task
    assert made[2].task.prompt[0].text == "new"


def test_what_cannot_be_written_is_named_by_its_place():
    with pytest.raises(NotStorable, match=r"buffers/0 holds a builtins\.object"):
        encode({"buffers": [object()]}, {})
