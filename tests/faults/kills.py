"""Kills: of a training at every call that changes its folder, and of every long command at random moments."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Protocol

from faults import Fault
from faults.processes import Forked, command
from faults.sites import killed_at

TINY = {
    "network.channels": "[8]",
    "network.layers_per_block": "1",
    "network.mid_attention": "false",
    "network.norm_groups": "4",
    "max_seconds": "null",
    "optimizer.decay": "constant",
    "samples.every": "0",
    "batch": "8",
    "device": "cpu",
}
"""A training of a second."""
RANDOM = 30
"""Random kills of each command."""


def training(out: Path, *more: str, **options: object) -> list[str]:
    values = {**TINY, **{name: str(value) for name, value in options.items()}}
    return ["train", "digits", "--out", str(out), *(f"--set={k}={v}" for k, v in values.items()), *more]


def weights(folder: Path) -> str:
    """The hash of a run's weights, once they were read whole."""
    from logsnr import load

    return str(load(folder).card["weights"]["sha256"])


def resumed(out: Path, folder: Path, **options: object) -> str:
    """Resume a run, or start it where nothing was saved yet, to its end; what went wrong."""
    more = ["--resume"] if (out / "state" / "state.json").exists() else []
    log = folder / "log"
    log.unlink(missing_ok=True)
    code = command(training(out, *more, **options), log).wait()
    return "" if code == 0 else f"{' '.join(more) or 'a new start'} ended with {code}: {log.read_text()[-300:]}"


def training_sites(folder: Path) -> Iterator[Fault]:
    """A run of three checkpoints, killed at each of its sites, then resumed."""
    from logsnr.cli import main

    options = {"steps": 3, "checkpoint_every": 1, "log_every": 1}
    known: dict[int, str] = {}
    for steps in (1, 2, 3):
        assert command(training(folder / str(steps), **{**options, "steps": steps})).wait() == 0
        known[steps] = weights(folder / str(steps))
    for site in count():
        out = folder / f"site-{site}"

        def work(out: Path = out) -> None:
            import sys

            sys.argv = ["logsnr", *training(out, **options)]
            main()

        try:
            name = killed_at(work, out, site, folder / "killed.log")
        except AssertionError as error:
            yield f"site {site}", str(error)
            continue
        if not name:
            return
        trouble = ""
        if (out / "card.json").exists():
            step = json.loads((out / "card.json").read_text())["step"]
            trouble = "" if weights(out) == known[step] else f"the card of step {step} with other weights"
        trouble = trouble or resumed(out, folder, **options)
        if not trouble and weights(out) != known[3]:
            trouble = "the resumed run has other weights than the uninterrupted one"
        left = [path.name for path in out.rglob(".*") if path.name.endswith((".tmp", ".lock"))]
        yield f"site {site} ({name})", trouble or (f"left behind: {', '.join(left)}" if left else "")


class Running(Protocol):
    """What is killed: one process, or several that belong together."""

    def kill(self) -> None: ...

    def poll(self) -> int | None: ...

    def wait(self, seconds: float = 300.0) -> int | None: ...


def random_kills(
    start: Callable[[int], Running], good: Callable[[int], str], seconds: float, seed: int, least: int = RANDOM
) -> Iterator[Fault]:
    """Kill attempt after attempt of run after run at random moments, until so many kills.

    Args:
        start: begin or resume run number k.
        good: what is wrong with the finished run number k.
        seconds: that an undisturbed one takes.
        seed: of the moments.
        least: kills.
    """
    chance, kills = random.Random(seed), 0
    for run in count():
        moments: list[float] = []
        while True:
            moments.append(chance.uniform(0.1, 0.9) * seconds)
            process = start(run)
            if len(moments) > 6:
                process.wait()  # an end has to come
            if process.wait(moments[-1]) is not None:
                break
            process.kill()
            process.wait()
        kills += len(moments) - 1
        trouble = f"ended with {process.poll()}" if process.poll() else good(run)
        for moment in moments[:-1]:
            yield f"run {run}, killed after {moment:.2f} s", trouble
            trouble = ""
        if kills >= least:
            return


def random_trainings(folder: Path) -> Iterator[Fault]:
    """A run killed at random moments, resumed until it ends, again and again."""
    options = {"steps": 20, "checkpoint_every": 1, "log_every": 10}
    began = time.perf_counter()
    assert command(training(folder / "whole", **options)).wait() == 0
    seconds, expected = time.perf_counter() - began, weights(folder / "whole")

    def start(run: int) -> Forked:
        out = folder / f"run-{run}"
        more = ["--resume"] if (out / "state" / "state.json").exists() else []
        return command(training(out, *more, **options), folder / "log")

    def good(run: int) -> str:
        same = weights(folder / f"run-{run}") == expected
        return "" if same else "other weights than the uninterrupted run's"

    yield from random_kills(start, good, seconds, 0)


def random_calibrations(folder: Path) -> Iterator[Fault]:
    """A search killed at random moments, continued from its measurements until it ends."""

    def arguments(name: str) -> list[str]:
        out, ledger = folder / f"{name}.json", folder / f"{name}.ledger"
        options = ["--nfe", "3", "-n", "8", "--rollouts", "40", "--out", str(out), "--resume", str(ledger)]
        return ["calibrate", str(folder / "model"), *options]

    assert command(training(folder / "model", steps=1)).wait() == 0
    began = time.perf_counter()
    assert command(arguments("whole")).wait() == 0
    seconds, expected = time.perf_counter() - began, digest(folder / "whole.json")

    def good(run: int) -> str:
        return "" if digest(folder / f"{run}.json") == expected else "another plan than the uninterrupted search's"

    yield from random_kills(lambda run: command(arguments(str(run)), folder / "log"), good, seconds, 1)


def random_samplings(folder: Path) -> Iterator[Fault]:
    """A loop that draws file after file and goes on at the first that is missing."""
    from logsnr.cli import main

    assert command(training(folder / "model", steps=1)).wait() == 0

    def loop(out: Path) -> None:
        for seed in range(12):
            file = out / f"{seed:02d}.png"
            if not file.exists():
                sys.argv = ["logsnr", "sample", str(folder / "model"), "-n", "16", "--seed", str(seed)]
                sys.argv += ["--nfe", "4", "--out", str(file)]
                try:
                    main()
                except SystemExit as stop:
                    if stop.code:
                        raise

    began = time.perf_counter()
    assert Forked(lambda: loop(folder / "whole")).wait() == 0
    seconds = time.perf_counter() - began

    def good(run: int) -> str:
        files = sorted((folder / "whole").iterdir())
        mine = [path for path in sorted((folder / str(run)).iterdir()) if path.suffix == ".png"]
        if [path.name for path in mine] != [path.name for path in files]:
            return "other files than the undisturbed loop's"
        same = all(digest(a) == digest(b) for a, b in zip(mine, files, strict=True))
        return "" if same else "a file is cut or of other images"

    yield from random_kills(lambda run: Forked(lambda: loop(folder / str(run)), folder / "log"), good, seconds, 2)


def random_generations(folder: Path) -> Iterator[Fault]:
    """A set made by two processes, one after the other killed at random moments, until all shards are there."""
    from logsnr.cli import main

    def work(out: Path, rank: int, world: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        sys.argv = ["logsnr", "generate", "zoo:digits", "--nfe", "4", "-n", "190", "--chunk", "10", "--shard", "20"]
        sys.argv += ["--out", str(out)]
        main()

    began = time.perf_counter()
    assert Forked(lambda: work(folder / "whole", 0, 1)).wait() == 0
    seconds, expected = time.perf_counter() - began, contents(folder / "whole")

    def start(run: int) -> Forked:
        rank = next(turns) % 2
        other = Forked(lambda: work(folder / str(run), 1 - rank, 2), folder / "log")
        one = Forked(lambda: work(folder / str(run), rank, 2), folder / "log")
        others.append(other)
        return one

    def good(run: int) -> str:
        codes = [other.wait() for other in others]
        others.clear()
        last = Forked(lambda: work(folder / str(run), 0, 1), folder / "log").wait()
        if last != 0 or any(code for code in codes):
            return f"the others ended with {codes}, the last with {last}"
        return "" if contents(folder / str(run)) == expected else "other files than the undisturbed process's"

    turns, others = count(), list[Forked]()
    yield from random_kills(start, good, 0.5 * seconds, 4)


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file."""
    return {str(path.relative_to(folder)): digest(path) for path in folder.rglob("*") if path.is_file()}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
