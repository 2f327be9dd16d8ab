"""The adapter of vLLM against stand-ins that take what vllm 0.33.0 documents and nothing else.

They stand for vLLM, which cannot run without a GPU, and compute with a model of rlx's: `LLM` and `SamplingParams` by their
signatures, the server by the fields that its `CompletionRequest` has, its weight transfer by the four endpoints.
"""

from __future__ import annotations

import copy
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
import torch

from rlx.compose import compose
from rlx.models.load import tiny
from rlx.plan import plan
from rlx.rollout import native
from rlx.rollout.vllm import ENGINES
from rlx.rollout.vllm_engines import colocated, server
from rlx.stages.context import Sources
from rlx.types import ConfigError, Episode, Sampling, Task, Turn, View

KEYS = [[2**64 - 1, 5], [7]]
VIEWS = [View(np.arange(3, 9)), View(np.arange(20, 24), prefix=np.array([9, 10]))]


class Core:
    """What answers in vLLM's place: a copy of the policy's shape, with weights of its own until it is given some."""

    def __init__(self, policy: Any) -> None:
        self.policy = copy.copy(policy)
        self.policy.module = copy.deepcopy(policy.module)
        for p in self.policy.module.parameters():
            torch.nn.init.normal_(p)
        self.said: list[Any] = []
        self.deaf = False

    def load(self, weights: Any) -> None:
        own = dict(self.policy.module.named_parameters())
        for name, value in weights:
            assert value.shape == own[name].shape
            if not self.deaf:
                own[name].data.copy_(value)

    def answer(self, prompt: list[int], p: Any) -> tuple[list[int], list[float], str, list[float]]:
        """ids, log-probs, reason, log-probs of the prompt after its first id."""
        sampling = Sampling(p.max_tokens, p.temperature, p.top_k, p.top_p, p.min_p, tuple(p.stop), ignore_eos=p.ignore_eos)
        ids = np.array(prompt)
        self.policy.end_ids = p.stop_token_ids or [0]
        ((turn,),) = native.generate(self.policy, [View(ids)], [[p.seed or 0]], sampling)
        read = Episode(Task(()), 0, [Turn(ids[:1], ids[1:], np.zeros(len(ids) - 1, np.float32))])
        with torch.no_grad():
            logp = self.policy.forward(self.policy.collate([read]), {"logp"})["logp"][0].tolist() if len(ids) > 1 else []
        return turn.did.tolist(), turn.logp.tolist(), "length" if turn.info["truncated"] else "stop", logp


@dataclass(kw_only=True)
class SamplingParams:
    """vllm.SamplingParams: those of its fields that rlx has a use for."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        assert self.seed is None or -(2**63) <= self.seed < 2**63
        assert self.max_tokens >= 1
        assert self.top_k >= 0
        assert 0 < self.top_p <= 1
        assert 0 <= self.min_p <= 1


@pytest.fixture
def policy() -> Any:
    made = tiny(layers=2, hidden=32, heads=2, kv_heads=2, ffn=64, seed=1)
    made.engine = native.generate
    return made


@pytest.fixture
def vllm(policy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    """A module `vllm`, and what computes behind it."""
    core = Core(policy)

    class LLM:
        def __init__(
            self,
            model: str,
            *,
            dtype: str = "auto",
            seed: int = 0,
            gpu_memory_utilization: float = 0.92,
            load_format: str = "auto",
            enable_sleep_mode: bool = False,
            max_model_len: int | None = None,
            logprobs_mode: str = "raw_logprobs",
        ) -> None:
            assert json.loads((Path(model) / "config.json").read_text())["hidden_size"] == 32
            assert (Path(model) / "tokenizer.json").is_file()
            assert dtype in ("bfloat16", "float32")
            assert (load_format, logprobs_mode) == ("dummy", "processed_logprobs")
            assert 0 < gpu_memory_utilization <= 1
            self.can_sleep, self.asleep = enable_sleep_mode, False

        def sleep(self, level: int = 1, mode: str = "abort") -> None:
            assert self.can_sleep
            assert not self.asleep
            self.asleep = True
            core.said.append("sleep")

        def wake_up(self, tags: list[str] | None = None) -> bool:
            assert self.asleep
            self.asleep = False
            core.said.append("wake_up")
            return True

        def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = (), kwargs: Any = None) -> list[Any]:
            assert method == "reload_weights"
            assert set(kwargs) <= {"weights_iterator", "weights_path", "is_checkpoint_format"}
            assert not self.asleep
            core.load(kwargs["weights_iterator"])
            core.said.append(method)
            return [None]

        def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
            core.said.append("reset_prefix_cache")
            return True

        def generate(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True) -> list[Any]:
            assert not self.asleep
            found = []
            for prompt, p in zip(prompts, sampling_params, strict=True):
                assert set(prompt) == {"prompt_token_ids"}
                core.said.append(p)
                ids, logp, reason, read = core.answer(prompt["prompt_token_ids"], p)
                of = [{i: SimpleNamespace(logprob=x)} for i, x in zip(ids, logp, strict=True)]
                asked = zip(prompt["prompt_token_ids"][1:], read, strict=True)
                seen = [None, *({i: SimpleNamespace(logprob=x)} for i, x in asked)]
                drawn = of if p.logprobs is not None else None
                one = SimpleNamespace(token_ids=tuple(ids), logprobs=drawn, finish_reason=reason)
                found.append(SimpleNamespace(outputs=[one], prompt_logprobs=seen if p.prompt_logprobs is not None else None))
            return found

    class Client:
        def __init__(self, base_url: str, timeout: float = 300) -> None:
            self.base_url = base_url

    class Source:
        def __init__(self, module: torch.nn.Module) -> None:
            self.module = module

    @dataclass
    class Init:
        master_address: str
        master_port: int
        world_size: int
        packed: bool = True
        rank: int = field(kw_only=True)

    class Factory:
        @classmethod
        def trainer_init(cls, init_info: Init, *, client: Client, source: Source | None = None) -> Any:
            assert (init_info.rank, init_info.world_size) == (0, 3)
            post(client.base_url, "/init_weight_transfer_engine", {"init_info": {}})

            def send_weights() -> None:
                for path, body in (("start_weight_update", None), ("update_weights", {"update_info": {}})):
                    post(client.base_url, f"/{path}", body)
                core.load((name, p.detach()) for name, p in source.module.named_parameters())  # NCCL's part
                post(client.base_url, "/finish_weight_update", None)

            return SimpleNamespace(send_weights=send_weights)

    def module(name: str, **what: Any) -> None:
        made = ModuleType(name)
        vars(made).update(what)
        monkeypatch.setitem(sys.modules, name, made)

    module("vllm", LLM=LLM, SamplingParams=SamplingParams)
    module("vllm.distributed")
    module(
        "vllm.distributed.weight_transfer",
        HTTPVLLMWeightSyncClient=Client,
        ModuleSource=Source,
        WeightTransferTrainerFactory=Factory,
    )
    module("vllm.distributed.weight_transfer.nccl_engine", NCCLTrainerInitInfo=Init)
    yield core
    ENGINES.clear()


def post(url: str, path: str, body: Any) -> None:
    import urllib.request

    data = b"" if body is None else json.dumps(body).encode()
    urllib.request.urlopen(urllib.request.Request(url + path, data, {"Content-Type": "application/json"})).close()


@pytest.fixture
def url(vllm: Core) -> Iterator[str]:
    """`vllm serve` in development mode: its endpoints, each field that it does not know refused."""
    lock, state = threading.Lock(), {"paused": False}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def say(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            answers = {"/v1/models": {"object": "list", "data": [{"id": "m"}]}, "/get_world_size": {"world_size": 2}}
            self.say(200, answers[self.path]) if self.path in answers else self.say(404, {})

        def do_POST(self) -> None:
            where = urlparse(self.path)
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(text) if text else {}
            with lock:
                if where.path != "/v1/completions":
                    vllm.said.append(where.path)
                if where.path == "/pause":
                    assert parse_qs(where.query)["mode"][0] in ("abort", "wait", "keep")
                    state["paused"] = True
                    return self.say(200, {"status": "paused"})
                if where.path == "/resume":
                    state["paused"] = False
                    return self.say(200, {"status": "resumed"})
                needs = {"/init_weight_transfer_engine": ["init_info"], "/update_weights": ["update_info"]}
                needs |= {"/start_weight_update": [], "/finish_weight_update": []}
                if where.path in needs:
                    return self.say(200 if list(body) == needs[where.path] else 422, {"message": ""})
                if state["paused"] or where.path != "/v1/completions":
                    return self.say(503 if state["paused"] else 404, {})
                try:
                    model, prompt, back = body.pop("model"), body.pop("prompt"), body.pop("return_token_ids")
                    p = SamplingParams(**body)
                    assert model == "m"
                    assert back is True
                    assert all(type(i) is int for i in prompt)
                except Exception as error:
                    return self.say(400, {"error": {"message": repr(error)}})
                vllm.said.append(p)
                ids, logp, reason, read = vllm.answer(prompt, p)
                seen = [None, *({str(i): {"logprob": x, "rank": 1}} for i, x in zip(prompt[1:], read, strict=True))]
                choice = {"index": 0, "text": "", "finish_reason": reason, "token_ids": ids}
                choice["logprobs"] = {"token_logprobs": logp} if p.logprobs is not None else None
                choice["prompt_logprobs"] = seen if p.prompt_logprobs is not None else None
                self.say(200, {"id": "c", "object": "text_completion", "model": model, "choices": [choice]})

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture(params=["colocated", "server"])
def engine(request: pytest.FixtureRequest, vllm: Core) -> Any:
    if request.param == "colocated":
        return colocated
    url = request.getfixturevalue("url")
    return lambda *given, **settings: server(*given, urls=[url], at_once=3, **settings)


@pytest.mark.parametrize(
    "sampling", [Sampling(6), Sampling(5, 0.7, 9, 0.9, 0.01, ("e", "\n")), Sampling(4, 0.0), Sampling(6, ignore_eos=True)]
)
def test_turns_are_those_of_the_policy_s_weights(policy: Any, engine: Any, vllm: Core, sampling: Sampling) -> None:
    turns = engine(policy, VIEWS, KEYS, sampling)
    expected = native.generate(policy, VIEWS[:1], [[k % 2**63 for k in KEYS[0]]], sampling)
    rest = replace(sampling, max_new_tokens=sampling.max_new_tokens - 2)  # vLLM knows no prefix: its ids are of the prompt
    expected += native.generate(policy, [View(np.concatenate([VIEWS[1].ids, VIEWS[1].prefix]))], KEYS[1:], rest)
    assert [len(row) for row in turns] == [2, 1]
    assert turns[1][0].seen.tolist() == VIEWS[1].ids.tolist()
    for ours, theirs in zip((t for row in turns for t in row), (t for row in expected for t in row), strict=True):
        assert ours.did.tolist() == theirs.did.tolist()
        assert ours.did.dtype == np.int64
        assert ours.logp == pytest.approx(theirs.logp, abs=1e-5)
        assert ours.said == theirs.said
        assert ours.info == theirs.info
    asked = [p for p in vllm.said if isinstance(p, SamplingParams) and p.prompt_logprobs is None]
    assert {p.seed for p in asked} == {2**63 - 1, 5, 7}
    assert all(p.logprobs == 0 and p.include_stop_str_in_output and not p.skip_special_tokens for p in asked)
    assert all(p.stop_token_ids == ([] if sampling.ignore_eos else list(policy.end_ids)) for p in asked)
    assert all(p.ignore_eos == sampling.ignore_eos for p in asked)


def test_weights_are_handed_over_once_each_time_they_change(policy: Any, engine: Any, vllm: Core) -> None:
    def updates() -> int:
        return sum(x in ("reload_weights", "/finish_weight_update") for x in vllm.said)

    engine(policy, VIEWS, KEYS, Sampling(3))
    engine(policy, VIEWS, KEYS, Sampling(3))
    assert updates() == 1
    weight = next(policy.module.parameters()).data
    weight.view(-1)[3] = torch.nextafter(weight.view(-1)[3], torch.tensor(9.0))  # the last bit of one weight
    engine(policy, VIEWS, KEYS, Sampling(3))
    engine(policy, VIEWS, KEYS, Sampling(3))
    assert updates() == 2


def test_a_hand_over_that_did_not_arrive_is_an_error(policy: Any, engine: Any, vllm: Core) -> None:
    vllm.deaf = True
    with pytest.raises(RuntimeError, match=r"differ from the trainer's by .* nats a token \(rollout.tolerance: 0.1\)"):
        engine(policy, VIEWS, KEYS, Sampling(3))
    vllm.deaf = False
    engine(policy, VIEWS, KEYS, Sampling(3))  # it is tried anew


def test_it_sleeps_while_the_trainer_trains(policy: Any, vllm: Core) -> None:
    for _ in range(2):
        colocated(policy, VIEWS, KEYS, Sampling(3))
    said = [x for x in vllm.said if isinstance(x, str)]
    assert said == ["reload_weights", "reset_prefix_cache", "sleep", "wake_up", "sleep"]
    ENGINES.clear()
    vllm.said.clear()
    colocated(policy, VIEWS, KEYS, Sampling(3), sleep=False)
    assert [x for x in vllm.said if isinstance(x, str)] == ["reload_weights", "reset_prefix_cache"]


def test_a_server_is_paused_while_its_weights_change(policy: Any, url: str, vllm: Core) -> None:
    server(policy, VIEWS, KEYS, Sampling(3), urls=[url])
    update = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]
    assert [x for x in vllm.said if isinstance(x, str)] == ["/init_weight_transfer_engine", *update]


def test_what_cannot_be_asked_is_said(policy: Any, vllm: Core) -> None:
    with pytest.raises(ConfigError, match=r"rollout.urls: expected a server for each of 1 processes, got 2"):
        server(policy, VIEWS, KEYS, Sampling(3), urls=["http://a", "http://b"])
    with pytest.raises(RuntimeError, match=r"no answer .*is `vllm serve` running there"):
        server(policy, VIEWS, KEYS, Sampling(3), urls=["http://127.0.0.1:9"])
    with pytest.raises(ValueError, match="cannot go on after a prefix of 2"):
        colocated(policy, VIEWS, KEYS, Sampling(2))
    policy.module.merge_and_unload = None
    with pytest.raises(ConfigError, match="adapter"):
        colocated(policy, VIEWS, KEYS, Sampling(3))


def test_without_vllm_the_extra_is_named(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'rlx\[vllm\]', or rollout=native"):
        colocated(policy, VIEWS, KEYS, Sampling(3))


def test_a_recipe_names_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = compose(["grpo_math", "scale=smoke", "rollout=vllm", "rollout.sleep=false"]).config
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"rollout.name: 'vllm' needs vllm, .* pip install 'rlx\[vllm\]'"):
        plan(asked)
    installed = ModuleType("vllm")
    installed.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", installed)
    made = plan(asked)
    sources = Sources(run_dir=tmp_path, name="rl", seed=0, model=made.model, rollout=made.rollout)
    engine: Any = sources.policy(None).engine
    assert (engine.func, engine.keywords["sleep"], engine.keywords["gpu_memory"]) == (colocated, False, 0.4)
    made = plan(compose(["grpo_math", "scale=smoke"]).config)
    assert made.config["rollout"] == {"name": "native"}
    assert replace(sources, rollout=made.rollout).policy(None).engine.func is native.generate
    assert replace(sources, rollout=None).policy(None).engine is native.generate
