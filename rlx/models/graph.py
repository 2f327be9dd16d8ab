"""A decode step of fixed shapes, and its replay as a CUDA graph: one launch in place of some hundred.

Not measured: the tests run `Frame` on the CPU, and `Graphs` only where there is a GPU.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rlx.models.cache import FAR, SharedCache

if TYPE_CHECKING:
    from rlx.models.language import LanguageModel

ROWS, COLUMNS, SAMPLES = 32, 256, 8  # shapes grow in such steps, so that there are few of them


class Sizes(NamedTuple):
    """What a graph is good for: rows, columns, prompts, samples a prompt, and the memory that it reads and writes.

    memory: the shapes of the first layer's keys, and where keys and values of each layer are.
    """

    rows: int
    columns: int
    prompts: int
    samples: int
    memory: tuple[int, ...]


def sizes(cache: SharedCache) -> Sizes:
    """The shapes of the next step, with room for rows and columns that fill them up."""
    rows = up(cache.rows, ROWS)
    width = int(cache.held[: cache.rows].max()) + 1
    cache.reserve(rows, width + 1)  # what fills up writes to the last column, which is no row's yet
    apart = bool(cache.prompts)
    layers = [*cache.own, *cache.prompts]
    return Sizes(
        rows,
        min(up(width, COLUMNS), cache.own[0][0].shape[2]),
        len(cache.begun) if apart else 0,
        up(cache.grid.shape[1], SAMPLES) if apart else 0,
        (
            *cache.own[0][0].shape,
            *(cache.prompts[0][0].shape if apart else ()),
            *(x.data_ptr() for pair in layers for x in pair),
        ),
    )


class Frame:
    """The inputs of one decode step in tensors that stay where they are."""

    def __init__(self, policy: LanguageModel, cache: SharedCache, sizes: Sizes) -> None:
        self.policy, device = policy, cache.row.device
        self.cache = copy.copy(cache)
        self.cache.rows, self.cache.width = sizes.rows, sizes.columns
        self.cache.row = torch.arange(sizes.rows, device=device)[:, None]
        self.ids, self.positions, self.cache.at = torch.zeros(3, sizes.rows, 1, dtype=torch.long, device=device).unbind()
        self.mask = torch.zeros(sizes.rows, 1, 1, sizes.columns, device=device)
        if cache.prompts:
            self.cache.grid = torch.zeros(sizes.prompts, sizes.samples, dtype=torch.long, device=device)
            self.cache.cell = (torch.zeros_like(self.ids[:, 0]), torch.zeros_like(self.ids[:, 0]))
            self.cache.prompt_mask = torch.zeros(sizes.prompts, *cache.prompt_mask.shape[1:], device=device)

    def fill(self, cache: SharedCache, ids: Tensor, settings: dict[str, Any]) -> None:
        """Copy the step of `cache` that reads ids (R,1)."""
        copied(self.ids, ids)
        copied(self.positions, settings["position_ids"])
        copied(self.cache.at, cache.at, cache.own[0][0].shape[2] - 1)
        copied(self.mask, settings["attention_mask"], FAR)
        if cache.prompts:
            copied(self.cache.grid, cache.grid)
            copied(self.cache.cell[0], cache.cell[0])
            copied(self.cache.cell[1], cache.cell[1])
            copied(self.cache.prompt_mask, cache.prompt_mask)

    def run(self) -> Tensor:
        """The logits of all rows, (R,V); the first are those of the step."""
        with self.policy.autocast():
            settings = self.cache.given(self.positions, self.mask)
            return self.policy.module(input_ids=self.ids, **settings, logits_to_keep=1).logits[:, -1]  # type: ignore[no-any-return]


class Graphs:
    """The decode steps of a reader as graphs, one for each shape, captured when it is first met."""

    def __init__(self, policy: LanguageModel, cache: SharedCache) -> None:
        self.policy, self.cache = policy, cache
        self.pool = torch.cuda.graph_pool_handle()
        self.captured: dict[Sizes, tuple[Frame, Any, Tensor]] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        """Read ids (R,1): the logits (R,V), which the next call writes over. Raises RuntimeError where none can be captured."""
        shape = sizes(self.cache)
        settings = self.cache.settings(1)
        if any(known.memory != shape.memory for known in self.captured):
            self.captured.clear()  # the cache has moved
        if shape not in self.captured:
            frame = Frame(self.policy, self.cache, shape)
            frame.fill(self.cache, ids, settings)
            self.captured[shape] = (frame, *self._capture(frame))
        frame, graph, logits = self.captured[shape]
        frame.fill(self.cache, ids, settings)
        graph.replay()
        return logits[: len(ids)]

    def _capture(self, frame: Frame) -> tuple[Any, Tensor]:
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            frame.run()  # what is made at a first call must not be made in the graph
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self.pool):
            logits = frame.run()  # where that fails, torch leaves the stream of the capture as the current one
        return graph, logits


def copied(whole: Tensor, x: Tensor, rest: float = 0) -> None:
    """Write x into the beginning of each dimension of a larger tensor, and `rest` beside it."""
    whole.fill_(rest)[tuple(slice(n) for n in x.shape)].copy_(x)


def up(n: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-n // step) * step
