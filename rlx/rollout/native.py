"""The embedded engine: batched decoding with any language model of transformers, with exact log-probs of what it samples."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from rlx import world
from rlx.models.cache import kept
from rlx.models.language import LanguageModel
from rlx.models.reader import Reader, check_room
from rlx.models.shared import SharedReader
from rlx.rollout.draws import draw
from rlx.rollout.samples import Job, Samples
from rlx.types import Ended, Message, Sampling, Turn, View

FREE = 8  # new prompts are read when one in so many rows is free: several at a time are cheaper than one by one


def generate(
    policy: LanguageModel, views: list[View], keys: list[list[int]], sampling: Sampling, ended: Ended | None = None
) -> list[list[Turn]]:
    """`len(keys[i])` next turns of each view; at most `sampling.rows` are decoded at a time, and the others wait.

    `ended` is told of each turn when it ends, with its number among all, while others are decoded. A turn's
    `info["truncated"]` says that the limit cut it. A view's prefix counts among the turn's `max_new_tokens` ids; the Turn has
    those after it. `logp` is that of the tokens under softmax(logits / temperature) before anything is cut (which changes
    what is drawn, not what is scored), or at temperature 1 for greedy decoding: what the training forward computes.
    Raises ValueError for a prefix that leaves no room for an id after it.
    """
    if long := [len(view.prefix) for view in views if len(view.prefix) >= sampling.max_new_tokens]:
        raise ValueError(f"a turn of at most {sampling.max_new_tokens} ids cannot go on after a prefix of {long[0]}")
    waiting = deque(
        Job(view, own[start : start + sampling.rows])
        for view, own in zip(views, keys, strict=True)
        for start in range(0, len(own), sampling.rows)
    )
    turns: list[Turn] = []

    def tell(i: int, turn: Turn) -> None:
        if ended is not None:
            ended(len(turns) + i, turn)

    while waiting:
        turns += decode(policy, waiting, sampling, tell)
    starts = np.cumsum([0, *(len(own) for own in keys)]).tolist()
    return [turns[a:b] for a, b in itertools.pairwise(starts)]


@torch.inference_mode()
def decode(policy: LanguageModel, waiting: deque[Job], sampling: Sampling, tell: Ended) -> list[Turn]:
    """The turns of the jobs that wait, or of those that a reader takes, one after the other.

    A finished row leaves the batch, and where the reader `joins`, rows that wait take its place. Draws are by inverse CDF on
    uniforms that depend on a sample's key and the position in the turn alone.
    """
    jobs = taken(waiting, sampling.rows)
    reader = begun(policy, jobs, sampling.max_new_tokens)
    later = list(waiting) if reader.joins else []
    ahead_of_each = [*reader.ahead, *(np.zeros(0, np.int64) for _ in later)]
    state = Samples.of([*jobs, *later], ahead_of_each, sampling, policy.device)
    ends = torch.tensor([] if sampling.ignore_eos else policy.end_ids, dtype=torch.long, device=policy.device)
    turns: dict[int, Turn] = {}
    while True:
        world.progress()
        alive = torch.from_numpy(reader.seats.copy()).to(policy.device)
        step, ahead = state.steps[alive], state.ahead[alive]
        at = step - ahead + state.begun[alive]  # the position in the turn
        token, logp = draw(reader.logits, state.noise[alive, at], sampling)
        if state.given.shape[1]:
            given = state.given[alive, step.clamp(max=state.given.shape[1] - 1)]
            token = torch.where(step < ahead, given, token)
        state.token[alive, at], state.logp[alive, at] = token.int(), logp
        ended = torch.isin(token, ends)
        if sampling.stop:
            ended |= state.stopped(policy, alive, token, step >= ahead, sampling.stop)
        ended &= step >= ahead
        state.steps[alive], state.ended[alive] = step + 1, ended
        stays = (~ended & (at + 1 < sampling.max_new_tokens)).cpu().numpy()
        rows = kept(stays)
        over = reader.seats[~stays].tolist()
        said = state.said(over) if over else []
        if over:
            reader.keep(rows)
            token = token[torch.from_numpy(rows).to(policy.device)]
        if len(rows):
            reader.read(token)
        for i, (ids, scored, whole) in zip(over, said, strict=True):  # while a device reads
            turns[i] = Turn(
                state.views[i].ids, ids, scored, said=Message("assistant", policy.decode(ids)), info={"truncated": not whole}
            )
            tell(i, turns[i])
        room = sampling.rows - len(rows)
        if waiting and reader.joins and (room * FREE >= sampling.rows) and (more := taken(waiting, room)):
            reader.join([job.view for job in more], [len(job.keys) for job in more])
            jobs += more
        elif not len(rows):
            break
    if policy.memory is not None and isinstance(reader, SharedReader):
        seats: list[int] = reader.cache.seats.tolist()
        read = [np.concatenate([state.views[i].ids, state.views[i].prefix, turns[i].did]) for i in seats]
        policy.memory.store(reader, read)
    return [turns[i] for i in range(len(turns))]


def taken(waiting: deque[Job], room: int) -> list[Job]:
    """Take the first jobs off those that wait, as many as there are rows for."""
    jobs: list[Job] = []
    while waiting and len(waiting[0].keys) <= room:
        jobs.append(waiting.popleft())
        room -= len(jobs[-1].keys)
    return jobs


def begun(policy: LanguageModel, jobs: Sequence[Job], longest: int) -> Reader:
    """A reader of the jobs: one that goes on from what the policy has read, if it has read the beginning of each."""
    views, counts = [job.view for job in jobs], [len(job.keys) for job in jobs]
    if policy.memory is not None:
        check_room(policy, views, longest)
        found = [row for view in views if (row := policy.memory.find(view)) is not None]
        if len(found) == len(views):
            return SharedReader.resumed(policy.memory, found, counts, longest)
    return policy.reader(views, counts, longest)
