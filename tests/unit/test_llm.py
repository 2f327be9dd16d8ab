"""Language models that are asked: the stub, one in this process, and one behind a real HTTP server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlx.build import Binder
from rlx.llm.local import local
from rlx.llm.openai import Unanswered, openai
from rlx.llm.rules import rules
from rlx.models.load import tiny
from rlx.rollout.native import generate
from rlx.stages.models import with_models
from rlx.types import Backend, Component, ConfigError, Image, Message, ModelName

SIZES = {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 64}
KEY = "sk-secret-0123456789"


def ask(*texts: str) -> list[list[Message]]:
    return [[Message("user", text)] for text in texts]


# --------------------------------------------------------------------------- rules
def test_rules_answer_by_the_first_expression_that_is_found() -> None:
    answers = {r"colou?r of (\w+)": r"\1 is blue", "colour": "which?"}
    found = rules(ask("The color of ice?", "what colour", "hello"), answers=answers, otherwise="no idea", n=2)
    assert found == [["ice is blue"] * 2, ["which?"] * 2, ["no idea"] * 2]


@pytest.mark.parametrize("answers", [{"(": "x"}, {"a": r"\1"}])
def test_rules_say_which_expression_is_none(answers: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="llm 'rules': not a regular expression"):
        rules(ask("a"), answers=answers)


# --------------------------------------------------------------------------- local
@pytest.fixture(scope="module")
def policy() -> Any:
    made = tiny(**SIZES, seed=3)  # type: ignore[arg-type]
    made.engine = generate
    return made


def test_local_draws_depend_on_the_conversation_and_the_seed_alone(policy: Any) -> None:
    settings: dict[str, Any] = {"model": policy, "n": 2, "temperature": 1.0, "max_new_tokens": 6}
    together = local(ask("one", "two", "three"), **settings, seed=1)
    alone = local(ask("two"), **settings, seed=1)
    assert alone[0] == together[1]
    assert together[1][0] != together[1][1]
    assert together[0][0] != together[1][0] != together[2][0]  # each conversation has draws of its own
    assert local(ask("two"), **settings, seed=2) != alone


def test_local_draws_are_of_the_seed_the_conversation_and_the_number() -> None:
    """Where every id is as likely as another, whatever was asked, two texts are equal only if their draws are."""
    indifferent = tiny(**SIZES)  # type: ignore[arg-type]
    indifferent.engine = generate
    for weight in indifferent.module.parameters():
        weight.data.zero_()
    settings: dict[str, Any] = {"model": indifferent, "n": 3, "temperature": 1.0, "max_new_tokens": 8}
    texts = [x for seed in (0, 1) for row in local(ask("b", "ab", "ba"), **settings, seed=seed) for x in row]
    assert len(set(texts)) == len(texts) == 18
    assert local(ask("b", "b"), **settings, seed=1) == [texts[9:12]] * 2


def test_local_reads_a_directory_once_and_says_the_same(policy: Any, tmp_path: Path) -> None:
    policy.save(tmp_path / "model")
    settings: dict[str, Any] = {"n": 1, "max_new_tokens": 5}
    folder = str(tmp_path / "model")
    assert local(ask("x", "yy"), path=folder, **settings) == local(ask("x", "yy"), model=policy, **settings)
    assert local([], path=folder) == []


def test_local_takes_one_of_model_and_path(policy: Any) -> None:
    for given in ({}, {"model": policy, "path": "x"}):
        with pytest.raises(ConfigError, match="give `model`, a model of the stage, or `path`"):
            local(ask("x"), **given)


def test_a_backend_may_be_a_model_of_the_stage(policy: Any) -> None:
    binder = Binder()
    bound = binder.value(Component[Backend], {"name": "local", "model": "policy", "max_new_tokens": 4}, "stages.x.judge")
    assert binder.errors == []
    assert bound.settings["model"] == ModelName("policy")
    assert len(with_models(bound, {"policy": policy}).call(ask("hi"))) == 1


# --------------------------------------------------------------------------- openai
class Server:
    """Answers the requests that come with the replies that it was given, in order, the last for ever."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.replies: list[tuple[int, Any, dict[str, str]]] = []
        self.reply: Callable[[dict[str, Any]], Any] = lambda body: completion(body["messages"][-1]["content"].upper())
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append({**body, "path": self.path})
                    outer.headers.append(dict(self.headers))
                    status, answer, extra = outer.replies.pop(0) if outer.replies else (200, outer.reply(body), {})
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **extra}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


def completion(text: str | None) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


def test_openai_sends_what_the_protocol_asks_for(server: Server) -> None:
    talk = [Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "yes?"), Message("user", "go on")]
    found = openai([talk, *ask("b")], endpoint=server.url + "/", model="m", n=2, seed=7, temperature=0.5, max_new_tokens=9)
    assert found == [["GO ON"] * 2, ["B"] * 2]
    assert len(server.requests) == 4
    first = min((r for r in server.requests if len(r["messages"]) == 4), key=lambda r: r["seed"])
    assert first == {
        "path": "/v1/chat/completions",
        "model": "m",
        "messages": [{"role": m.role, "content": m.text} for m in talk],
        "temperature": 0.5,
        "max_tokens": 9,
        "seed": 7,
    }
    assert sorted(r["seed"] for r in server.requests) == [7, 7, 8, 8]
    assert "Authorization" not in server.headers[0]


def test_openai_keeps_the_order_of_what_it_asks_in_parallel(server: Server) -> None:
    texts = [f"q{i}" for i in range(20)]
    assert openai(ask(*texts), endpoint=server.url, model="m", parallel=6) == [[t.upper()] for t in texts]


def test_openai_asks_the_same_question_once(server: Server) -> None:
    assert openai(ask("a", "a", "a"), endpoint=server.url, model="m") == [["A"]] * 3
    assert len(server.requests) == 1


def test_openai_takes_the_key_from_the_variable_that_the_config_names(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    openai(ask("a"), endpoint=server.url, model="m", key_env="MY_KEY", cache=str(tmp_path))
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 1
    assert KEY not in written[0].read_text()
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match=r"environment variable MY_KEY \(key_env\) is not set"):
        openai(ask("a"), endpoint=server.url, model="m", key_env="MY_KEY")


def test_openai_does_not_repeat_the_key_that_a_server_repeats(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.replies = [(401, {"error": f"wrong key {KEY}"}, {})]
    with pytest.raises(Unanswered, match=r"refused a request: 401 Unauthorized: .*wrong key \*\*\*") as caught:
        openai(ask("a"), endpoint=server.url, model="m", key_env="MY_KEY")
    assert KEY not in str(caught.value)
    assert len(server.requests) == 1


def test_openai_sends_the_key_to_no_other_place(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.replies = [(302, b"", {"Location": server.url + "/elsewhere"})]
    with pytest.raises(Unanswered, match="302"):
        openai(ask("a"), endpoint=server.url, model="m", key_env="MY_KEY")
    assert [r["path"] for r in server.requests] == ["/v1/chat/completions"]


def test_openai_tries_again_and_waits_longer_each_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("rlx.llm.openai.time.sleep", waits.append)
    server.replies = [(500, b"", {}), (429, b"", {"Retry-After": "3"}), (200, b"<html>", {}), (503, b"", {})]
    assert openai(ask("a"), endpoint=server.url, model="m", delay=0.5) == [["A"]]
    assert waits == [0.5, 3.0, 2.0, 4.0]
    assert len(server.requests) == 5


def test_openai_gives_up_after_its_retries(server: Server) -> None:
    server.reply = lambda body: {"error": "no"}
    with pytest.raises(Unanswered, match=r"did not answer in 3 tries; the last: ValueError: not a chat completion: .*no"):
        openai(ask("a"), endpoint=server.url, model="m", retries=2, delay=0.0)
    assert len(server.requests) == 3


def test_openai_says_that_nobody_is_there(server: Server) -> None:
    with pytest.raises(Unanswered, match=r"did not answer in 1 try; the last: URLError: .*refused"):
        openai(ask("a"), endpoint="http://127.0.0.1:9", model="m", retries=0)


def test_openai_asks_nothing_twice_with_a_cache(server: Server, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"endpoint": server.url, "model": "m", "cache": str(tmp_path / "llm"), "temperature": 1.0}
    first = openai(ask("a", "b"), **settings)
    assert openai(ask("b", "a", "c"), **settings) == [first[1], first[0], ["C"]]
    assert len(server.requests) == 3
    openai(ask("a"), **settings, seed=1)
    openai(ask("a"), **{**settings, "model": "other"})
    assert len(server.requests) == 5
    assert [p.suffix for p in (tmp_path / "llm").rglob("*") if p.is_file()] == [".json"] * 5


def test_openai_stops_at_its_budget_and_keeps_what_it_has(server: Server, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"endpoint": server.url, "model": "m", "cache": str(tmp_path), "parallel": 1, "budget": 2}
    with pytest.raises(Unanswered, match="the budget of 2 requests"):
        openai(ask("a", "b", "c"), **settings)
    assert len(server.requests) == 2
    assert openai(ask("a", "b"), **settings) == [["A"], ["B"]]
    server.replies = [(500, b"", {}), (500, b"", {})]
    with pytest.raises(Unanswered, match="the budget of 3 requests"):
        openai(ask("c"), **{**settings, "budget": 3}, delay=0.0)


def test_openai_adds_and_leaves_out_keys_of_the_request(server: Server) -> None:
    openai(ask("a"), endpoint=server.url, model="m", extra={"max_tokens": None, "max_completion_tokens": 5})
    assert "max_tokens" not in server.requests[0]
    assert server.requests[0]["max_completion_tokens"] == 5


def test_openai_takes_an_answer_without_text_as_empty(server: Server) -> None:
    server.reply = lambda body: completion(None)
    assert openai(ask("a"), endpoint=server.url, model="m") == [[""]]


def test_openai_says_what_it_cannot_send(server: Server) -> None:
    import numpy as np

    with pytest.raises(ConfigError, match="endpoint: expected http"):
        openai(ask("a"), endpoint="file:///etc/passwd", model="m")
    picture = Message("user", ("what?", Image(np.zeros((2, 2, 3), np.uint8))))
    with pytest.raises(ConfigError, match="has a picture"):
        openai([[picture]], endpoint=server.url, model="m")
