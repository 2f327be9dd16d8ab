"""What a frozen model says of rows of data: computed once for each row, and read from disk by later epochs and runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
import zipfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlx import world
from rlx.models.language import LanguageModel
from rlx.stages.models import ModelSpec, prefix, unchanging
from rlx.types import Batch, Floats, Policy, Tokens
from rlx.units import computed

FORMAT = 1  # another where what is written, or what a forward computes, is no longer the same
MOST = 4 * 2**30  # bytes of a cache: when they are reached, no more is written
KEPT = {"logp", "entropy"}  # fields (N,T) of which those of a row depend on that row alone


def frozen(
    specs: Mapping[str, ModelSpec], models: Mapping[str, Policy], reads: set[str], folder: Path, say: Callable[[str], None]
) -> list[Frozen]:
    """The models whose fields are worth keeping: language models that no step changes, of which only KEPT is read."""
    found, still = [], unchanging(specs, [])
    for name, policy in models.items():
        fields = {f"{prefix(name)}_{x}": x for x in sorted(policy.offers) if f"{prefix(name)}_{x}" in reads}
        if name in still and fields and KEPT.issuperset(fields.values()) and isinstance(policy, LanguageModel):
            found.append(Frozen(policy, fields, folder, say))
    return found


class Frozen:
    """The fields that one model makes: `fields` maps their names (ref_logp) to what the model calls them (logp).

    Rank 0 reads and writes the cache, and says to the others what it has.
    """

    def __init__(self, policy: LanguageModel, fields: Mapping[str, str], folder: Path, say: Callable[[str], None]) -> None:
        self.policy, self.fields = policy, fields
        key = json.dumps([FORMAT, model_key(policy), list(fields.values())]) if world.leads() else ""
        self.rows = Rows(folder, hashlib.sha256(key.encode()).hexdigest()[:32], say) if world.leads() else None

    def fill(self, batch: Batch, token_budget: int, less: float = 1.0) -> None:
        """Add the fields to a batch, with a forward for the rows that are not known; `less` as in `own_units`."""
        keys = [row_key(x) for x in batch.inputs]
        known = world.first(lambda: [self.rows.known.get(key) if self.rows and key else None for key in keys])
        first: dict[str, int] = {}
        at = [first.setdefault(key or str(i), i) for i, key in enumerate(keys)]  # equal rows have one value
        missing = [i for i, row in enumerate(known) if row is None and at[i] == i]
        kinds = list(self.fields.values())
        made = torch.zeros(len(kinds), *batch["mask"].shape)
        for i, row in enumerate(known):
            if row is not None:
                made[:, i, : row.shape[1]] = torch.from_numpy(row)
        if missing:
            found = computed(self.policy, batch.take(missing), set(kinds), token_budget, less=less)
            made[:, missing] = torch.stack([found[x] for x in kinds]).cpu()
            lengths = {i: batch.inputs[i].length - batch.inputs[i].prompt for i in missing if keys[i]}
            if self.rows:
                self.rows.add({keys[i]: made[:, i, :length].numpy().copy() for i, length in lengths.items()})
        batch.update(zip(self.fields, made[:, at].to(self.policy.device), strict=True))


class Rows:
    """Float32 arrays by key, those of `folder`/`name`, in memory: a number a position, which is less than the rows' ids take.

    A file holds the rows of one batch. It is written beside and renamed, and its name is that of its keys, so that those who
    write the same rows at once write the same file. One that is not whole is told, and is as if it were not there. What is not
    on disk is not kept: a run that was killed and goes on computes what the unbroken run computes.
    """

    def __init__(self, folder: Path, name: str, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder / name, say
        self.known: dict[str, Floats] = {}
        self.room = MOST - sum(path.stat().st_size for path in folder.glob("*/*.npz"))
        for path in sorted(self.folder.glob("*.npz")):
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            with np.load(path) as file:  # a zip: its list of contents is at the end, and each of them has a CRC-32
                keys, lengths, values = file["keys"].tolist(), file["lengths"], file["values"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            self.say(f"{path}: not a whole file of the cache ({error}); its rows are computed anew")
            return
        self.known |= zip(keys, np.split(values, np.cumsum(lengths)[:-1], axis=1), strict=True)

    def add(self, rows: Mapping[str, Floats]) -> None:
        """Write the rows and keep them, while there is room."""
        if not rows or self.room <= 0:
            return
        name = hashlib.sha256("".join(rows).encode()).hexdigest()[:32]
        beside = self.folder / f"{uuid.uuid4().hex}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                lengths = [x.shape[1] for x in rows.values()]
                np.savez(file, keys=list(rows), lengths=lengths, values=np.concatenate(list(rows.values()), 1))
                self.room -= file.tell()
            beside.replace(self.folder / f"{name}.npz")
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink()
            self.room = 0
            self.say(f"{self.folder}: the cache cannot be written ({error.strerror}); what is not there is computed each time")
            return
        self.known |= rows
        if self.room <= 0:
            self.say(f"{self.folder.parent}: the cache has reached {MOST / 2**30:g} GiB, and no more is written; remove it")


def row_key(x: Any) -> str:
    """A hash of a row's ids, its prompt's length and who acted; of no other input, and none where there are images."""
    if not isinstance(x, Tokens) or x.images:
        return ""
    return hashlib.sha256(b"%d %d " % (x.length, x.prompt) + x.ids.tobytes() + x.acted.tobytes()).hexdigest()


def model_key(policy: LanguageModel) -> str:
    """A hash of a model's configuration, of what computes it and in which type, and of its weights; not of where they were."""
    module = policy.module
    adapters = {name: config.to_dict() for name, config in getattr(module, "peft_config", {}).items()}
    with_what = [torch.__version__, version("transformers"), policy.device.type, module.config._attn_implementation]
    told = json.dumps([module.config.to_dict(), adapters, policy.bf16, with_what], default=str)
    plain = json.loads(told, object_hook=lambda found: {k: v for k, v in found.items() if k != "_name_or_path"})
    made = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, x in sorted(module.state_dict().items()):
        made.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        made.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return made.hexdigest()
