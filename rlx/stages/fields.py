"""What a stage's components ask for by name, and whether it can be had: checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlx.build import hint
from rlx.types import FIELDS, Component


def reads(*groups: Sequence[Component[Any]]) -> set[str]:
    """Every field that some component reads."""
    return {name for group in groups for component in group for name in component.reads}


def problems(
    *,
    loss: Sequence[Component[Any]],
    advantage: Sequence[Component[Any]] = (),
    derive: Sequence[Component[Any]] = (),
    watch: Sequence[Component[Any]] = (),
    reference: object,
    absent: Sequence[str] = (),
) -> list[str]:
    """One line for each component that reads a field that this stage does not make. `absent` are the fields it never makes."""
    made = {name for name in FIELDS if name not in absent} | {d.into for d in derive}
    found = []
    for group, components in (("derive", derive), ("advantage", advantage), ("loss", loss), ("watch", watch)):
        for component in components:
            for name in component.reads:
                if name == "ref_logp" and reference is None and "ref_logp" not in {d.into for d in derive}:
                    found.append(f"reference: required, because {group} {component.name!r} reads ref_logp")
                elif name == "adv" and "adv" not in absent and not advantage and group in ("loss", "watch"):
                    found.append(f"advantage: required, because {group} {component.name!r} reads adv")
                elif name not in made:
                    found.append(
                        f"{group}: {component.name!r} reads {name!r}, which this stage does not make{hint(name, made)}"
                    )
    return list(dict.fromkeys(found))
