"""Run kinds of faults and write their rows of docs/reliability.md: `python -m faults [KIND ...]` (default: all)."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from faults import KINDS
from faults.processes import preload

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
HEAD = "| fault | what has to hold | provoked | lost or silent |"


def run(name: str) -> tuple[int, list[str]]:
    """How many faults of a kind were provoked, and what went wrong."""
    provoked, wrong = 0, []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for what, trouble in KINDS[name].provoke(Path(folder)):
            provoked += 1
            if trouble:
                wrong.append(f"{what}: {trouble}")
                print(f"  {wrong[-1]}", flush=True)
    if provoked < KINDS[name].least:
        wrong.append(f"{provoked} provoked, at least {KINDS[name].least} are meant to be")
        print(f"  {wrong[-1]}", flush=True)
    return provoked, wrong


def write(name: str, provoked: int, wrong: list[str]) -> None:
    """Put a kind's row into the page's table: in place of its own, or at the end."""
    kind = KINDS[name]
    row = f"| {kind.what} | {kind.kept} | {provoked:,} | {len(wrong)} |"
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = lines.index(HEAD) + 2
    last = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines[first:last]}
    rows[kind.what] = row
    order = [kind.what for kind in KINDS.values()]
    lines[first:last] = [rows[what] for what in order if what in rows]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(names: list[str]) -> int:
    """0 if nothing was lost."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name in names:
        if name not in KINDS:
            print(f"{name!r} is not one of {', '.join(KINDS)}", file=sys.stderr)
            return 2
    preload()
    failures = 0
    for name in names or KINDS:
        began = time.perf_counter()
        print(f"{name}: {KINDS[name].what}", flush=True)
        provoked, wrong = run(name)
        write(name, provoked, wrong)
        failures += len(wrong)
        print(f"  {provoked} provoked, {len(wrong)} lost or silent, {time.perf_counter() - began:.0f} s", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
