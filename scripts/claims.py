"""Run `rlx reproduce` for every recipe that makes a claim, one after the other. Stages that are done are not run again."""

from __future__ import annotations

import subprocess
import sys

from rlx.claims import EXIT_STATUS
from rlx.compose import recipes


def main() -> int:
    """0 where every claim ended with a verdict, whichever it is; else 1."""
    verdicts = {status: verdict for verdict, status in EXIT_STATUS.items()}
    found: dict[str, str] = {}
    for name, recipe in recipes().items():
        if recipe.family != "paper" and recipe.read().get("claim"):
            print(f"== {name}", flush=True)
            status = subprocess.run([sys.executable, "-m", "rlx.cli", "reproduce", name, "--long"]).returncode
            found[name] = verdicts.get(status, f"failed (exit status {status})")
    print("\n" + "\n".join(f"{name}: {verdict}" for name, verdict in found.items()))
    return int(any(verdict not in EXIT_STATUS for verdict in found.values()))


if __name__ == "__main__":
    sys.exit(main())
