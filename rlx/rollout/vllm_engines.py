"""Where vLLM runs: in this process, beside the trainer on its GPU, or behind its server."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from rlx.rollout.vllm import Completion, Engine, generate
from rlx.types import ConfigError, Ended, Ids, Sampling, Turn, View


def colocated(
    policy: Any,
    views: list[View],
    keys: list[list[int]],
    sampling: Sampling,
    ended: Ended | None = None,
    *,
    gpu_memory: float = 0.4,
    sleep: bool = True,
    context: int | None = None,
    tolerance: float = 0.1,
) -> list[list[Turn]]:
    """By a vLLM in this process, which has the share `gpu_memory` of the GPU and holds `context` ids a row (null: the model's).

    With `sleep` its weights are in the host's memory and its cache is free while the trainer trains. `tolerance`: nats a token
    between vLLM and the trainer, above which a hand-over of weights has failed. `ended` is not told: all come back at once.
    Raises ConfigError in several processes.
    """
    if ranks() > 1:
        raise ConfigError("rollout: vllm runs in one process; in several, rollout=vllm_server with a server for each")
    return generate(policy, views, keys, sampling, tolerance, lambda: Colocated(policy, gpu_memory, sleep, context))


def server(
    policy: Any,
    views: list[View],
    keys: list[list[int]],
    sampling: Sampling,
    ended: Ended | None = None,
    *,
    urls: list[str],
    host: str = "127.0.0.1",
    at_once: int = 256,
    timeout: int = 600,
    tolerance: float = 0.1,
) -> list[list[Turn]]:
    """By servers, one for each process of the trainer, in the order of its ranks; weights go to them by NCCL.

    `host` is this machine's name, where the servers reach it. Each gets `at_once` requests at a time, and has `timeout` seconds
    for one. `ended` is not told. Raises ConfigError where there are not as many as processes.
    """
    if len(urls) != ranks():
        raise ConfigError(f"rollout.urls: expected a server for each of {ranks()} processes, got {len(urls)}")
    own = urls[dist.get_rank() if dist.is_initialized() else 0]
    return generate(policy, views, keys, sampling, tolerance, lambda: Server(policy, own, host, at_once, timeout))


class Colocated(Engine):
    """`vllm.LLM` in this process: what it is handed are the tensors themselves."""

    def __init__(self, policy: Any, gpu_memory: float, sleep: bool, context: int | None) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self.vllm, self.sleeps, self.asleep = imported(), sleep, False
        with tempfile.TemporaryDirectory() as folder:  # of the model's shape; its weights come with the first hand-over
            policy.module.config.save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)
            self.llm = self.vllm.LLM(
                model=folder,
                dtype="bfloat16" if policy.bf16 else "float32",
                load_format="dummy",
                enable_sleep_mode=sleep,
                gpu_memory_utilization=gpu_memory,
                max_model_len=context,
                logprobs_mode="processed_logprobs",
            )

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """On the GPU; afterwards it sleeps, if it does."""
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False
        try:
            yield
        finally:
            if self.sleeps:
                self.llm.sleep(level=1)
                self.asleep = True

    def hand_over(self, policy: Any) -> None:
        """Load the policy's weights as if from a checkpoint, and drop the prefixes that were cached."""
        weights = [(name, p.detach()) for name, p in policy.module.named_parameters()]
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.llm.reset_prefix_cache()

    def complete(self, prompts: Sequence[Ids], params: Sequence[dict[str, Any]]) -> list[Completion]:
        """All prompts at once."""
        asked = [{"prompt_token_ids": ids.tolist()} for ids in prompts]
        outputs = self.llm.generate(asked, [self.vllm.SamplingParams(**own) for own in params], use_tqdm=False)
        found = []
        for ids, output in zip(prompts, outputs, strict=True):
            (said,) = output.outputs
            drawn = [of[i].logprob for i, of in zip(said.token_ids, said.logprobs or [], strict=False)]
            read = [of[i].logprob for i, of in zip(ids.tolist(), output.prompt_logprobs or [], strict=False) if of]
            found.append(Completion(list(said.token_ids), drawn, str(said.finish_reason), read))
        return found


class Server(Engine):
    """`vllm serve`, reached over HTTP; weights go by vLLM's own transfer."""

    def __init__(self, policy: Any, url: str, host: str, at_once: int, timeout: int) -> None:
        imported()
        from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, ModuleSource, WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self.url, self.timeout, self.at_once = url.rstrip("/"), timeout, at_once
        self.model = self.call("/v1/models")["data"][0]["id"]
        size = 1 + self.call("/get_world_size")["world_size"]
        self.trainer = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(master_address=host, master_port=free_port(host), world_size=size, rank=0),
            client=HTTPVLLMWeightSyncClient(self.url, timeout=timeout),
            source=ModuleSource(policy.module),
        )

    def awake(self) -> contextlib.AbstractContextManager[None]:
        """A server has a GPU of its own, and does not sleep."""
        return contextlib.nullcontext()

    def hand_over(self, policy: Any) -> None:
        """Push the weights between two batches; the pause clears what was cached."""
        self.call("/pause?mode=wait", {})
        try:
            self.trainer.send_weights()
        finally:
            self.call("/resume", {})

    def complete(self, prompts: Sequence[Ids], params: Sequence[dict[str, Any]]) -> list[Completion]:
        """A request for each prompt."""
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(self.ask, prompts, params))

    def ask(self, ids: Ids, params: dict[str, Any]) -> Completion:
        """One completion by its ids; the text that comes with them is not used."""
        asked = {"model": self.model, "prompt": ids.tolist(), "return_token_ids": True, **params}
        (said,) = self.call("/v1/completions", asked)["choices"]
        drawn = (said.get("logprobs") or {}).get("token_logprobs") or []
        read = [of[str(i)]["logprob"] for i, of in zip(ids.tolist(), said.get("prompt_logprobs") or [], strict=False) if of]
        return Completion(said["token_ids"], drawn, str(said["finish_reason"]), read)

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that a path answers, asked by POST where there is a body. Raises RuntimeError with what the server said."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"rollout: {self.url}{path}: {error.code} {error.read(500).decode(errors='replace')}") from error
        except OSError as error:
            raise RuntimeError(f"rollout: {self.url}{path}: no answer ({error}); is `vllm serve` running there?") from error


def imported() -> Any:
    """vLLM. Raises ConfigError where it is not installed."""
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(f"rollout: vLLM cannot be imported ({error}); pip install 'rlx[vllm]', or rollout=native") from error
    return vllm


def ranks() -> int:
    """The processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def free_port(host: str) -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind((host, 0))
        return int(found.getsockname()[1])
