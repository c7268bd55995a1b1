"""Kills of one of two processes that train together, each of which holds and saves a part of the state."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from faults import Fault
from faults.kills import random_kills, training, weights
from faults.processes import Forked

KILLS = 50
BOUND = 60.0
"""Seconds in which the other process has to end."""
OPTIONS = {"steps": 6, "checkpoint_every": 1, "log_every": 3, "parallel": "fsdp"}


class Ranks:
    """`logsnr train` over two processes, as a launcher starts them.

    Args:
        out: folder of the run, resumed where there is one.
        logs: folder of what each says.
        chance: which one is killed.
    """

    def __init__(self, out: Path, logs: Path, chance: random.Random) -> None:
        from logsnr.cli import main

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        more = ["--resume"] if (out / "state" / "state.json").exists() else []
        self.logs, self.chance = [logs / f"log-{rank}" for rank in range(2)], chance
        self.trouble: list[str] = []
        for log in self.logs:
            log.unlink(missing_ok=True)

        def work(rank: int) -> None:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
            sys.argv = ["logsnr", *training(out, *more, **OPTIONS)]
            main()

        self.ranks = [Forked(lambda rank=rank: work(rank), log) for rank, log in enumerate(self.logs)]  # type: ignore[misc]

    def poll(self) -> int | None:
        codes = [process.poll() for process in self.ranks]
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self, seconds: float = 300.0) -> int | None:
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        return self.poll()

    def kill(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Kill one; the other has to end by itself, in a line, once the two have met."""
        victim = self.chance.randrange(2)
        self.ranks[victim].kill(sig)
        other, began = self.ranks[1 - victim], time.monotonic()
        met = "2 processes (cpu), sharded" in self.logs[0].read_text()
        if not met:
            other.kill()  # as a launcher does
        elif other.wait(BOUND) is None:
            self.trouble.append(f"process {1 - victim} went on for {BOUND:.0f} s")
            other.kill()
        elif other.poll():
            said = [line for line in self.logs[1 - victim].read_text().splitlines() if "error" in line.lower()]
            if len(said) != 1 or f"process {victim} of 2 ended" not in said[0]:
                self.trouble.append(f"process {1 - victim} said {said[-3:]} after {time.monotonic() - began:.1f} s")


def random_sharded(folder: Path) -> Iterator[Fault]:
    """A sharded training, one process of which is killed at random moments, resumed until it ends, again and again."""
    chance = random.Random(7)
    began = time.perf_counter()
    assert Ranks(folder / "whole", folder, chance).wait() == 0
    seconds, expected = time.perf_counter() - began, weights(folder / "whole")
    started: list[Ranks] = []

    def start(run: int) -> Ranks:
        started.append(Ranks(folder / f"run-{run}", folder, chance))
        return started[-1]

    def good(run: int) -> str:
        trouble = [text for ranks in started for text in ranks.trouble]
        started.clear()
        if weights(folder / f"run-{run}") != expected:
            trouble.append("other weights than the uninterrupted run's")
        left = [path.name for path in (folder / f"run-{run}" / "state").iterdir() if path.name != "state.json"]
        return "; ".join(trouble + [f"left behind: {left}"] * (len(left) != 1))

    yield from random_kills(start, good, seconds, 5, KILLS)
