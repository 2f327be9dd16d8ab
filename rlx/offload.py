"""Frozen models in the host's memory: on the device only while they are asked (`launch.offload_frozen`).

Dividing them would make each of their forwards a collective, and ranks ask them unequally often. Here each rank is alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, empty_like, nn

enabled = False  # whether frozen models are kept so in this process: set for each run


class Home:
    """The weights and buffers of some modules in the host's memory, from where they are copied to their device and never back.

    A tensor's `data` changes place, so that whatever refers to it (tied weights, say) still does.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.tensors: list[Tensor] = [x for module in modules for x in [*module.parameters(), *module.buffers()]]
        self.devices = [x.device for x in self.tensors]
        self.kept: list[Tensor] = []
        for x in self.tensors:  # one by one, so that no more than one is in both places
            self.kept.append(empty_like(x, device="cpu", pin_memory=x.is_cuda, requires_grad=False).copy_(x.detach()))
            x.data = self.kept[-1]

    def bring(self) -> None:
        """Copy everything to its device, also where that is the host. From pinned memory nothing is waited for."""
        for x, kept, device in zip(self.tensors, self.kept, self.devices, strict=True):
            x.data = kept.to(device, non_blocking=True, copy=True)

    def evict(self) -> None:
        """Drop what is on the device."""
        for x, kept in zip(self.tensors, self.kept, strict=True):
            x.data = kept


homes: WeakKeyDictionary[nn.Module, Home] = WeakKeyDictionary()
here: dict[int, Home] = {}  # those that are on their device, by id


def keep(model: Any) -> None:
    """Keep a frozen model (a policy with its heads, or a module) in the host's memory from now on, where that is enabled."""
    if enabled:
        modules = [model] if isinstance(model, nn.Module) else [model.module, getattr(model, "heads", None)]
        homes[modules[0]] = Home([module for module in modules if module is not None])


def bring(model: Any) -> None:
    """Have a model on its device until the innermost `present` ends, with all that it is a mixture of.

    A model that is not kept in the host's memory is there already.
    """
    for module in (model if isinstance(model, nn.Module) else model.module).modules() if homes else ():
        home = homes.get(module)
        if home is not None and id(home) not in here:
            here[id(home)] = home  # first: where memory does not suffice for all of it, the rest is dropped as well
            home.bring()


class Brought(Mapping[str, Any]):
    """Models by name, for those who do not say beforehand which they ask: one that is looked up is brought."""

    def __init__(self, models: Mapping[str, Any]) -> None:
        self.models = models

    def __getitem__(self, name: str) -> Any:
        bring(self.models[name])
        return self.models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.models)

    def __len__(self) -> int:
        return len(self.models)


@contextlib.contextmanager
def present(*models: Any) -> Iterator[None]:
    """Where models are on their device. At its end those are dropped that were not there before, whoever brought them."""
    before = set(here)
    try:
        for model in models:
            bring(model)
        yield
    finally:
        for key in [key for key in here if key not in before]:
            here.pop(key).evict()
