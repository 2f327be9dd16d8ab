"""Small actor-critic networks as a Policy: observations to actions and values, for environments of arrays."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlx.models.collate import batch_of
from rlx.models.parts import padded_parts
from rlx.types import Batch, ConfigError, Episode, Floats, Ids, Sampling

OFFERS = frozenset({"logp", "entropy", "value"})
KIND = "rlx_net"  # the `model_type` of a checkpoint's config.json


@dataclass(frozen=True)
class Steps:
    """The input of a net: the observations (T,D) of an episode's steps, and the actions taken."""

    seen: Floats
    did: Ids
    prompt: int = 0

    @property
    def length(self) -> int:
        """How many steps there are."""
        return len(self.did)


class NetPolicy:
    """A module that maps observations (B,D) to logits (B,A) and values (B,). `settings` make it again: `make(**settings)`."""

    def __init__(self, module: nn.Module, device: torch.device, name: str, settings: Mapping[str, Any]) -> None:
        self.module = module.to(device)
        self.device = device
        self.name = name
        self.settings = dict(settings)

    @property
    def offers(self) -> set[str]:
        """The fields that `forward` computes."""
        return set(OFFERS)

    def parameters(self) -> list[nn.Parameter]:
        """All weights that are trained."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def with_heads(self, where: Mapping[str, str], seed: int, folder: Path | None = None) -> NetPolicy:
        """This policy: it has its own value and no states that a head could read. Raises ConfigError where one is asked for."""
        if where:
            raise ConfigError(f"model {self.name!r} computes its own value and takes no heads, got {dict(where)}")
        return self

    # ----------------------------------------------------------------- playing
    @torch.inference_mode()
    def sample(self, seen: NDArray[Any], noise: NDArray[np.float64], sampling: Sampling) -> tuple[Ids, Floats]:
        """One action for each observation (B,D) and its log-probability; `noise` (B,) are uniforms.

        Draws are by inverse CDF from softmax(logits / temperature); at temperature 0 it is the likeliest action, scored at
        temperature 1.
        """
        logits, _ = self.module(self._tensor(seen))
        logp = torch.log_softmax(logits / (sampling.temperature or 1.0), -1)
        if sampling.temperature == 0.0:
            did = logp.argmax(-1)
        else:
            cdf = logp.double().exp().cumsum(-1)
            did = torch.searchsorted(cdf, torch.from_numpy(noise).to(self.device)[:, None] * cdf[:, -1:], right=True)[:, 0]
            did = did.clamp(max=logits.shape[-1] - 1)
        return did.cpu().numpy(), logp.gather(-1, did[:, None])[:, 0].cpu().numpy()

    @torch.inference_mode()
    def value(self, seen: NDArray[Any]) -> Floats:
        """The value of each observation, (B,)."""
        found: Floats = self.module(self._tensor(seen))[1].cpu().numpy()
        return found

    def _tensor(self, seen: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(seen, np.float32)).to(self.device)

    # ----------------------------------------------------------------- training
    def collate(self, episodes: list[Episode]) -> Batch:
        """Episodes as named tensors; each has one turn, whose stream `seen` holds what was observed before each action."""
        inputs = [Steps(episode.turns[0].token["seen"], episode.turns[0].did) for episode in episodes]
        return batch_of(episodes, inputs, self.device)

    def forward(self, batch: Batch, want: set[str], temperature: float = 1.0) -> dict[str, Tensor]:
        """The fields of `want` that it offers, (N,T); all steps go through the module as one batch, without padding."""
        inputs: list[Steps] = batch.inputs
        logits, value = self.module(self._tensor(np.concatenate([x.seen for x in inputs])))
        did = torch.from_numpy(np.concatenate([x.did for x in inputs])).to(self.device)
        scaled = torch.log_softmax(logits / temperature, -1)
        fields = {
            "logp": scaled.gather(-1, did[:, None])[:, 0],
            "entropy": -(scaled.exp() * scaled).sum(-1),
            "value": value,
        }
        shape = batch["mask"].shape
        lengths = torch.tensor([x.length for x in inputs], device=self.device)
        at = torch.arange(shape[1], device=self.device)[None] < lengths[:, None]
        return {name: x.new_zeros(shape).masked_scatter(at, x) for name, x in fields.items() if name in want}

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """It computes in float32."""
        return contextlib.nullcontext()

    def split(self, batch: Batch, token_budget: int, *, whole_groups: bool) -> list[list[int]]:
        """The sequences of a batch in parts of at most `token_budget` steps, as if they were padded."""
        return padded_parts(batch, token_budget, whole_groups=whole_groups)

    # ----------------------------------------------------------------- to disk
    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors: beside the folder first, then renamed."""
        from safetensors.torch import save_file

        beside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        config = {"model_type": KIND, "name": self.name, "settings": self.settings}
        (beside / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        save_file({k: v.detach().cpu().contiguous() for k, v in self.module.state_dict().items()}, beside / "model.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)


# --------------------------------------------------------------------------- modules
def linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer, orthogonal with that gain, bias 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Mlp(nn.Module):
    """Actor and critic as two networks of tanh layers (Huang et al. 2022, "The 37 implementation details of PPO")."""

    def __init__(self, inputs: int, actions: int, sizes: Sequence[int]) -> None:
        super().__init__()
        sizes = [inputs, *sizes]

        def tower(outputs: int, gain: float) -> nn.Sequential:
            layers = [x for a, b in itertools.pairwise(sizes) for x in (linear(a, b, 2**0.5), nn.Tanh())]
            return nn.Sequential(*layers, linear(sizes[-1], outputs, gain))

        self.actor, self.critic = tower(actions, 0.01), tower(1, 1.0)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B,A) and values (B,) of observations (B,D)."""
        return self.actor(seen), self.critic(seen)[:, 0]


class GridNet(nn.Module):
    """Convolutions over a square view of `side` x `side` cells of 3 numbers; the rest of the observation joins after them.

    Three 3 x 3 convolutions of stride 2 with ELU, the rest beside their features, one shared layer with ReLU, then a linear
    actor and critic (Words as Beacons, arXiv 2410.08632: 32 channels, 256 units).
    """

    def __init__(self, side: int, extra: int, actions: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.side = side
        layers: list[nn.Module] = []
        width, left = 3, side
        for _ in range(3):
            conv = nn.Conv2d(width, channels, 3, stride=2, padding=1)
            nn.init.orthogonal_(conv.weight, 2**0.5)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers += [conv, nn.ELU()]
            width, left = channels, (left + 1) // 2
        self.view = nn.Sequential(*layers, nn.Flatten())
        self.shared = linear(channels * left * left + extra, hidden, 2**0.5)
        self.actor, self.critic = linear(hidden, actions, 0.01), linear(hidden, 1, 1.0)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B,A) and values (B,) of observations (B,D): the view, row by row, then the rest."""
        cells = 3 * self.side**2
        view = seen[:, :cells].reshape(-1, self.side, self.side, 3).permute(0, 3, 1, 2)
        x = torch.relu(self.shared(torch.cat([self.view(view), seen[:, cells:]], -1)))
        return self.actor(x), self.critic(x)[:, 0]


# --------------------------------------------------------------------------- of the catalogue
def mlp(*, inputs: int, actions: int, sizes: list[int] | None = None, device: str = "cpu", seed: int = 0) -> NetPolicy:
    """Two tanh networks over `inputs` numbers: a policy over `actions` actions, and its critic."""
    settings = {"inputs": inputs, "actions": actions, "sizes": sizes if sizes is not None else [64, 64]}
    return made("mlp", Mlp, settings, device, seed)


def grid_net(
    *,
    side: int,
    extra: int = 0,
    actions: int,
    channels: int = 32,
    hidden: int = 256,
    device: str = "cpu",
    seed: int = 0,
) -> NetPolicy:
    """A convolutional actor-critic over a view of `side` x `side` cells, with `extra` numbers beside it (a subgoal)."""
    settings = {"side": side, "extra": extra, "actions": actions, "channels": channels, "hidden": hidden}
    return made("grid_net", GridNet, settings, device, seed)


mlp.offers = OFFERS  # type: ignore[attr-defined]
mlp.mixes = False  # type: ignore[attr-defined]
grid_net.offers = OFFERS  # type: ignore[attr-defined]
grid_net.mixes = False  # type: ignore[attr-defined]
MODULES: dict[str, type[nn.Module]] = {"mlp": Mlp, "grid_net": GridNet}


def made(name: str, module: type[nn.Module], settings: Mapping[str, Any], device: str, seed: int) -> NetPolicy:
    """A policy with weights drawn from `seed`. Raises ConfigError: a size below 1."""
    if wrong := [k for k, v in settings.items() if (min(v, default=1) if isinstance(v, list) else v) < (k != "extra")]:
        raise ConfigError(f"model.{wrong[0]}: expected at least 1, got {settings[wrong[0]]}")
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NetPolicy(module(**settings), where, name, settings)


def is_net(folder: Path) -> bool:
    """Whether `save` wrote the folder."""
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == KIND


def read_net(folder: Path, device: str = "cpu") -> NetPolicy:
    """A policy that `save` wrote."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    policy = made(config["name"], MODULES[config["name"]], config["settings"], device, 0)
    policy.module.load_state_dict(load_file(folder / "model.safetensors"))
    return policy
