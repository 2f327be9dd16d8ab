"""A language model behind an HTTP endpoint that speaks OpenAI's chat completions, as vLLM, SGLang, llama.cpp and others do."""

from __future__ import annotations

import collections
import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlx import world
from rlx.types import ConfigError, Failed, Message

# Answers after which another try may succeed, besides those from 500 on: timeout, conflict, too many requests.
AGAIN = (408, 409, 429)
# The longest wait before another try, in seconds.
LONGEST_WAIT = 60.0
# How many requests this process has sent, by endpoint and model.
SENT: collections.Counter[tuple[str, str]] = collections.Counter()
LOCK = threading.Lock()


class Unanswered(Failed):
    """The endpoint refused, failed for as often as it was tried, or the budget is spent."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the key is for the endpoint that the config names, and for no other."""

    def redirect_request(self, *_: Any) -> None:
        """No request."""


OPENER = urllib.request.build_opener(NoRedirect)


def openai(
    conversations: Sequence[Sequence[Message]],
    *,
    endpoint: str,
    model: str,
    key_env: str | None = None,
    cache: str | None = None,
    budget: int | None = None,
    retries: int = 5,
    delay: float = 1.0,
    timeout: float = 120.0,
    parallel: int = 8,
    extra: dict[str, Any] | None = None,
    n: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[list[str]]:
    """`n` answers to each conversation, each a request of its own with the seed `seed` + i, `parallel` at a time.

    endpoint: what stands before /chat/completions, such as http://localhost:8000/v1. key_env: the NAME of the environment
    variable that holds the key; the key itself is sent to the endpoint and written nowhere.
    cache: a folder with a file for each request that was answered; what is there is not asked again, by any run.
    budget: the most requests that are sent to this endpoint for this model from a start of the run on; tries count, answers
    of the cache do not. Each of several processes has an equal part of it, for nobody counts what all of them send.
    retries: how often a request is sent again, after `delay` seconds, twice that, and so on, or what the server asks for.
    extra: keys of the request that are added or replaced; one that is null is left out.

    Raises ConfigError: not an endpoint, no key in the environment, a picture in a message. Unanswered: the endpoint refuses
    a request (it says why), cannot be reached, or the budget is spent; answers that have come are in the cache.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"llm 'openai': endpoint: expected http://... or https://..., got {endpoint!r}")
    key = "" if key_env is None else os.environ.get(key_env, "")
    if key_env is not None and not key:
        raise ConfigError(f"llm 'openai': the environment variable {key_env} (key_env) is not set")
    if any(message.images for talk in conversations for message in talk):
        raise ConfigError("llm 'openai': sends text only, and a message has a picture")
    client = Client(endpoint.rstrip("/"), model, key, cache, part_of(budget), retries, delay, timeout)
    settings = {"model": model, "temperature": temperature, "max_tokens": max_new_tokens}
    bodies = [
        json.dumps(
            {
                **settings,
                "messages": [{"role": m.role, "content": m.text} for m in talk],
                "seed": seed + i,
                **(extra or {}),
            }
        )
        for talk in conversations
        for i in range(n)
    ]
    asked = list(dict.fromkeys(bodies))  # the same question twice is one request
    pool = ThreadPoolExecutor(max(1, parallel))
    try:
        answers = dict(zip(asked, pool.map(client.ask, asked), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
    return [[answers[body] for body in bodies[i * n : (i + 1) * n]] for i in range(len(conversations))]


@dataclass(frozen=True)
class Client:
    """Where requests go, and how often they are tried."""

    endpoint: str
    model: str
    key: str
    cache: str | None
    budget: int | None
    retries: int
    delay: float
    timeout: float

    def ask(self, request: str) -> str:
        """The text that answers a request (a JSON object), from the cache where it is there."""
        body = {name: value for name, value in json.loads(request).items() if value is not None}
        wanted = json.dumps({"endpoint": self.endpoint, "body": body}, sort_keys=True)
        digest = hashlib.sha256(wanted.encode()).hexdigest()
        path = None if self.cache is None else Path(self.cache).expanduser() / digest[:2] / f"{digest}.json"
        if path is not None and path.is_file():
            return str(json.loads(path.read_text(encoding="utf-8"))["text"])
        text = self.send(json.dumps(body).encode())
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            beside.write_text(json.dumps({**json.loads(wanted), "text": text}), encoding="utf-8")
            beside.replace(path)  # a reader sees a whole file or none
        return text

    def send(self, data: bytes) -> str:
        """The first answer, after as many tries as it takes."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.endpoint}/chat/completions", data, headers, method="POST")
        said = ""
        for attempt in range(self.retries + 1):
            self.spend()
            wait = self.delay * 2**attempt
            try:
                with OPENER.open(request, timeout=self.timeout) as reply:
                    return text_of(json.load(reply))
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.reason}: {self.hide(error.read(500).decode(errors='replace'))}"
                if error.code not in AGAIN and error.code < 500:
                    raise Unanswered(f"llm 'openai': {self.endpoint} refused a request: {said}") from None
                asked = error.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdecimal() else wait
            except (OSError, http.client.HTTPException, ValueError) as error:
                said = self.hide(f"{type(error).__name__}: {error}")
            if attempt < self.retries:
                time.sleep(min(wait, LONGEST_WAIT))
        tries = f"{self.retries + 1} tries" if self.retries else "1 try"
        raise Unanswered(f"llm 'openai': {self.endpoint} did not answer in {tries}; the last: {said}")

    def spend(self) -> None:
        """Count a request. Raises Unanswered where the budget is spent."""
        with LOCK:
            if self.budget is not None and SENT[self.endpoint, self.model] >= self.budget:
                part = f" (the part of one of {world.size()} processes)" if world.size() > 1 else ""
                raise Unanswered(f"llm 'openai': the budget of {self.budget} requests{part} to {self.endpoint} is spent")
            SENT[self.endpoint, self.model] += 1

    def hide(self, text: str) -> str:
        """A text without the key: some servers repeat it where they refuse it."""
        return text.replace(self.key, "***") if self.key else text


def part_of(budget: int | None) -> int | None:
    """What this process may send of a budget of all."""
    return None if budget is None else budget // world.size() + (world.rank() < budget % world.size())


def text_of(answer: Any) -> str:
    """The text of a completion; an answer without text (a filter's, say) is empty. Raises ValueError: not a completion."""
    try:
        return answer["choices"][0]["message"].get("content") or ""
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(f"not a chat completion: {json.dumps(answer)[:200]}") from None
